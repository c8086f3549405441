"""Live models slimmed as they are: placements, optimizers, names and pipelines are those of the original."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchrec.optim
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import LazyAwaitable

import sseds_rec as sr
from tests.ranks import run_ranks
from tests.search import placed
from tests.slim.moves import plan_keeping
from tests.slim.shared import CUTS, Wrapped, make_features, make_share, pooled, sequences

PLACES = {"first": "table_wise", "second": "row_wise", "third": "column_wise"}
RATES = {"first": 0.3, "second": 0.1, "third": 0.02}
EPS = 1e-2
FUSED = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.3, "eps": EPS}


def build(kind: str, device: str = "cpu") -> Wrapped:
    return pooled(device=device) if kind == "ebc" else sequences(device=device)


def shard_like(kind: str, model: nn.Module, by_table: bool) -> DistributedModelParallel:
    """With row-wise Adagrad, given to each table, or to the sharders."""
    if by_table:
        for name, parameter in model.named_parameters():
            rate = RATES[name.split(".")[-2]]
            apply_optimizer_in_backward(torchrec.optim.RowWiseAdagrad, [parameter], {"lr": rate, "eps": EPS})
    return placed.shard(model, PLACES, fused_params=None if by_table else FUSED)


def loss_of(found: Any) -> Tensor:
    """Another slope for every key, row and column."""
    found = found.wait() if isinstance(found, LazyAwaitable) else found
    parts = [found[key] if isinstance(found[key], Tensor) else found[key].values() for key in found.keys()]
    return sum(((i + 1) * own + own.square()).sum() for i, own in enumerate(parts))  # type: ignore[return-value]


def pieces(model: nn.Module) -> list[tuple[str, int, int, Tensor]]:
    """(name, first row, first column, values) of what this rank holds of the tables."""
    return [
        (name, *part.metadata.shard_offsets, part.tensor.clone())
        for name, value in model.state_dict().items()
        if hasattr(value, "local_shards")
        for part in value.local_shards()
    ]


def _trained(rank: int, world_size: int, kind: str, by_table: bool) -> tuple[list[Any], dict[str, Any]]:
    full = shard_like(kind, build(kind, "meta"), by_table)
    placed.load(full, dict(build(kind).named_parameters()))
    slim = sr.slim(full, plan_keeping(build(kind), CUTS[0]))
    types = {t: own.sharding_type for plan in slim.plan.plan.values() for t, own in plan.items()}
    for _ in range(2):
        loss_of(slim(make_share(rank, world_size))).backward()
    return pieces(slim), types


@pytest.mark.parametrize("by_table", [True, False])
@pytest.mark.parametrize("kind", ["ebc", "ec"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_tables_keep_their_places_and_their_optimizers(world_size: int, kind: str, by_table: bool) -> None:
    """Two steps of row-wise Adagrad, written out."""
    model = build(kind)
    expected = sr.slim(model, plan_keeping(model, CUTS[0]))
    tables = {name: p for name, p in expected.named_parameters() if name.endswith(".weight")}
    sums = {name: torch.zeros(len(p)) for name, p in tables.items()}
    for _ in range(2):
        loss = sum(loss_of(expected(make_share(rank, world_size))) for rank in range(world_size)) / world_size
        for (name, p), own in zip(tables.items(), torch.autograd.grad(loss, list(tables.values())), strict=True):
            sums[name] += own.square().mean(dim=1)
            rate = RATES[name.split(".")[-2]] if by_table else FUSED["learning_rate"]
            p.data -= rate * own / (sums[name].sqrt() + EPS)[:, None]
    weights = {name: value for name, value in expected.state_dict().items() if name.endswith(".weight")}
    seen = dict.fromkeys(weights, 0)
    for parts, types in run_ranks(world_size, _trained, kind, by_table):
        assert types == PLACES
        for name, row, column, values in parts:
            rows, columns = values.shape
            own = weights[name][row : row + rows, column : column + columns]
            torch.testing.assert_close(values, own, rtol=1e-5, atol=1e-6)
            seen[name] += values.numel()
    assert seen == {name: value.numel() for name, value in weights.items()}
