"""The pipelines train as a loop written out does, and leave the model usable; what is sent in half precision changes little."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sseds_rec.distributed.runtime import Runtime
from sseds_rec.distributed.sharding import CommPrecision, ShardingConfig, shard
from sseds_rec.errors import UserError
from sseds_rec.models import build_model
from sseds_rec.training.config import TrainConfig
from sseds_rec.training.optimizers import build_optimizer, fuse_table_optimizer
from sseds_rec.training.pipelines import train_pipeline
from tests.models.clicks import COUNT, ROWS, D, batch_of, config_of, schema_of
from tests.models.plain import fill_tables
from tests.ranks import run_ranks

_LOCAL = 4  # rows a step and rank


def trained(rank: int, world_size: int, kind: str, precision: CommPrecision = "fp32") -> dict[str, Tensor]:
    """Dense weights after two epochs over the rank's batches, and the logits that the model then gives."""
    place = Runtime(rank, world_size, torch.device("cpu"))
    torch.manual_seed(0)
    config = TrainConfig(table_optimizer="rowwise_adagrad", learning_rate=0.05)
    model = build_model(config_of("deepfm"), schema_of(2))
    fuse_table_optimizer(model, config.table_optimizer, config.table_rate, "auto")
    sharded = shard(model, ShardingConfig(comm_precision=precision), place, _LOCAL)
    fill_tables(sharded, {name.replace(".", "_"): torch.randn(n, D) for name, n in ROWS.items()})
    optimizer = build_optimizer(sharded, config)
    starts = range(rank * _LOCAL, COUNT, world_size * _LOCAL)
    batches = [batch_of(2, slice(start, start + _LOCAL)) for start in starts]
    for _ in range(2):  # epochs: the trainer makes a pipeline for each
        if kind == "loop":
            for batch in batches:
                optimizer.zero_grad()
                sharded(batch)[0].backward()
                optimizer.step()
        else:
            with train_pipeline(sharded, optimizer, place, overlap=kind == "overlapped") as step:
                rest = iter(batches)
                for _ in batches:
                    step(rest)
                with pytest.raises(StopIteration):
                    step(rest)
    logits = sharded.eval()(batches[0])[1][1]
    weights = {name: p.detach().clone() for name, p in sharded.named_parameters() if "embedding_bags" not in name}
    return {**weights, "logits": logits}


@pytest.mark.parametrize("world_size", [1, 2])
def test_pipelines_train_as_a_plain_loop_does(world_size: int) -> None:
    expected = run_ranks(world_size, trained, "loop")
    for kind in ("base", "overlapped"):
        for ours, plain in zip(run_ranks(world_size, trained, kind), expected, strict=True):
            assert ours.keys() == plain.keys()
            for name, value in plain.items():
                assert torch.equal(ours[name], value), (kind, name)


def test_half_precision_changes_little_of_what_ranks_learn() -> None:
    exact = run_ranks(2, trained, "base")
    halved = run_ranks(2, trained, "base", "fp16")
    for ours, other in zip(halved, exact, strict=True):
        torch.testing.assert_close(ours["logits"], other["logits"], rtol=0.02, atol=0.02)
        assert not torch.equal(ours["logits"], other["logits"])
    for name in exact[0].keys() - {"logits"}:
        assert torch.equal(halved[0][name], halved[1][name]), name  # one model still


def test_refuses_what_gloo_does_not_send() -> None:
    model, config = build_model(config_of("deepfm"), schema_of(2)), ShardingConfig(comm_precision="bf16")
    with pytest.raises(UserError, match="sharding.comm_precision=bf16.*use fp16"):
        shard(model, config, Runtime(0, 1, torch.device("cpu")), _LOCAL)
