"""Files of weights, converted offline: read back by torch and by the safetensors package, against plain indexing."""

from __future__ import annotations

import json
import random
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sseds_rec as sr
from tests.slim.checkpoints import TABLES, assert_same, digest, gathered, plan_of, small_parts, weights
from tests.slim.rotations import draw_rotation
from tests.slim.test_offline_faults import _Touch

SMALL = {"t": (6, 8, [1, 2, 5])}


@pytest.fixture(params=[False, True], ids=["at once", "in pieces"])
def pieces(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tables that fit into one piece of work, and that do not."""
    with small_parts() if request.param else nullcontext():
        yield


def _state(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {f"ebc.embedding_bags.{name}.weight": value for name, value in weights(dtype=dtype).items()}


def _slim(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What must become of the tables in it."""
    expected = {}
    for name, value in state.items():
        kept = TABLES[name.split(".")[-2]][2] if ".embedding_bags." in name else None
        if kept != []:
            expected[name] = gathered(value, kept) if kept else value
    return expected


def _convert(path: Path, state: Any, plan: sr.DimensionPlan | None = None) -> Any:
    """Saves, converts and loads; the source stays what it was, and the new file's own checksums are right."""
    torch.save(state, path)
    before = digest(path)
    slim = sr.slim_checkpoint(path, path.with_name("slim.pt"), plan or plan_of())
    assert digest(path) == before
    assert zipfile.ZipFile(slim).testzip() is None
    return torch.load(slim, weights_only=True)


@pytest.mark.usefixtures("pieces")
def test_a_plain_state_dict(tmp_path: Path) -> None:
    state = {
        **_state(),
        "over.weight": torch.randn(6, 4).T,
        "steps": torch.tensor(7),
        "mask": torch.tensor([True, False]),
    }
    assert_same(_convert(tmp_path / "full.pt", state), _slim(state))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full.pt", "slim.pt"]


def test_tensors_within_other_things_and_views_of_one_storage(tmp_path: Path) -> None:
    tables, shared = _state(), torch.randn(20, 4)
    model = {**tables, "tied": shared, "rows": shared[4:6], "parameter": nn.Parameter(torch.randn(3))}
    state = {
        "model": model,
        "epoch": 3,
        "list": [shared.T, {"x": torch.arange(3)}, (torch.ones(2), "text")],
        "none": None,
    }
    found = _convert(tmp_path / "full.pt", state)
    assert_same({n: v for n, v in found["model"].items() if n in tables}, _slim(tables))
    assert found.keys() == state.keys() and found["epoch"] == 3 and found["none"] is None
    for name in ("tied", "rows", "parameter"):
        assert torch.equal(found["model"][name], model[name])
    transposed, inner, (ones, text) = found["list"]
    assert torch.equal(transposed, shared.T) and torch.equal(inner["x"], torch.arange(3))
    assert torch.equal(ones, torch.ones(2)) and text == "text"
    storages = {v.untyped_storage().data_ptr() for v in (found["model"]["tied"], found["model"]["rows"], transposed)}
    assert len(storages) == 1
    assert (tmp_path / "slim.pt").stat().st_size < (tmp_path / "full.pt").stat().st_size


def test_what_a_module_says_about_its_state(tmp_path: Path) -> None:
    module = nn.ModuleDict({"over": nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))})
    state = module.state_dict()
    state.update(_state())
    found = _convert(tmp_path / "full.pt", state)
    assert isinstance(found, OrderedDict) and found._metadata == state._metadata and found._metadata  # type: ignore[attr-defined]
    assert list(found) == list(_slim(state))


def test_a_file_that_was_converted_can_be_converted_again(tmp_path: Path) -> None:
    state = _state()
    once = _convert(tmp_path / "full.pt", state)
    narrow = plan_of({"c": (64, 8, [0, 2])})
    sr.slim_checkpoint(tmp_path / "slim.pt", tmp_path / "again.pt", narrow)
    name = "ebc.embedding_bags.c.weight"
    assert_same(torch.load(tmp_path / "again.pt"), {**once, name: gathered(state[name], [1, 5])})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
