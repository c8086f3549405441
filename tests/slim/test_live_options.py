"""Live models slimmed as they are: placements, optimizers, names and pipelines are those of the original."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchrec.optim
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import LazyAwaitable, ShardingEnv

import sseds_rec as sr
from tests.ranks import run_ranks
from tests.search import placed
from tests.slim.moves import mask, plan_keeping
from tests.slim.shared import CUTS, Wrapped, make_features, make_share, pooled, projected, rotated, sequences

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
    parts = [found[key] if isinstance(found[key], Tensor) else found[key].values() for key in list(found.keys())]
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


MOVES = [
    (["table_wise", "row_wise", "column_wise"], ["row_wise", "column_wise", "table_wise"]),
    (["column_wise", "table_wise", "row_wise"], ["data_parallel", "row_wise", "column_wise"]),
]


def _rotated(rank: int, world_size: int, kept: dict[str, list[int]], sources: list[str], targets: list[str]) -> Tensor:
    full = placed.shard(pooled(device="meta"), dict(zip(PLACES, sources, strict=True)))
    placed.load(full, dict(pooled().named_parameters()))
    types = {t: own for t, own in zip(PLACES, targets, strict=True) if kept[t]}
    plan = rotated(plan_keeping(pooled(), kept), "first", "third")
    slim = sr.slim(full, plan, shard=lambda tree: placed.shard(tree, types))
    found = slim(make_share(rank, world_size))
    loss_of(found).backward()
    return found.values().detach()


@pytest.mark.parametrize("kept", [CUTS[0], CUTS[2], {name: [] for name in PLACES}], ids=str)
@pytest.mark.parametrize(("sources", "targets"), MOVES)
def test_rotated_tables_from_shard_to_shard(kept: dict[str, list[int]], sources: list[str], targets: list[str]) -> None:
    model = pooled()
    expected = projected(model, rotated(plan_keeping(model, kept), "first", "third"), kept)(make_features()).values()
    found = torch.cat(run_ranks(2, _rotated, kept, sources, targets))
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


class Several(nn.Module):
    """Two collections whose tables have equal names, one of them at two paths, and a sequence."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.left, self.right = pooled(device=device).embedding, pooled(device=device).embedding
        self.sequence = sequences(device=device).embedding
        self.tower = nn.ModuleDict({"again": self.left})
        torch.manual_seed(0)
        self.over = nn.Linear(8, 1)

    def forward(self, features: Any) -> Tensor:
        pooled_rows = [module(features) for module in (self.left, self.right, self.tower["again"])]
        columns = [own[key] for own in pooled_rows for key in ("a@first", "b", "a@second", "c")]
        found = self.sequence(features)
        columns += [
            torch.stack([rows.sum(dim=0) for rows in found[key].to_dense()])
            for key in ("a@first", "b", "a@second", "c")
        ]
        return self.over(torch.stack(columns, dim=1)).tanh().squeeze(2)


def _kept(left: dict[str, list[int]], right: dict[str, list[int]], sequence: dict[str, list[int]]) -> Any:
    parts = {"left": left, "right": right, "sequence": sequence}
    return {f"{path}.{name}": own for path, kept in parts.items() for name, own in kept.items()}


NOTHING: dict[str, list[int]] = {name: [] for name in PLACES}
SEVERAL = [
    (CUTS[0], CUTS[1], CUTS[2]),
    (NOTHING, CUTS[0], NOTHING),
    (CUTS[3], NOTHING, CUTS[0]),
    (NOTHING, NOTHING, NOTHING),
]


def _several(rank: int, world_size: int, cuts: Any) -> tuple[Tensor, list[str]]:
    full = placed.shard(Several("meta"), PLACES)
    placed.load(full, Several().state_dict())
    slim = sr.slim(full, plan_keeping(Several("meta"), _kept(*cuts)))
    first = slim(make_share(rank, world_size))
    dense = torch.optim.SGD([p for name, p in slim.named_parameters() if ".embedding" not in name], lr=0.05)
    losses = []
    for _ in range(3):
        dense.zero_grad()
        loss = (slim(make_share(rank, world_size)) - 0.5).square().sum()
        loss.backward()
        dense.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    return first.detach(), [name for name in slim.state_dict() if "transforms" not in name]


@pytest.mark.parametrize("cuts", SEVERAL)
def test_collections_of_which_nothing_is_left(cuts: Any) -> None:
    model = Several()
    masked = Several()
    for path, own in zip(("left", "right", "sequence"), cuts, strict=True):
        mask(masked.get_submodule(path), own)
    answers = run_ranks(2, _several, cuts)
    torch.testing.assert_close(
        torch.cat([found for found, _ in answers]), masked(make_features()).detach(), rtol=0, atol=1e-6
    )
    kept = _kept(*cuts) | {f"tower.again.{name}": own for name, own in cuts[0].items()}
    expected = {name for name in model.state_dict() if not _dropped(name, kept)}
    for _, names in answers:
        assert set(names) == expected and len(names) == len(expected)


def _dropped(name: str, kept: dict[str, list[int]]) -> bool:
    """Whether this is a table of no column."""
    plain = name.removesuffix(".weight").replace(".embedding_bags.", ".").replace(".embeddings.", ".")
    return not kept.get(plain, [0])


def _refusals(rank: int, world_size: int) -> dict[str, str]:
    full = placed.shard(pooled(device="meta"), PLACES)
    plan = plan_keeping(pooled(), CUTS[0])
    env = ShardingEnv(world_size, rank, dist.GroupMember.WORLD, output_dtensor=True)
    tensors = DistributedModelParallel(pooled(device="meta"), env, full.device, full.plan, full.sharders)
    by_row = {name: "row_wise" for name in PLACES}
    plain_sharders = placed.shard(pooled(device="meta"), by_row)
    plain_sharders.sharders = [EmbeddingBagCollectionSharder()]  # which leave row-wise out on CPU
    other = plan.model_copy(update={"tables": {**plan.tables, "more": plan.tables["first"]}})
    asked = {
        "module": (full.module, plan, None),
        "dtensor": (tensors, plan, None),
        "unplaced": (plain_sharders, plan, None),
        "other": (full, other, None),
        "unsharded": (pooled(), plan, lambda tree: tree),
    }
    answers = {}
    for name, (model, own, shard) in asked.items():
        try:
            sr.slim(model, own, shard=shard)
        except sr.UserError as error:
            answers[name] = str(error)
    return answers


def test_refusals_are_one_line_on_every_rank() -> None:
    first, second = run_ranks(2, _refusals)
    assert first == second and not any("\n" in message for message in first.values())
    assert first["module"] == "Wrapped holds sharded tables; give slim() the DistributedModelParallel around it"
    assert first["dtensor"].startswith(
        "embedding.embedding_bags.first.weight is a DTensor; slim() moves TorchRec's Shar"
    )
    assert first["unplaced"].startswith(
        "no plan splits the slim tables as those of the model are; give slim() shard= (No av"
    )
    assert first["other"] == "table more is in the plan only; the plan is of another model"
    assert first["unsharded"] == "shard= is for a model that is sharded; shard what slim() returns"
