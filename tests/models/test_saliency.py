"""Models as the pipeline builds and shards them: their scores equal those of a plain PyTorch copy with explicit α."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor

import sseds_rec as sr
from sseds_rec.data.batch import Batch
from sseds_rec.data.schema import Field, Schema, Split
from sseds_rec.distributed.runtime import Runtime
from sseds_rec.distributed.sharding import ShardingConfig, shard
from sseds_rec.models import build_model
from sseds_rec.training.optimizers import fuse_table_optimizer
from tests.models.clicks import CONFIGS, config_of
from tests.models.plain import PLAIN, explicit_scores, fill_tables
from tests.ranks import run_ranks

ROWS = {"user": 40, "ad": 25, "hour": 6}
COUNT, D, DENSE = 64, 12, 2


def _schema() -> Schema:
    fields = [
        Field(name=n, kind="categorical", transform="vocabulary", cardinality=c, min_count=1) for n, c in ROWS.items()
    ]
    fields += [Field(name=f"x{i}", kind="numeric", transform="log1p") for i in range(DENSE)]
    splits = {name: Split(rows=0, positives=0, files=[]) for name in ("train", "validation", "test")}
    return Schema(label="click", fields=fields, seed=0, source={}, splits=splits)  # type: ignore[arg-type]


def _data() -> tuple[Tensor, dict[str, Tensor], Tensor]:
    random = torch.Generator().manual_seed(1)
    ids = {name: torch.randint(0, rows, (COUNT,), generator=random) for name, rows in ROWS.items()}
    return torch.randn(COUNT, DENSE, generator=random), ids, (torch.rand(COUNT, generator=random) > 0.5).float()


def _batch(first: int, last: int) -> Batch:
    dense, ids, labels = _data()
    values = torch.cat([column[first:last] for column in ids.values()])
    sparse = KeyedJaggedTensor(keys=list(ids), values=values, lengths=torch.ones(len(values), dtype=torch.int32))
    return Batch(dense=dense[first:last], sparse=sparse, labels=labels[first:last])


def _tables() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(2)
    return {name: 0.5 * torch.randn(rows, D, generator=random) for name, rows in ROWS.items()}


def _scores_on_rank(
    rank: int, world_size: int, case: str, criterion: str, placement: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    model = build_model(config_of(case, embedding_dim=D), _schema())
    fuse_table_optimizer(model, "rowwise_adagrad", 0.1, placement)  # type: ignore[arg-type]
    config = ShardingConfig(type=placement)  # type: ignore[arg-type]
    sharded = shard(model, config, Runtime(rank, world_size, torch.device("cpu")), COUNT)
    fill_tables(sharded, _tables())
    cut = 40 if world_size == 2 else COUNT
    batch = _batch(0, cut) if rank == 0 else _batch(cut, COUNT)
    return dict(sr.score_dimensions(sharded, [batch], criterion)), {
        name: value.clone() for name, value in sharded.state_dict().items() if name.startswith("over.")
    }


def _assert_scores_equal_explicit_alpha(case: str, criterion: str, placement: str, world_size: int) -> None:
    answers = run_ranks(world_size, _scores_on_rank, case, criterion, placement)
    plain = build_model(config_of(case, embedding_dim=D), _schema()).over.double()
    plain.load_state_dict({name.removeprefix("over."): value.double() for name, value in answers[0][1].items()})
    dense, ids, labels = _data()
    alpha = {name: torch.ones(D, dtype=torch.float64, requires_grad=True) for name in ROWS}
    fields = {name: _tables()[name].double()[ids[name]] * alpha[name] for name in ROWS}
    logits = PLAIN[config_of(case).name](plain, dense.double(), fields)
    expected = explicit_scores(logits, labels.double(), alpha, criterion)
    for scores, _ in answers:
        for name, values in expected.items():
            torch.testing.assert_close(scores[name], values, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("placement", ["auto", "data_parallel", "column_wise"])
@pytest.mark.parametrize("criterion", ["snip", "ggn"])
def test_scores_equal_explicit_alpha_on_a_plain_copy(world_size: int, placement: str, criterion: str) -> None:
    _assert_scores_equal_explicit_alpha("deepfm", criterion, placement, world_size)


@pytest.mark.parametrize("case", [case for case in CONFIGS if case != "deepfm"])
@pytest.mark.parametrize("criterion", ["snip", "ggn"])
def test_scores_of_every_model_equal_explicit_alpha(case: str, criterion: str) -> None:
    _assert_scores_equal_explicit_alpha(case, criterion, "auto", 2)
