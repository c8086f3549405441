"""Small checkpoints, plans of them, and what becomes of them by plain indexing, for the tests of offline conversions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

import sseds_rec as sr
from sseds_rec.search.plan import TablePlan
from sseds_rec.search.rotation import Rotation
from sseds_rec.slim.offline import dcp as folders
from sseds_rec.slim.offline import state_file, stored

#: Table -> (rows, columns, kept columns). `b` is dropped and `e` is kept as it is.
TABLES: dict[str, tuple[int, int, list[int]]] = {
    "a": (5, 8, [0, 3, 4, 7]),
    "b": (40, 8, []),
    "c": (64, 16, [1, 2, 5, 11, 15]),
    "d": (33, 32, [30]),
    "e": (20, 8, list(range(8))),
}


def plan_of(
    tables: Mapping[str, tuple[int, int, Sequence[int]]] = TABLES, rotations: Mapping[str, Rotation] | None = None
) -> sr.DimensionPlan:
    """A plan that keeps these columns."""
    own = {
        name: TablePlan(
            rows=rows, original_dim=d, kept=list(kept), embedding_dim=len(kept), stored_dim=-(-len(kept) // 4) * 4
        )
        for name, (rows, d, kept) in tables.items()
    }
    return sr.DimensionPlan(tables=own, budget={}, reached={}, rotations=dict(rotations or {}))


def weights(
    tables: Mapping[str, tuple[int, int, Sequence[int]]] = TABLES, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    """Table -> random numbers [rows, columns]."""
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(rows, d, generator=draw).to(dtype) for name, (rows, d, _) in tables.items()}


def gathered(table: Tensor, kept: Sequence[int]) -> Tensor:
    """The kept columns, and zeros up to a multiple of 4."""
    return torch.nn.functional.pad(table[:, list(kept)], (0, -len(kept) % 4))


def entries(folder: Path) -> dict[str, Any]:
    """Everything in a DCP folder, read by torch."""
    found: dict[str, Any] = {}
    for name, entry in FileSystemReader(folder).read_metadata().state_dict_metadata.items():
        tensor = isinstance(entry, TensorStorageMetadata)
        found[name] = torch.full(entry.size, 7).to(entry.properties.dtype) if tensor else None
    dcp.load(found, checkpoint_id=folder)
    return found


def assert_same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """That both hold the same things, to the bit."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        own = found[name]
        if isinstance(value, Tensor):
            assert own.dtype == value.dtype and own.shape == value.shape and torch.equal(own, value), name
        else:
            assert own == value, name


def digest(path: Path) -> dict[str, str]:
    """File -> hash of its bytes, of a folder or of one file."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def full_state(seed: int = 0) -> dict[str, Any]:
    """What a training saves: tables, Adam's moments of one, row-wise state of another, dense weights."""
    own = weights(seed=seed)
    draw = torch.Generator().manual_seed(seed + 1)
    moments = {
        "ebc.embedding_bags.c.weight": {
            "exp_avg": torch.randn(64, 16, generator=draw),
            "exp_avg_sq": torch.rand(64, 16, generator=draw),
            "step": torch.tensor(5.0),
        },
        "ebc.embedding_bags.d.weight": {"d.momentum1": torch.rand(33, generator=draw)},
    }
    return {
        "model": {
            **{f"ebc.embedding_bags.{name}.weight": value for name, value in own.items()},
            "over.weight": torch.randn(12, 30, generator=draw),
            "over.count": torch.tensor(3),
        },
        "optimizer": {"state": moments},
        "epoch": 3,
        "notes": ["x", {"y": 1}],
    }


def slim_entries(found: Mapping[str, Any]) -> dict[str, Any]:
    """What must become of the entries of `full_state` under `plan_of()`."""
    expected = {}
    for name, value in found.items():
        (table,) = [t for t in TABLES if f".{t}.weight" in name] or [""]
        rows, d, kept = TABLES.get(table, (0, 0, [0]))
        if not kept:
            continue
        cut = isinstance(value, Tensor) and value.shape == (rows, d)
        expected[name] = gathered(value, kept) if cut else value
    return expected


_CONSTANTS = {
    (folders, "_CHUNK_BYTES"): 160,
    (folders, "_SOURCE_BYTES"): 700,
    (folders, "_PART_BYTES"): 900,
    (stored, "_READ_BYTES"): 256,
    (state_file, "_CHUNK_BYTES"): 160,
}


@contextmanager
def small_parts() -> Iterator[None]:
    """Has small tables make dozens of parts, in this process."""
    before = {key: getattr(*key) for key in _CONSTANTS}
    for (module, name), value in _CONSTANTS.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name), value in before.items():
            setattr(module, name, value)
