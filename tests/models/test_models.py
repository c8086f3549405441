"""Every model against plain PyTorch written from its sums: logits and all gradients, the tables' too, uniform and slim."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchrec.models.dlrm import InteractionArch
from torchrec.modules.crossnet import CrossNet, LowRankCrossNet
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedTensor

import sseds_rec as sr
from sseds_rec.distributed.runtime import Runtime
from sseds_rec.distributed.sharding import ShardingConfig, shard
from sseds_rec.models import MODELS, CtrModel, ModelConfig, build_model, build_slim_model, table_names
from sseds_rec.models.fields import FieldEmbeddings
from sseds_rec.training.config import TrainConfig
from sseds_rec.training.optimizers import build_optimizer, fuse_table_optimizer
from tests.models.clicks import CONFIGS, COUNT, KEPT, batch_of, config_of, plan_of, pooled, randomize, schema_of
from tests.models.plain import PLAIN
from tests.ranks import run_ranks

FORMS = ["uniform", "turned", *(f"{plan}-{transform}" for plan in KEPT for transform in ("select", "random"))]


def _build(case: str, num_dense: int, form: str) -> CtrModel:
    plan, _, transform = form.partition("-")
    if plan in ("uniform", "turned"):
        model = build_model(config_of(case), schema_of(num_dense))
        if plan == "turned":  # keys in another order than the fields, and no order that is its own inverse
            first, *others = model.embeddings.embedding_bag_configs()  # type: ignore[union-attr]
            model.embeddings = EmbeddingBagCollection([*others, first], device=torch.device("meta"))
        return model
    return build_slim_model(config_of(case), schema_of(num_dense), plan_of(plan), transform)  # type: ignore[arg-type]


def test_every_model_is_here() -> None:
    assert {config["name"] for config in CONFIGS.values()} == set(MODELS) == set(PLAIN)


@pytest.mark.parametrize(
    ("case", "form", "num_dense"),
    [
        choice
        for choice in itertools.product(CONFIGS, FORMS, [0, 3])
        if choice not in {("dlrm", f"alone-{transform}", 0) for transform in ("select", "random")}  # refused, see below
    ],
)
def test_logits_and_all_gradients_equal_plain_pytorch(case: str, form: str, num_dense: int) -> None:
    torch.manual_seed(0)
    model, batch = _build(case, num_dense, form), batch_of(num_dense)
    model.embeddings.to_empty(device="cpu")  # type: ignore[union-attr]
    randomize(model, seed=3)
    loss, (_, logits, _) = model(batch)

    tables = {name: bag.weight for name, bag in model.embeddings.embedding_bags.items()}  # type: ignore[union-attr]
    columns = {field: e[:, : model.over.fields.dims[field]] for field, e in pooled(tables).items()}
    plain = PLAIN[config_of(case).name](model.over, batch.dense, columns)
    assert logits.std() > 0.05
    torch.testing.assert_close(logits, plain.detach(), rtol=1e-5, atol=1e-5)
    parameters, expected = list(model.parameters()), F.binary_cross_entropy_with_logits(plain, batch.labels)
    ours = torch.autograd.grad(loss, parameters)  # refuses what takes no part, as DistributedDataParallel does
    theirs = torch.autograd.grad(expected, parameters, materialize_grads=True)  # one field alone has no pair
    # Of 1 in the largest; in float32 the cross layers of DCNv2 round by up to 6e-6, on some processors.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CONFIGS)
def test_only_models_that_align_have_transforms_and_the_output_ignores_the_order_of_keys(case: str) -> None:
    torch.manual_seed(0)
    dims = {"a": 4, "b": 12, "c": 3}
    model = MODELS[config_of(case).name]
    over = model(FieldEmbeddings(dims, 12 if model.aligns else None), 2, config_of(case))
    assert any(".transforms." in name for name, _ in over.named_parameters()) == model.aligns
    dense, e = torch.randn(5, 2), {name: torch.randn(5, dim) for name, dim in dims.items()}
    expected = over(dense, KeyedTensor.from_tensor_list(list(e), list(e.values())))
    e["c"] = torch.cat([e["c"], torch.full((5, 1), 100.0)], dim=1)  # stored wider, as tables of odd widths are
    turned = KeyedTensor.from_tensor_list(list(e)[::-1], list(e.values())[::-1])
    torch.testing.assert_close(over(dense, turned), expected, rtol=0, atol=0)


def test_pairs_are_in_the_order_of_torchrecs_dlrm() -> None:
    torch.manual_seed(0)
    over = MODELS["dlrm"](FieldEmbeddings(dict.fromkeys("abcd", 8)), 3, config_of("dlrm"))
    dense, e = torch.randn(5, 3), torch.randn(5, 4, 8)
    inputs = InteractionArch(4)(over.bottom(dense), e)
    expected = over.output(over.top(inputs)).squeeze(1)
    keyed = KeyedTensor.from_tensor_list(list("abcd"), list(e.unbind(1)))
    torch.testing.assert_close(over(dense, keyed), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [4, None])
def test_cross_layers_are_torchrecs(rank: int | None) -> None:
    torch.manual_seed(0)
    config = config_of("dcnv2", cross_rank=rank, cross_layers=3)
    over = MODELS["dcnv2"](FieldEmbeddings({"a": 8, "b": 8}), 3, config)
    randomize(over, seed=1)
    theirs = LowRankCrossNet(19, 3, rank) if rank else CrossNet(19, 3)
    with torch.no_grad():
        for layer, own in enumerate(over.cross):
            theirs.bias[layer].copy_((own.u if rank else own.w).bias.reshape(theirs.bias[layer].shape))
            if rank:
                theirs.W_kernels[layer].copy_(own.u.weight)
                theirs.V_kernels[layer].copy_(own.v.weight)
            else:
                theirs.kernels[layer].copy_(own.w.weight)
    dense, e = torch.randn(5, 3), torch.randn(5, 16)
    expected = over.output(over.deep(theirs(torch.cat([dense, e], dim=1)))).squeeze(1)
    keyed = KeyedTensor.from_tensor_list(["a", "b"], list(e.split(8, dim=1)))
    torch.testing.assert_close(over(dense, keyed), expected, rtol=1e-5, atol=1e-5)


def test_dropout_and_batch_norm_are_in_every_hidden_layer_when_asked() -> None:
    def kinds(layers: nn.Module) -> list[str]:
        return [type(layer).__name__ for layer in layers.children()]

    towers = {"wide_deep": ["deep"], "deepfm": ["deep"], "dnn": ["deep"], "dlrm": ["bottom", "top"], "dcnv2": ["deep"]}
    for name, layers in towers.items():
        fields = FieldEmbeddings({"a": 8, "b": 8})
        plain = MODELS[name](fields, 2, config_of(name))
        rich = MODELS[name](fields, 2, config_of(name, dropout=0.5, batch_norm=True))
        for layer in layers:
            hidden = 3 if layer == "bottom" else 2
            assert kinds(getattr(plain, layer)) == ["Linear", "ReLU"] * hidden
            assert kinds(getattr(rich, layer)) == ["Linear", "BatchNorm1d", "ReLU", "Dropout"] * hidden


def _steps_on_rank(rank: int, world_size: int, case: str, form: str) -> tuple[list[float], list[torch.Tensor]]:
    torch.manual_seed(0)
    model = _build(case, 3, form)
    fuse_table_optimizer(model, "rowwise_adagrad", 0.1, "auto")
    runtime = Runtime(rank, world_size, torch.device("cpu"))
    sharded = shard(model, ShardingConfig(), runtime, COUNT // world_size)
    optimizer = build_optimizer(sharded, TrainConfig(table_optimizer="rowwise_adagrad", learning_rate=0.03))
    batch = batch_of(3, slice(rank * COUNT // world_size, (rank + 1) * COUNT // world_size))
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = sharded(batch)[0]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, [value.detach() for name, value in sharded.named_parameters() if name.startswith("over.")]


@pytest.mark.parametrize("form", ["uniform", "dropped-random"])
@pytest.mark.parametrize("case", CONFIGS)
def test_two_ranks_train_it_and_keep_the_same_weights(case: str, form: str) -> None:
    (first, weights), (second, others) = run_ranks(2, _steps_on_rank, case, form)
    assert first[-1] + second[-1] < first[0] + second[0] - 0.05
    assert all(torch.equal(own, other) for own, other in zip(weights, others, strict=True))


def test_plans_that_leave_too_little_are_refused() -> None:
    with pytest.raises(sr.UserError, match="model.name=dlrm: field ad is alone, .*search.min_dim"):
        build_slim_model(config_of("dlrm"), schema_of(0), plan_of("alone"), "select")
    plan = plan_of("alone")
    gone = {"kept": [], "embedding_dim": 0, "stored_dim": 0}
    plan.tables["ad"] = plan.tables["ad"].model_copy(update=gone)
    for case in CONFIGS:
        with pytest.raises(sr.UserError, match="drops every table"):
            build_slim_model(config_of(case), schema_of(3), plan, "random")


def test_tables_are_named_after_fields() -> None:
    assert table_names(schema_of(0))["user.id"] == "user_id"
    with pytest.raises(ValueError, match=f"no model named 'fmm'; choose one of {', '.join(sorted(MODELS))}"):
        ModelConfig(name="fmm")