@pytest.mark.usefixtures("pieces")
def test_other_numbers_and_rotated_tables(tmp_path: Path, dtype: torch.dtype, kind: str) -> None:
    state = _state(dtype)
    turn = draw_rotation(16, 0).keep(TABLES["c"][2])
    if kind == "pt":
        torch.save(state, tmp_path / "full.pt")
    else:
        save_file(state, tmp_path / "full.safetensors")
    slim = sr.slim_checkpoint(tmp_path / f"full.{kind}", tmp_path / f"slim.{kind}", plan_of(rotations={"c": turn}))
    found = torch.load(slim) if kind == "pt" else load_file(slim)
    own = found.pop("ebc.embedding_bags.c.weight")
    expected = ((state["ebc.embedding_bags.c.weight"].double() - turn.mean) @ turn.forward).to(dtype)
    torch.testing.assert_close(own[:, :5], expected)
    assert own.dtype == dtype and own.shape == (64, 8) and not own[:, 5:].any()
    assert_same(found, {n: v for n, v in _slim(state).items() if ".c." not in n})


def test_without_checksums(tmp_path: Path) -> None:
    state = {**_state(), "over": torch.randn(5)}
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "full.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert not any(info.CRC for info in zipfile.ZipFile(tmp_path / "full.pt").infolist())
    sr.slim_checkpoint(tmp_path / "full.pt", tmp_path / "slim.pt", plan_of())
    assert_same(torch.load(tmp_path / "slim.pt"), _slim(state))


def _refused(path: Path, match: str, plan: sr.DimensionPlan | None = None) -> None:
    before = digest(path)
    with pytest.raises(sr.UserError, match=match) as refused:
        sr.slim_checkpoint(path, path.with_name("slim"), plan or plan_of(SMALL))
    assert "\n" not in str(refused.value) and [own.name for own in path.parent.iterdir()] == [path.name]
    assert digest(path) == before


def _small() -> dict[str, Tensor]:
    return {"m.embedding_bags.t.weight": weights(SMALL)["t"], "over": torch.arange(1.0, 9.0)}


def test_files_that_are_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "full.pt"
    torch.save(_small(), path, _use_new_zipfile_serialization=False)
    _refused(path, "full.pt: torch.load.weights_only=True. does not read it .*give a state dict in torch's zip format")
    path.write_bytes(b"")
    _refused(path, "full.pt: torch.load")
    path.write_text("no checkpoint")
    _refused(path, "full.pt: torch.load")
    torch.save({**_small(), "evil": _Touch(tmp_path / "trap")}, path)
    _refused(path, "full.pt: torch.load.weights_only=True. does not read it")
    torch.save(nn.Linear(2, 2), path)
    _refused(path, "full.pt: torch.load.weights_only=True. does not read it")
    torch.save({"m.embedding_bags.t.weight": torch.randn(8, 6).T}, path)
    _refused(path, "full.pt: m.embedding_bags.t.weight does not lie row by row")
    torch.save({"m.embedding_bags.t.weight": torch.randn(9, 8)[:6]}, path)
    _refused(path, "full.pt: m.embedding_bags.t.weight does not lie row by row")
    torch.save(_small(), path)
    _refused(path, r"table t: the checkpoint holds \[6, 8\], the plan expects \[5, 8\]", plan_of({"t": (5, 8, [1])}))
    _refused(path, "table u of the plan is not in the checkpoint", plan_of({"u": (5, 8, [1])}))
    (tmp_path / "there").mkdir()
    with pytest.raises(sr.UserError, match="there: exists already"):
        sr.slim_checkpoint(path, tmp_path / "there", plan_of(SMALL))


