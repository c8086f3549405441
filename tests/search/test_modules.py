"""Taps against autograd in an explicit α, row by row, for every embedding module and sharding."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import nn
from torchrec.modules.mc_modules import MCHManagedCollisionModule

from sseds_rec.errors import UserError
from tests.ranks import run_ranks
from tests.search.placed import load, shard
from tests.search.zoo import (
    ROWS,
    TABLES,
    Case,
    Found,
    assert_equal,
    build,
    explicit,
    fill_maps,
    make_batch,
    measure,
    plain_model,
    weights_of,
)

#: Ranks -> rows of each: uneven.
CUTS = {1: [(0, ROWS)], 2: [(0, 25), (25, ROWS)], 4: [(0, 5), (5, 20), (20, 31), (31, ROWS)]}
MIXED = ["table_wise", "row_wise", "column_wise", "data_parallel"]
KINDS = ("ebc", "ec", "fp", "mc", "mcec")


@pytest.mark.parametrize(
    "case",
    [
        *map(Case, KINDS),
        Case(pooling="MEAN"),
        Case(weighted=True),
        Case(repeats=True),
        Case(pooling="MEAN", repeats=True),
    ],
    ids=str,
)
def test_plain_modules(case: Case) -> None:
    assert_equal(measure(plain_model(case), make_batch(case), mass=case.kind == "ebc"), explicit(case))


def _counted(model: nn.Module) -> list[Any]:
    """Everything that a map from raw ids to rows remembers."""
    found = []
    for module in model.modules():
        if isinstance(module, MCHManagedCollisionModule):
            state = vars(module) | module._buffers | module._history_metadata
            found += [value.clone() if isinstance(value, torch.Tensor) else value for value in state.values()]
    return [value for value in found if isinstance(value, (torch.Tensor, int))]


def _on_rank(rank: int, world_size: int, case: Case, types: list[str], local: int | None) -> Found:
    os.environ["LOCAL_WORLD_SIZE"] = str(local or world_size)
    model = shard(build(case, "meta"), dict(zip(TABLES, types, strict=True)), local)
    load(model, weights_of(case))
    fill_maps(model)
    batch = make_batch(case, *CUTS[world_size][rank])
    if case.kind in ("mc", "mcec"):
        model.train()
        model(batch)  # counts ids
    before = _counted(model)
    found = measure(model, batch, mass=case.kind == "ebc")
    for old, new in zip(before, _counted(model), strict=True):
        assert torch.equal(old, new) if isinstance(old, torch.Tensor) else old == new
    assert bool(before) == (case.kind in ("mc", "mcec"))
    return found


def _compare(world_size: int, case: Case, types: list[str], local: int | None = None) -> None:
    found = run_ranks(world_size, _on_rank, case, types, local)
    for own, cut in zip(found, CUTS[world_size], strict=True):
        assert_equal(own, explicit(case, *cut))


#: FBGEMM's dense kernel, of data-parallel tables, pools sequences on a CPU (pytorch/FBGEMM#4586): a bag of one id it cannot spoil.
ONE_ID = Case("ec", single=True)


@pytest.mark.parametrize("sharding", [*MIXED, "mixed"])
@pytest.mark.parametrize("case", [Case("ebc"), Case("ec"), Case("fp")], ids=str)
def test_sharded_on_two_ranks(case: Case, sharding: str) -> None:
    case = ONE_ID if case.kind == "ec" and sharding in ("data_parallel", "mixed") else case
    _compare(2, case, MIXED if sharding == "mixed" else [sharding] * 4)


@pytest.mark.parametrize(
    ("case", "types"),
    [
        (Case("mc"), ["row_wise"] * 4),
        (Case("mcec"), ["row_wise"] * 4),
        (Case(weighted=True), MIXED),
        (Case(pooling="MEAN"), ["row_wise"] * 4),
        (Case(pooling="MEAN"), ["table_wise", "column_wise", "data_parallel", "table_wise"]),
        (Case(repeats=True), MIXED),
        (Case(repeats=True, pooling="MEAN"), ["row_wise"] * 4),
        (Case("ec", repeats=True), ["table_wise", "row_wise", "column_wise", "row_wise"]),
    ],
    ids=str,
)
def test_what_else_sharded_modules_do(case: Case, types: list[str]) -> None:
    _compare(2, case, types)


@pytest.mark.parametrize(
    ("case", "types", "local"),
    [
        (Case("ebc"), MIXED, None),
        (Case("ebc"), ["table_row_wise", "table_column_wise"] * 2, 2),
        (Case(pooling="MEAN"), ["table_row_wise"] * 4, 2),
        (Case("ec"), ["table_wise", "row_wise", "column_wise", "row_wise"], None),
        (Case("fp"), MIXED, None),
        (Case("mc"), ["row_wise"] * 4, None),
        (Case("mcec"), ["row_wise"] * 4, None),
    ],
    ids=str,
)
def test_four_ranks(case: Case, types: list[str], local: int | None) -> None:
    _compare(4, case, types, local)


@pytest.mark.parametrize("case", [Case("ebc"), Case("fp")], ids=str)
def test_sharded_on_one_rank(case: Case) -> None:
    _compare(1, case, MIXED)
