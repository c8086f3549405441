"""Sets whose sequences carry a weight per id: scores against plain PyTorch with an explicit α, and slim models, which keep it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

import sseds_rec as sr
from sseds_rec.data.batch import Batch
from sseds_rec.data.schema import Field, Schema, Split
from sseds_rec.distributed.runtime import Runtime
from sseds_rec.distributed.sharding import ShardingConfig, shard
from sseds_rec.models import ModelConfig, build_model, build_slim_model, plan_for
from sseds_rec.models.ticket import load_ticket
from sseds_rec.search.scores import DimensionScores, Table
from sseds_rec.training.optimizers import fuse_table_optimizer
from tests.models.plain import explicit_scores, fill_tables, plain_deepfm
from tests.ranks import run_ranks

ROWS = {"user": 40, "tags": 25, "history": 30}
COUNT, D = 48, 8
MODEL = ModelConfig(embedding_dim=D, hidden=[16, 8])


def _schema(weights: str | None = "tag_weights") -> Schema:
    fields = [
        Field(name="user", kind="categorical", transform="vocabulary", cardinality=ROWS["user"], min_count=1),
        Field(
            name="tags", kind="sequence", transform="vocabulary", cardinality=ROWS["tags"], min_count=1, weights=weights
        ),
        Field(name="history", kind="sequence", transform="vocabulary", cardinality=ROWS["history"], min_count=1),
    ]
    splits = {name: Split(rows=0, positives=0, files=[]) for name in ("train", "validation", "test")}
    return Schema(label="click", fields=fields, seed=0, source={}, splits=splits)  # type: ignore[arg-type]


def _bags() -> dict[str, list[tuple[list[int], list[float]]]]:
    """Field -> per row its ids and their weights: one id of weight 1, any weights (or no id), and 1/length for a mean."""
    random = torch.Generator().manual_seed(1)
    bags: dict[str, list[tuple[list[int], list[float]]]] = {name: [] for name in ROWS}
    for _ in range(COUNT):
        for name, rows in ROWS.items():
            length = 1 if name == "user" else int(torch.randint(0, 4, (), generator=random))
            ids = torch.randint(0, rows, (length,), generator=random).tolist()
            drawn = (3 * torch.randn(length, generator=random)).tolist()
            weights = {"user": [1.0], "tags": drawn, "history": [1 / max(length, 1)] * length}
            bags[name].append((ids, weights[name]))
    return bags


def _labels() -> Tensor:
    return (torch.rand(COUNT, generator=torch.Generator().manual_seed(3)) > 0.5).float()


def _batch(first: int, last: int) -> Batch:
    bags = [bag for field in _bags().values() for bag in field[first:last]]
    sparse = KeyedJaggedTensor(
        keys=list(ROWS),
        values=torch.tensor([i for ids, _ in bags for i in ids]),
        weights=torch.tensor([w for _, weights in bags for w in weights]),
        lengths=torch.tensor([len(ids) for ids, _ in bags], dtype=torch.int32),
    )
    return Batch(dense=torch.empty(last - first, 0), sparse=sparse, labels=_labels()[first:last])


def _tables() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(2)
    return {name: 0.5 * torch.randn(rows, D, generator=random) for name, rows in ROWS.items()}


def _pooled(tables: dict[str, Tensor]) -> dict[str, Tensor]:
    """Field -> Σ weight · row [COUNT, D], bag by bag."""
    return {
        name: torch.stack(
            [(table[ids] * torch.tensor(weights, dtype=table.dtype)[:, None]).sum(0) for ids, weights in _bags()[name]]
        )
        for name, table in tables.items()
    }


def _own_batch(rank: int, world_size: int) -> Batch:
    cut = 30 if world_size == 2 else COUNT
    return _batch(0, cut) if rank == 0 else _batch(cut, COUNT)


def _scores_on_rank(
    rank: int, world_size: int, criterion: str, placement: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    model = build_model(MODEL, _schema())
    fuse_table_optimizer(model, "rowwise_adagrad", 0.1, placement)  # type: ignore[arg-type]
    config = ShardingConfig(type=placement)  # type: ignore[arg-type]
    sharded = shard(model, config, Runtime(rank, world_size, torch.device("cpu")), COUNT)
    fill_tables(sharded, _tables())
    return dict(sr.score_dimensions(sharded, [_own_batch(rank, world_size)], criterion)), {
        name: value.clone() for name, value in sharded.state_dict().items() if name.startswith("over.")
    }


@pytest.mark.parametrize(
    ("world_size", "placement"),
    [(1, "auto"), (2, "auto"), (2, "row_wise"), (2, "column_wise"), (1, "data_parallel"), (2, "data_parallel")],
)
@pytest.mark.parametrize("criterion", ["snip", "ggn"])
def test_scores_equal_explicit_alpha_on_a_plain_copy(world_size: int, placement: str, criterion: str) -> None:
    answers = run_ranks(world_size, _scores_on_rank, criterion, placement)
    plain = build_model(MODEL, _schema()).over.double()
    plain.load_state_dict({name.removeprefix("over."): value.double() for name, value in answers[0][1].items()})
    alpha = {name: torch.ones(D, dtype=torch.float64, requires_grad=True) for name in ROWS}
    fields = _pooled({name: table.double() * alpha[name] for name, table in _tables().items()})
    logits = plain_deepfm(plain, torch.empty(COUNT, 0).double(), fields)  # type: ignore[arg-type]
    expected = explicit_scores(logits, _labels().double(), alpha, criterion)
    for scores, _ in answers:
        for name, values in expected.items():
            torch.testing.assert_close(scores[name], values, rtol=1e-5, atol=1e-10)


def test_without_weights_sequences_are_averaged_by_their_table() -> None:
    plain = build_model(MODEL, _schema(weights=None)).embeddings
    assert not plain.is_weighted()
    assert {c.name: c.pooling.name for c in plain.embedding_bag_configs()} == {
        "user": "SUM",
        "tags": "MEAN",
        "history": "MEAN",
    }


def _plan() -> sr.DimensionPlan:
    random = torch.Generator().manual_seed(5)
    drawn = {name: torch.rand(D, generator=random, dtype=torch.float64) for name in ROWS}
    configs = build_model(MODEL, _schema()).embeddings.embedding_bag_configs()
    tables = {c.name: Table(c.num_embeddings, c.embedding_dim, tuple(c.feature_names), c.pooling.name) for c in configs}
    return sr.allocate(DimensionScores(drawn, tables, {}), sr.Budget(dims=0.67))


def _mask(plan: sr.DimensionPlan, name: str) -> Tensor:
    mask = torch.zeros(D)
    mask[plan.tables[name].kept] = 1
    return mask


def _slim_logits_on_rank(rank: int, world_size: int, folder: str, placement: str) -> tuple[Tensor, list[float]]:
    plan = plan_for(MODEL, _schema(), sr.DimensionPlan.load(f"{folder}/plan.json"))
    slim = build_slim_model(MODEL, _schema(), plan, "select")
    fuse_table_optimizer(slim, "rowwise_adagrad", 0.1, placement)  # type: ignore[arg-type]
    config = ShardingConfig(type=placement)  # type: ignore[arg-type]
    sharded = shard(slim, config, Runtime(rank, world_size, torch.device("cpu")), COUNT)
    load_ticket(Path(f"{folder}/slim"), sharded, plan)
    batch = _own_batch(rank, world_size)
    sharded.eval()
    logits = sharded(batch)[1][1]
    sharded.train()
    batch = _batch(rank * COUNT // world_size, (rank + 1) * COUNT // world_size)  # ranks train on as many rows each
    losses = []
    for _ in range(6):
        loss = sharded(batch)[0]
        loss.backward()
        losses.append(float(loss.detach()))
    return logits, losses


@pytest.mark.parametrize(("world_size", "placement"), [(1, "auto"), (2, "auto"), (2, "row_wise")])
def test_the_slim_model_with_select_equals_the_masked_one_and_trains(
    tmp_path: Path, world_size: int, placement: str
) -> None:
    torch.manual_seed(0)
    plan = _plan()
    assert any(0 < len(table.kept) < D for table in plan.tables.values())
    plan.save(tmp_path / "plan.json")
    over = build_model(MODEL, _schema()).over
    state = {f"embeddings.embedding_bags.{name}.weight": table for name, table in _tables().items()}
    state |= {f"over.{name}": value for name, value in over.state_dict().items()}
    dcp.save({"model": state}, checkpoint_id=tmp_path / "full")
    sr.slim_checkpoint(tmp_path / "full", tmp_path / "slim", plan)
    answers = run_ranks(world_size, _slim_logits_on_rank, str(tmp_path), placement)
    fields = _pooled({name: table * _mask(plan, name) for name, table in _tables().items()})
    expected = plain_deepfm(over, torch.empty(COUNT, 0), fields)  # type: ignore[arg-type]
    torch.testing.assert_close(torch.cat([logits for logits, _ in answers]), expected, rtol=0, atol=1e-5)
    assert all(losses[-1] < losses[0] for _, losses in answers)


class _Wrapped(nn.Module):
    """Somebody's own weighted model."""

    def __init__(self) -> None:
        super().__init__()
        tables = [
            EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=D, feature_names=[name])
            for name, rows in ROWS.items()
        ]
        self.embeddings = EmbeddingBagCollection(tables=tables, is_weighted=True)
        self.head = nn.Linear(D * len(ROWS), 1)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = self.head(self.embeddings(batch.sparse).values()).squeeze(1)
        return F.binary_cross_entropy_with_logits(logits, batch.labels), logits.detach()


def test_surgery_keeps_the_weights_of_any_model() -> None:
    torch.manual_seed(0)
    model, plan = _Wrapped(), _plan()
    slim = sr.slim(model, plan)
    assert slim.embeddings.collection.is_weighted()
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for name in ROWS:
            masked.embeddings.embedding_bags[name].weight.mul_(_mask(plan, name))
    batch = _batch(0, COUNT)
    torch.testing.assert_close(slim(batch)[1], masked(batch)[1], rtol=0, atol=1e-5)