def test_a_flipped_bit_is_refused_or_without_effect(tmp_path: Path) -> None:
    path, slim, state = tmp_path / "full.pt", tmp_path / "slim.pt", _small()
    torch.save(state, path)
    content = path.read_bytes()
    within = set()
    for value in state.values():
        begin = content.index(value.numpy().tobytes())
        within |= set(range(begin, begin + value.nbytes))
    expected = {**state, "m.embedding_bags.t.weight": gathered(weights(SMALL)["t"], [1, 2, 5])}
    draw, refused, passed = random.Random(2), 0, 0
    for place in [*range(0, len(content), 17), *sorted(within)[::5]]:
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :])
        try:
            sr.slim_checkpoint(path, slim, plan_of(SMALL))
        except sr.UserError:
            refused += 1
        else:
            assert place not in within
            assert_same(torch.load(slim, weights_only=True), expected)
            slim.unlink()
            passed += 1
        assert [own.name for own in tmp_path.iterdir()] == ["full.pt"]
    assert refused > 60 and passed > 20
    for keep in (len(content) - 1, len(content) // 2, 10):
        path.write_bytes(content[:keep])
        _refused(path, "full.pt: torch.load")


@pytest.mark.usefixtures("pieces")
def test_safetensors(tmp_path: Path) -> None:
    state = {
        **_state(),
        "over": torch.randn(4, 6, dtype=torch.bfloat16),
        "count": torch.tensor(3),
        "mask": torch.tensor([True, False, True]),
        "tiny": torch.randn(5).to(torch.float8_e4m3fn),
        "none": torch.empty(0, 3),
    }
    save_file(state, tmp_path / "full.safetensors", {"format": "pt", "note": "α"})
    before = digest(tmp_path / "full.safetensors")
    sr.slim_checkpoint(tmp_path / "full.safetensors", tmp_path / "slim", plan_of())
    found = load_file(tmp_path / "slim")
    tiny = found.pop("tiny"), state.pop("tiny")
    assert_same(found, _slim(state))
    assert tiny[0].dtype == tiny[1].dtype and torch.equal(*(value.view(torch.uint8) for value in tiny))
    with safe_open(tmp_path / "slim", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "α"}
    assert digest(tmp_path / "full.safetensors") == before


def _header(content: bytes, change: dict[str, Any]) -> bytes:
    """The file with another header."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for name, value in change.items():
        header[name] = {**header[name], **value} if isinstance(value, dict) and name in header else value
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def test_damaged_safetensors(tmp_path: Path) -> None:
    path, weight = tmp_path / "full.safetensors", "m.embedding_bags.t.weight"
    save_file(_small(), path)
    content = path.read_bytes()
    begin, end = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])[weight]["data_offsets"]
    changes: list[dict[str, Any]] = [
        {weight: {"data_offsets": [begin, end - 4]}},
        {weight: {"data_offsets": [begin - 4, end - 4]}},
        {weight: {"data_offsets": [-4, end]}},
        {weight: {"shape": [6, 9]}},
        {weight: {"shape": [6, 1 << 60]}},
        {weight: {"dtype": "F64"}},
        {weight: {"more": 1}},
        {"other": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
        {"other": 3},
        {"__metadata__": [1]},
        {"__metadata__": {"x": 1}},
    ]
    damaged = [_header(content, change) for change in changes]
    damaged += [content[:-1], content + b"x", content[:20], content[:4], b"", bytes(8) + content[8:]]
    damaged += [content[:8] + b"[1]" + content[11:], b"\xff" * 8 + content[8:], (3).to_bytes(8, "little") + b"[1]"]
    for own in damaged:
        path.write_bytes(own)
        _refused(path, "full.safetensors: .*; the checkpoint is damaged, restore it")
    path.write_bytes(_header(content, {weight: {"dtype": "I32"}}))
    _refused(path, f"{weight} does not lie row by row in numbers that torch knows")
