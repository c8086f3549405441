"""Taps against autograd in an explicit α, row by row, for every embedding module and sharding."""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torchrec import KeyedJaggedTensor
from torchrec.modules.mc_modules import MCHManagedCollisionModule

from sseds_rec.errors import UserError
from tests.ranks import run_ranks
from tests.search.placed import load, shard
from tests.search.zoo import (
    ROWS,
    TABLES,
    Case,
    Click,
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
        Case(twice=True),
    ],
    ids=str,
)
def test_plain_modules(case: Case) -> None:
    assert_equal(_measured(case, plain_model(case), make_batch(case)), explicit(case))


def _counted(model: nn.Module) -> list[str]:
    """Everything that the maps from raw ids to rows remember."""
    found = []
    for module in model.modules():
        if isinstance(module, MCHManagedCollisionModule):
            state = vars(module) | module._buffers | module._history_metadata
            found += [str(v.tolist()) for v in state.values() if isinstance(v, torch.Tensor)]
            found += [str(v) for v in state.values() if isinstance(v, int)]
    return found


def _measured(case: Case, model: nn.Module, batch: Any) -> Found:
    if case.kind in ("mc", "mcec"):
        model.train()
        model(batch)  # counts ids
    before = _counted(model)
    found = measure(model, batch, mass=case.kind == "ebc")
    assert _counted(model) == before and bool(before) == (case.kind in ("mc", "mcec"))
    return found


def _on_rank(rank: int, world_size: int, case: Case, types: list[str], local: int | None) -> Found:
    with mock.patch.dict(os.environ, LOCAL_WORLD_SIZE=str(local or world_size)):
        model = shard(build(case, "meta"), dict(zip(TABLES, types, strict=True)), local)
    load(model, weights_of(case))
    fill_maps(model)
    return _measured(case, model, make_batch(case, *CUTS[world_size][rank]))


def _compare(world_size: int, case: Case, types: list[str], local: int | None = None) -> None:
    found = run_ranks(world_size, _on_rank, case, types, local)
    added = 1e-6 if "row_wise" in types[0] else 0  # by TorchRec, to the divisors of row-wise means
    for own, cut in zip(found, CUTS[world_size], strict=True):
        assert_equal(own, explicit(case, *cut, added))


@pytest.mark.parametrize("sharding", MIXED)
@pytest.mark.parametrize("case", [Case("ebc"), Case("ec"), Case("fp")], ids=str)
def test_sharded_on_two_ranks(case: Case, sharding: str) -> None:
    if case.kind == "ec" and sharding == "data_parallel":
        assert all("data-parallel tables of an EmbeddingCollection" in said for said in run_ranks(2, _refused_on_rank))
    else:
        _compare(2, case, [sharding] * 4)


def _refused_on_rank(rank: int, world_size: int) -> str:
    model = shard(build(Case("ec"), "meta"), dict.fromkeys(TABLES, "data_parallel"))
    with pytest.raises(UserError) as refused:
        measure(model, make_batch(Case("ec")))
    return str(refused.value)


@pytest.mark.parametrize(
    ("case", "types"),
    [
        (Case("ebc"), MIXED),
        (Case("ec"), ["table_wise", "row_wise", "column_wise", "row_wise"]),
        (Case("fp"), MIXED),
        (Case("mc"), ["row_wise"] * 4),
        (Case("mcec"), ["row_wise"] * 4),
        (Case(weighted=True), MIXED),
        (Case(twice=True), MIXED),
        (Case(pooling="MEAN"), ["row_wise"] * 4),
        (Case(pooling="MEAN"), ["table_wise", "column_wise", "data_parallel", "table_wise"]),
        (Case(repeats=True), ["table_wise", "row_wise", "column_wise", "row_wise"]),
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


class _Odd(Click):
    def look_up(self, features: KeyedJaggedTensor) -> Any:
        with torch.no_grad():
            found = self.embedding(features=features)
        found.values().mul_(2).div_(2)
        return found


def test_lookups_by_keyword_and_without_gradients_and_changes_in_place() -> None:
    model = _Odd(plain_model(Case()).embedding)
    model.load_state_dict(plain_model(Case()).state_dict())
    assert_equal(measure(model, make_batch(Case()), mass=True), explicit(Case()))


def _pooled_wrongly_on_rank(rank: int, world_size: int, weighted: bool) -> str:
    types = ["row_wise"] * 4 if weighted else MIXED
    case = Case(pooling="MEAN", weighted=weighted)
    model = shard(build(case, "meta"), dict(zip(TABLES, types, strict=True)))
    measure(model, make_batch(case))  # as TorchRec pools it
    with pytest.raises(UserError) as refused:
        measure(model, make_batch(case), mass=True)
    return str(refused.value)


@pytest.mark.parametrize("weighted", [False, True])
def test_means_that_torchrec_divides_otherwise_than_unsharded_are_refused_where_that_counts(weighted: bool) -> None:
    (said,) = run_ranks(1, _pooled_wrongly_on_rank, weighted)
    assert said.startswith("table t0: TorchRec pools it wrongly") and "shard no table of it row-wise" in said
