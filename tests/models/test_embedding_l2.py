"""The embedding penalty λ/2 · mean_b Σ_i ||e_bi||² in loss and table gradients, against autograd on plain lookups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sseds_rec.distributed.runtime import Runtime
from sseds_rec.distributed.sharding import ShardingConfig, shard
from sseds_rec.models import CtrModel, build_model
from sseds_rec.training.optimizers import fuse_table_optimizer
from tests.models.clicks import COUNT, ROWS, D, batch_of, config_of, pooled, randomize, schema_of
from tests.models.plain import PLAIN, fill_tables
from tests.ranks import run_ranks

L2, DENSE = 0.3, 2


def _model() -> CtrModel:
    model = build_model(config_of("deepfm"), schema_of(DENSE), L2)
    randomize(model.over, seed=5)
    return model


def _tables() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(2)
    return {name.replace(".", "_"): torch.randn(rows, D, generator=random) for name, rows in ROWS.items()}


def _rows(rank: int, world_size: int) -> slice:
    return slice(rank * COUNT // world_size, (rank + 1) * COUNT // world_size)


def _step_on_rank(rank: int, world_size: int) -> dict[str, Any]:
    """Losses in eval and training mode, and what SGD at rate 1 takes away from this rank's tables: their gradients."""
    model = _model()
    fuse_table_optimizer(model, "sgd", 1.0, "table_wise")
    sharded = shard(
        model, ShardingConfig(type="table_wise"), Runtime(rank, world_size, torch.device("cpu")), COUNT // world_size
    )
    fill_tables(sharded, _tables())
    batch = batch_of(DENSE, _rows(rank, world_size))
    evaluated = sharded.eval()(batch)[0].detach()
    loss, (reported, _, _) = sharded.train()(batch)
    loss.backward()
    gradients = {
        name.split(".")[-2]: _tables()[name.split(".")[-2]] - part.tensor
        for name, value in sharded.state_dict().items()
        if name.startswith("embeddings.")
        for part in value.local_shards()
    }
    return {"eval": evaluated, "train": loss.detach(), "reported": reported, "gradients": gradients}


@pytest.mark.parametrize("world_size", [1, 2])
def test_penalty_in_loss_and_table_gradients_of_training_only(world_size: int) -> None:
    tables = {name: table.requires_grad_() for name, table in _tables().items()}
    fields, batch = pooled(tables), batch_of(DENSE)
    logits = PLAIN["deepfm"](_model().over, batch.dense, fields)
    own = F.binary_cross_entropy_with_logits(logits, batch.labels, reduction="none")
    penalty = 0.5 * L2 * torch.stack([e.square().sum(dim=1) for e in fields.values()]).sum(dim=0)
    assert penalty.mean() > own.mean()  # or this test would say little
    expected = dict(zip(tables, torch.autograd.grad((own + penalty).mean(), list(tables.values())), strict=True))

    answers = run_ranks(world_size, _step_on_rank)
    for rank, answer in enumerate(answers):
        rows = _rows(rank, world_size)
        torch.testing.assert_close(answer["train"], (own + penalty)[rows].mean().detach())
        for without in ("eval", "reported"):
            torch.testing.assert_close(answer[without], own[rows].mean().detach())
    gradients = {name: value for answer in answers for name, value in answer["gradients"].items()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)
