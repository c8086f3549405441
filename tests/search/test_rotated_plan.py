"""Plans with rotations on disk: what is written is what is read, or refused in one line."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

import sseds_rec as sr
from sseds_rec.search.plan import TablePlan
from sseds_rec.search.rotation import Rotation
from tests.slim.rotations import draw_rotation

KEPT = {"path.to.a": [0, 3, 4, 5], "file": [], "c/d": list(range(8)), "plain": [1, 2]}


def _tables() -> dict[str, TablePlan]:
    return {
        name: TablePlan(rows=5, original_dim=8, kept=kept, embedding_dim=len(kept), stored_dim=-(-len(kept) // 4) * 4)
        for name, kept in KEPT.items()
    }


def _plan() -> sr.DimensionPlan:
    names = [name for name in KEPT if name != "plain"]
    rotations = {name: draw_rotation(8, seed).keep(KEPT[name]) for seed, name in enumerate(names)}
    rotations["c/d"] = Rotation(*(part.float() for part in vars(rotations["c/d"]).values()))
    return sr.DimensionPlan(tables=_tables(), budget={"dims": 0.5}, reached={}, rotations=rotations)


def test_rotations_are_read_as_they_were_written(tmp_path: Path) -> None:
    plan = _plan()
    plan.save(tmp_path / "plan.json")
    loaded = sr.DimensionPlan.load(tmp_path / "plan.json")
    assert loaded.tables == plan.tables and list(loaded.rotations) == list(plan.rotations)
    for name, rotation in plan.rotations.items():
        for part, value in vars(rotation).items():
            read = getattr(loaded.rotations[name], part)
            assert read.dtype == value.dtype and torch.equal(read, value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "plan.rotations.npz"]
    assert json.loads((tmp_path / "plan.json").read_text())["rotations"]["file"] == "plan.rotations.npz"


def test_a_plain_plan_leaves_nothing_of_a_rotated_one(tmp_path: Path) -> None:
    _plan().save(tmp_path / "plan.json")
    plain = sr.DimensionPlan(tables=_tables(), budget={"dims": 0.5}, reached={})
    plain.save(tmp_path / "plan.json")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    keys = ["version", "tables", "budget", "reached", "search"]
    assert list(json.loads((tmp_path / "plan.json").read_text())) == keys
    assert sr.DimensionPlan.load(tmp_path / "plan.json") == plain


def _refusal(path: Path) -> str:
    with pytest.raises(sr.UserError) as refused:
        sr.DimensionPlan.load(path)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_missing_or_changed_file_is_refused(tmp_path: Path) -> None:
    path, sidecar = tmp_path / "plan.json", tmp_path / "plan.rotations.npz"
    _plan().save(path)
    content = bytearray(sidecar.read_bytes())
    content[len(content) // 2] ^= 1
    sidecar.write_bytes(content)
    assert _refusal(path).startswith(f"{sidecar}: not the rotations that {path} was saved with")
    sidecar.unlink()
    assert _refusal(path).startswith(f"{sidecar}: no such file, but {path} needs its rotations")
    entries = json.loads(path.read_text())
    del entries["rotations"]["xxh3_64"]
    path.write_text(json.dumps(entries))
    assert _refusal(path).startswith(f"{path}: xxh3_64: Field required")


def _tamper(path: Path, **arrays: np.ndarray) -> None:
    """Gives the plan other rotations, with their right digest."""
    sidecar = path.with_name("plan.rotations.npz")
    with np.load(sidecar) as archive:
        content = io.BytesIO()
        np.savez(content, **{**archive, **{name.replace("__", "/"): value for name, value in arrays.items()}})
    sidecar.write_bytes(content.getvalue())
    entries = json.loads(path.read_text())
    entries["rotations"]["xxh3_64"] = xxhash.xxh3_64_hexdigest(content.getvalue())
    path.write_text(json.dumps(entries))


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        (
            {"file__mean": np.zeros(7)},
            r"table file: its rotation is of shapes \[\[8, 0\], \[8, 0\], \[7\]\], for 0 of 8 columns",
        ),
        ({"file__mean": np.full(8, np.nan)}, "table file: its rotation is not finite"),
        ({"file__mean": np.array([{}] * 8)}, "plan.rotations.npz: holds no rotations .*allow_pickle=False"),
        ({"x__mean": np.zeros(8)}, "plan.rotations.npz: holds no rotations .*x/forward"),
        (
            {"x__forward": np.zeros((8, 1)), "x__inverse": np.zeros((8, 1)), "x__mean": np.zeros(8)},
            "there is a rotation of table x, which the plan does not have",
        ),
    ],
)
def test_rotations_that_do_not_fit_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], said: str) -> None:
    _plan().save(tmp_path / "plan.json")
    _tamper(tmp_path / "plan.json", **arrays)
    with pytest.raises(sr.UserError, match=said):
        sr.DimensionPlan.load(tmp_path / "plan.json")


def test_tables_without_pooling_stay_without(tmp_path: Path) -> None:
    table = TablePlan(rows=5, original_dim=8, kept=[1, 2, 3, 4], embedding_dim=4, stored_dim=4, pooling="NONE")
    sr.DimensionPlan(tables={"a": table}, budget={}, reached={}).save(tmp_path / "plan.json")
    (config,) = sr.DimensionPlan.load(tmp_path / "plan.json").embedding_bag_configs()
    assert config.pooling.name == "NONE" and config.embedding_dim == 4
