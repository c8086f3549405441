"""Elements of sharded tables: which are pruned, that they stay so, and what is left of them, against numpy and scipy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import Tensor, nn

from sseds_rec.search.elements import Elements, Mask, Stored, summary
from sseds_rec.training.optimizers import fuse_table_optimizer
from tests.ranks import run_ranks
from tests.search.placed import load, shard
from tests.search.zoo import DIM, TABLES, Case, build, make_batch

SHAPES = {name: (rows, DIM) for name, (rows, _) in TABLES.items()}
TOTAL = sum(rows * columns for rows, columns in SHAPES.values())
MIXED = ("row_wise", "column_wise", "table_wise", "data_parallel")
PLACES = {"data_parallel": ("data_parallel",) * 4, "table_wise": ("table_wise",) * 4, "mixed": MIXED}
Tables = dict[str, np.ndarray]


def _weights(distinct: bool) -> Tables:
    """Normal numbers of all magnitudes, or a few magnitudes that most elements share; no zeros."""
    random = np.random.default_rng(3)

    def draw(shape: tuple[int, int]) -> np.ndarray:
        normal = random.normal(size=shape) * np.exp(random.normal(size=shape, scale=4))
        coarse = random.integers(1, 5, shape) * random.choice([-0.25, 0.25], shape)
        return (normal if distinct else coarse).astype(np.float32)

    return {name: draw(shape) for name, shape in SHAPES.items()}


def _sharded(kinds: tuple[str, ...], optimizer: str, weights: Tables) -> nn.Module:
    model, places = build(Case(), "meta"), dict(zip(TABLES, kinds, strict=True))
    alone = [table for table, kind in places.items() if kind == "data_parallel"]
    if len(alone) < len(places):
        fuse_table_optimizer(model, optimizer, 0.1, "auto", alone)  # type: ignore[arg-type]
    sharded = shard(model, places)
    with torch.no_grad():
        load(sharded, {f"embedding.embedding_bags.{name}.weight": torch.tensor(w) for name, w in weights.items()})
    return sharded


def _pieces(model: nn.Module) -> list[tuple[str, int, int, np.ndarray]]:
    """Table, first row, first column and values of what this rank holds."""
    found = []
    for name, value in model.state_dict().items():
        if ".embedding_bags." not in name:
            continue
        table = name.split(".")[-2]
        if isinstance(value, Tensor) and not hasattr(value, "local_shards"):
            found.append((table, 0, 0, value.numpy().copy()))
        else:
            found += [(table, *s.metadata.shard_offsets, s.tensor.numpy().copy()) for s in value.local_shards()]
    return found


def _whole(ranks: list[list[tuple[str, int, int, np.ndarray]]]) -> Tables:
    """The tables that the ranks hold parts of; what several hold must be equal."""
    tables = {name: np.full(shape, np.nan, np.float32) for name, shape in SHAPES.items()}
    for table, row, column, values in (piece for pieces in ranks for piece in pieces):
        place = tables[table][row : row + values.shape[0], column : column + values.shape[1]]
        assert np.isnan(place).all() or np.array_equal(place, values)
        place[:] = values
    return tables


def _pruned(rank: int, world_size: int, kinds: tuple[str, ...], optimizer: str, distinct: bool, keeps: Any) -> Any:
    found = []
    for keep in keeps:
        model = _sharded(kinds, optimizer, _weights(distinct))
        elements = Elements(model)
        elements.keep_largest(keep)
        found.append((_pieces(model), elements.total, elements.stored()))
    return found


@pytest.mark.parametrize("distinct", [True, False], ids=["distinct", "ties"])
@pytest.mark.parametrize(
    ("ranks", "place", "optimizer"),
    [
        (1, "data_parallel", "adagrad"),
        (1, "table_wise", "rowwise_adagrad"),
        (2, "data_parallel", "adagrad"),
        (2, "mixed", "adagrad"),
    ],
)
def test_the_largest_stay_and_their_number_is_exact(ranks: int, place: str, optimizer: str, distinct: bool) -> None:
    keeps = [0, 1, 7, TOTAL // 20, TOTAL // 2, TOTAL - 1, TOTAL]
    before = _weights(distinct)
    flat = np.concatenate([table.ravel() for table in before.values()])
    answers = run_ranks(ranks, _pruned, PLACES[place], optimizer, distinct, keeps)
    for keep, *of_ranks in zip(keeps, *answers, strict=True):
        after = _whole([pieces for pieces, _, _ in of_ranks])
        kept = np.concatenate([table.ravel() for table in after.values()])
        assert np.count_nonzero(kept) == keep
        assert np.array_equal(kept[kept != 0], flat[kept != 0])
        border = np.sort(np.abs(flat))[TOTAL - keep - 1] if keep < TOTAL else 0  # the largest that goes
        assert (kept[np.abs(flat) > border] != 0).all() and (kept[np.abs(flat) < border] == 0).all()
        for _, total, stored in of_ranks:
            assert total == TOTAL
            assert {name: one.nonzeros for name, one in stored.items()} == {
                name: np.count_nonzero(table) for name, table in after.items()
            }


def _trained(rank: int, world_size: int, kinds: tuple[str, ...], optimizer: str) -> Any:
    model = _sharded(kinds, optimizer, _weights(True))
    elements = Elements(model)
    elements.keep_largest(TOTAL // 2)
    mask, before = Mask(elements), _pieces(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    dense = torch.optim.Adam(parameters, lr=0.1) if "data_parallel" in kinds else torch.optim.SGD(parameters, lr=0.1)
    batch = make_batch(Case(), 20 * rank, 20 * rank + 20)
    came_back = 0
    for _ in range(4):
        dense.zero_grad()
        model(batch)[0].backward()
        dense.step()
        came_back += sum(
            int(((now != 0) & (then == 0)).sum()) for (*_, now), (*_, then) in zip(_pieces(model), before, strict=True)
        )
        mask.apply()
    return before, _pieces(model), came_back


@pytest.mark.parametrize(("place", "optimizer"), [("data_parallel", "adagrad"), ("mixed", "adagrad")])
def test_nothing_masked_comes_back_on_two_ranks(place: str, optimizer: str) -> None:
    answers = run_ranks(2, _trained, PLACES[place], optimizer)
    before, after = (_whole([answer[i] for answer in answers]) for i in (0, 1))
    assert sum(answer[2] for answer in answers) > 100  # without a mask it would have
    for name, table in before.items():
        assert (after[name][table == 0] == 0).all() and (after[name][table != 0] != table[table != 0]).any()


def test_bytes_are_those_of_scipys_arrays() -> None:
    random = np.random.default_rng(0)
    tables = {}
    for name, rows, columns, density in (("a", 50, 16, 0.1), ("b", 7, 300, 0.9), ("c", 3, 4, 0.0)):
        dense = np.where(random.random((rows, columns)) < density, 1, 0).astype(np.float32)
        sparse = scipy.sparse.csr_array(dense)
        stored = tables[name] = Stored(rows, columns, np.count_nonzero(dense))
        assert stored.dense_bytes == dense.nbytes
        assert stored.csr_bytes == sparse.data.nbytes + sparse.indices.nbytes + sparse.indptr.nbytes
    assert summary(tables)["csr_bytes"] == sum(one.csr_bytes for one in tables.values())
    assert Stored(10, 2**30, 2**31).csr_bytes == 2**31 * (4 + 8) + 11 * 8
