"""Damaged, hostile and impossible conversions: refused in one line, with nothing left and nothing run."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

import sseds_rec as sr
from tests.slim.checkpoints import assert_same, digest, entries, full_state, gathered, plan_of, slim_entries, weights

SMALL = {"t": (6, 8, [1, 2, 5])}
WEIGHT = "m.embedding_bags.t.weight"


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """A checkpoint of one small table, a tensor and a number."""
    state = {WEIGHT: weights(SMALL)["t"], "over": torch.arange(1.0, 9.0), "epoch": 3}
    dcp.save(state, checkpoint_id=tmp_path / "full")
    return tmp_path / "full"


def _refused(src: Path, match: str, plan: sr.DimensionPlan | None = None) -> None:
    before = digest(src)
    with pytest.raises(sr.UserError, match=match) as refused:
        sr.slim_checkpoint(src, src.parent / "slim", plan or plan_of(SMALL))
    assert "\n" not in str(refused.value)
    assert [path.name for path in src.parent.iterdir()] == [src.name]
    assert digest(src) == before


@pytest.mark.parametrize(
    ("name", "keep", "match"),
    [
        ("__0_0.distcp", -1, "__0_0.distcp: it has .* bytes of at least .*the checkpoint is damaged, restore it"),
        ("__0_0.distcp", None, "__0_0.distcp: no such file; the checkpoint is damaged"),
        (".metadata", -1, "full: its .metadata cannot be read"),
        (".metadata", 100, "full: its .metadata cannot be read"),
        (".metadata", 0, "full: its .metadata cannot be read .EOFError.; restore the checkpoint"),
        (".metadata", None, "full: no checkpoint here .*metadata is missing"),
    ],
)
def test_truncated_and_missing_files(full: Path, name: str, keep: int | None, match: str) -> None:
    content = (full / name).read_bytes()
    (full / name).unlink()
    if keep is not None:
        (full / name).write_bytes(content[:keep])
    _refused(full, match)


def _flips(content: bytes, step: int) -> Iterator[tuple[int, bytes]]:
    """Position -> the content with one bit flipped there."""
    draw = random.Random(1)
    for position in range(0, len(content), step):
        place = min(position + draw.randrange(step), len(content) - 1)
        yield place, content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]


def test_a_flipped_bit_is_refused_or_without_effect(full: Path) -> None:
    expected = {**entries(full), WEIGHT: gathered(weights(SMALL)["t"], [1, 2, 5])}
    (path,), slim = full.glob("*.distcp"), full.parent / "slim"
    content = path.read_bytes()
    values = {name: value.numpy().tobytes() for name, value in entries(full).items() if isinstance(value, Tensor)}
    within = {place for own in values.values() for place in range(content.index(own), content.index(own) + len(own))}
    assert len(within) == 6 * 8 * 4 + 8 * 4
    refused = passed = 0
    for place, flipped in [*_flips(content, 29), *((p, f) for p, f in _flips(content, 7) if p in within)]:
        path.write_bytes(flipped)
        try:
            sr.slim_checkpoint(full, slim, plan_of(SMALL))
        except sr.UserError as error:
            assert "damaged, restore it" in str(error), error
            refused += 1
        else:
            assert place not in within, place
            assert_same(entries(slim), expected)
            shutil.rmtree(slim)
            passed += 1
        assert [own.name for own in full.parent.iterdir()] == ["full"]
    assert refused > 60 and passed > 20  # zip files are padded


class _Touch:
    """What a pickle is that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def _change(full: Path, change: Callable[[Any], object]) -> None:
    """Changes the metadata of a checkpoint."""
    metadata = FileSystemReader(full).read_metadata()
    change(metadata)
    (full / ".metadata").write_bytes(pickle.dumps(metadata))


def test_metadata_of_any_class_is_not_loaded(full: Path) -> None:
    trap = full.parent / "trap"
    _change(full, lambda metadata: metadata.state_dict_metadata.update(evil=_Touch(trap)))
    _refused(
        full, r"its .metadata cannot be read \(it names posix.system, which is no part of .*restore the checkpoint"
    )
    (full / ".metadata").write_bytes(pickle.dumps([1]))
    _refused(full, r"its .metadata cannot be read \(it holds a list\)")
    assert not trap.exists()


def _rename(metadata: Any, index: MetadataIndex, path: str) -> None:
    info = metadata.storage_data[index]
    metadata.storage_data[index] = _StorageInfo(path, info.offset, info.length)


@pytest.mark.parametrize("path", ["../full/__0_0.distcp", "/etc/passwd", "..", ""])
def test_metadata_cannot_name_files_elsewhere(full: Path, path: str) -> None:
    index = MetadataIndex("over", torch.Size([0]))
    _change(full, lambda metadata: _rename(metadata, index, path))
    _refused(full, "metadata names the file|no such file")


@pytest.mark.parametrize(
    "change",
    [
        lambda metadata: metadata.storage_data.pop(MetadataIndex("over", torch.Size([0]))),
        lambda metadata: metadata.storage_data.pop(MetadataIndex(WEIGHT, torch.Size([0, 0]))),
        lambda metadata: metadata.storage_data.pop(MetadataIndex("epoch")),
        lambda metadata: setattr(metadata, "storage_data", None),
        lambda metadata: setattr(metadata, "state_dict_metadata", [3]),
        lambda metadata: _rename(metadata, MetadataIndex("epoch"), 3),  # type: ignore[arg-type]
        lambda metadata: metadata.state_dict_metadata[WEIGHT].chunks.append(
            ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([6, 8]))
        ),
        lambda metadata: metadata.state_dict_metadata[WEIGHT].chunks.clear(),
        lambda metadata: setattr(metadata.state_dict_metadata[WEIGHT].chunks[0], "sizes", torch.Size([6, 4])),
        lambda metadata: setattr(metadata.state_dict_metadata["over"], "chunks", None),
    ],
)
def test_metadata_that_contradicts_itself(full: Path, change: Callable[[Any], object]) -> None:
    _change(full, change)
    _refused(full, "restore")


