"""Precision and compilation of the dense part."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import sseds_rec as sr
from sseds_rec.distributed.runtime import Runtime
from sseds_rec.distributed.sharding import ShardingConfig, shard
from sseds_rec.errors import UserError
from sseds_rec.models import build_model, build_slim_model
from sseds_rec.training.compute import prepare_dense
from sseds_rec.training.config import Precision, TrainConfig
from sseds_rec.training.optimizers import build_optimizer, fuse_table_optimizer
from sseds_rec.training.pipelines import train_pipeline
from tests.models.clicks import COUNT, ROWS, D, batch_of, config_of, plan_of, randomize, schema_of
from tests.models.plain import fill_tables
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def step_of(rank: int, world_size: int, name: str, precision: Precision, compile: bool = False) -> dict[str, Tensor]:
    """Logits of a slim model, and the gradients of its dense part."""
    torch.manual_seed(0)
    model = build_slim_model(config_of(name), schema_of(2), plan_of("mixed"), "random")
    randomize(model.over, 5)
    prepare_dense(model, TrainConfig(precision=precision, compile=compile), CPU)
    sharded = shard(model, ShardingConfig(), Runtime(rank, world_size, CPU), COUNT)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in sharded.parameters():
            if parameter.shape[-1] in (4, D):
                parameter.copy_(torch.randn(parameter.shape))
    loss, (_, logits, _) = sharded(batch_of(2))
    loss.backward()
    return {"logits": logits} | {n: p.grad for n, p in sharded.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["deepfm", "dlrm", "dcnv2"])
def test_bf16_rounds_the_products_of_a_model(name: str) -> None:
    (exact,) = run_ranks(1, step_of, name, "float32")
    (rounded,) = run_ranks(1, step_of, name, "bf16")
    assert exact.keys() == rounded.keys()
    for key, value in exact.items():
        assert rounded[key].dtype == torch.float32
        cosine = torch.cosine_similarity(rounded[key].flatten(), value.flatten(), dim=0)
        assert cosine > 0.95, (key, float(cosine))
    assert not torch.equal(rounded["logits"], exact["logits"])


@pytest.mark.parametrize("name", ["deepfm", "dlrm"])
def test_compiled_model_is_the_same(name: str) -> None:
    (eager,) = run_ranks(1, step_of, name, "float32")
    (compiled,) = run_ranks(1, step_of, name, "float32", True)
    assert compiled.keys() == eager.keys()
    for key, value in eager.items():
        torch.testing.assert_close(compiled[key], value, rtol=1e-5, atol=1e-5)


def trained_and_scored(rank: int, world_size: int, compile: bool) -> dict[str, Tensor]:
    """After four steps: the dense weights, logits, and ggn scores of the columns; and how many graphs were compiled."""
    torch.manual_seed(0)
    place, config = Runtime(rank, world_size, CPU), TrainConfig(table_optimizer="rowwise_adagrad", compile=compile)
    model = build_model(config_of("deepfm", hidden=[6]), schema_of(2))
    randomize(model.over, 5)
    fuse_table_optimizer(model, config.table_optimizer, 0.05, "auto")
    prepare_dense(model, config, CPU)
    local = COUNT // world_size
    sharded = shard(model, ShardingConfig(), place, local)
    fill_tables(sharded, {name.replace(".", "_"): torch.randn(n, D) for name, n in ROWS.items()})
    batch, graphs = batch_of(2, slice(rank * local, (rank + 1) * local)), counters["stats"]["unique_graphs"]
    with train_pipeline(sharded, build_optimizer(sharded, config), place) as step:
        batches = iter([batch] * 4)
        logits = [step(batches)[1] for _ in range(4)]
    weights = {name: p.detach().clone() for name, p in sharded.named_parameters() if "embedding_bags" not in name}
    scores = sr.score_dimensions(sharded, [batch], "ggn")
    compiled = torch.tensor(counters["stats"]["unique_graphs"] - graphs)
    return {**weights, **scores, "logits": torch.stack(logits), "compiled": compiled}


def test_compiled_model_trains_and_is_scored_alike_on_two_ranks() -> None:
    for compiled, eager in zip(
        run_ranks(2, trained_and_scored, True), run_ranks(2, trained_and_scored, False), strict=True
    ):
        assert compiled.pop("compiled") > 0 == eager.pop("compiled")
        assert compiled.keys() == eager.keys() >= {"user_id", "ad", "tags", "hour"}
        for key, value in eager.items():
            torch.testing.assert_close(compiled[key], value, rtol=1e-4, atol=1e-4 if value.ndim != 1 else 1e-6, msg=key)
        assert (eager["logits"][-1] - eager["logits"][0]).abs().max() > 0.1  # it has learned something


def test_refuses_to_compile_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    model = build_model(config_of("dnn"), schema_of(0))
    with pytest.raises(UserError, match="train.compile=true.*no-such-compiler is not found"):
        prepare_dense(model, TrainConfig(compile=True), CPU)


def test_interaction_stays_exact_under_autocast() -> None:
    """Its two sums are large beside their difference: rounded to bf16 they would leave noise."""
    model = build_slim_model(config_of("fm"), schema_of(0), plan_of("mixed"), "random")
    fields = model.over.fields
    dense, raw = torch.randn(COUNT, 2), 100 + torch.randn(COUNT, fields.raw_dim)
    first_order = nn.Linear(2 + fields.raw_dim, 1)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = fields.fm(dense, raw, first_order)
    assert torch.equal(under_autocast, fields.fm(dense, raw, first_order))


def test_refuses_tf32_on_a_cpu() -> None:
    model = build_model(config_of("dnn"), schema_of(0))
    with pytest.raises(UserError, match="train.precision=tf32.*use float32 or bf16"):
        prepare_dense(model, TrainConfig(precision="tf32"), CPU)