def test_entries_that_are_no_tensors_are_copied_and_not_loaded(full: Path) -> None:
    trap, slim = full.parent / "trap", full.parent / "slim"
    dcp.save({WEIGHT: weights(SMALL)["t"], "evil": _Touch(trap)}, checkpoint_id=full)
    sr.slim_checkpoint(full, slim, plan_of(SMALL))
    assert not trap.exists()
    found = []
    for folder in (full, slim):
        info = FileSystemReader(folder).read_metadata().storage_data[MetadataIndex("evil")]
        content = (folder / info.relative_path).read_bytes()
        found.append(content[info.offset : info.offset + info.length])
    assert found[0] == found[1] and str(trap).encode() in found[0]


def test_plans_of_other_models(full: Path) -> None:
    _refused(full, "table u of the plan is not in the checkpoint", plan_of({**SMALL, "u": (6, 8, [])}))
    _refused(full, r"table t: the checkpoint holds \[6, 8\], the plan expects \[7, 8\]", plan_of({"t": (7, 8, [1])}))
    _refused(full, r"table t: the checkpoint holds \[6, 8\], the plan expects \[6, 16\]", plan_of({"t": (6, 16, [1])}))


def test_places_that_cannot_be(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(full)
    with pytest.raises(sr.UserError, match="slim: is inside of .*full, which is only read"):
        sr.slim_checkpoint(full, full / "slim", plan_of(SMALL))
    with pytest.raises(sr.UserError, match="full: exists already"):
        sr.slim_checkpoint(full, full, plan_of(SMALL))
    (full.parent / "file").touch()
    with pytest.raises(sr.UserError, match="file/.slim.converting: Not a directory; nothing was made"):
        sr.slim_checkpoint(full, full.parent / "file" / "slim", plan_of(SMALL))
    (full.parent / "file").unlink()
    (full.parent / "empty").mkdir()
    monkeypatch.chdir(full.parent / "empty")
    with pytest.raises(sr.UserError, match="name the folder or file to make"):
        sr.slim_checkpoint(full, ".", plan_of(SMALL))
    assert digest(full) == before and sorted(path.name for path in full.parent.iterdir()) == ["empty", "full"]
    sr.slim_checkpoint(full, full.parent / "empty", plan_of(SMALL))
    assert (full.parent / "empty" / ".metadata").exists()


def _huge(path: Path, rows: int) -> int:
    """Writes a tensor [rows, 128] that takes no room on the disk, as `torch.save` does; returns its length."""
    with FakeTensorMode():
        values = torch.empty(rows, 128)
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save({WEIGHT: values} if path.suffix == ".pt" else values, path)
    return path.stat().st_size


def test_a_disk_that_is_too_small_is_refused_before_the_first_byte(tmp_path: Path) -> None:
    rows = 1 << 33
    tables = {"t": (rows, 128, list(range(127)))}
    full = tmp_path / "full"
    full.mkdir()
    info = _StorageInfo("__0_0.distcp", 0, _huge(full / "__0_0.distcp", rows))
    chunk = ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([rows, 128]))
    entry = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size([rows, 128]), [chunk])
    result = WriteResult(MetadataIndex(WEIGHT, [0, 0]), info.length, info)
    FileSystemWriter(full).finish(Metadata({WEIGHT: entry}), [[result]])
    said = "the slim checkpoint needs 4,[0-9,]* bytes, and [0-9,]* are free; choose another place or free some"
    with pytest.raises(sr.UserError, match=said):
        sr.slim_checkpoint(full, tmp_path / "slim", plan_of(tables))
    _huge(tmp_path / "full.pt", rows)
    with pytest.raises(sr.UserError, match=r"the slim file needs 4,[0-9,]* bytes, and [0-9,]* are free"):
        sr.slim_checkpoint(tmp_path / "full.pt", tmp_path / "slim.pt", plan_of(tables))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "full.pt"]


FULL_DISK = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import torch, safetensors.torch
import sseds_rec.slim.checkpoint
from sseds_rec.cli import main
from tests.slim.checkpoints import plan_of

folder, limit = sys.argv[2], int(sys.argv[3])
plan_of().save(f"{folder}/plan.json")
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
for suffix in ("", ".pt", ".safetensors"):
    sys.argv = ["sseds", "slim", f"{folder}/full{suffix}", f"{folder}/slim{suffix}", "--plan", f"{folder}/plan.json"]
    try:
        main()
    except SystemExit as ended:
        assert ended.code == 2, ended
"""


def test_a_full_disk_ends_it_in_one_line(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = full_state()
    dcp.save(state, checkpoint_id=tmp_path / "full")
    torch.save(state["model"], tmp_path / "full.pt")
    save_file(state["model"], tmp_path / "full.safetensors")
    before = digest(tmp_path / "full")
    command = [sys.executable, "-W", "ignore", "-c", FULL_DISK, Path(__file__).parents[2], tmp_path, "3000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 3 and all(line.startswith("sseds: ") and "File too large" in line for line in lines), lines
    left = {"full", "full.pt", "full.safetensors", "plan.json"}
    assert {path.name for path in tmp_path.iterdir()} == left and digest(tmp_path / "full") == before
    sr.slim_checkpoint(tmp_path / "full", tmp_path / "slim", plan_of())
    assert_same(entries(tmp_path / "slim"), slim_entries(entries(tmp_path / "full")))
