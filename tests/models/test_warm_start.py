"""A slim model of a new plan that starts as the trained one of an old plan, and columns that return."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

import sseds_rec as sr
from sseds_rec.distributed.runtime import Runtime
from sseds_rec.distributed.sharding import ShardingConfig, shard
from sseds_rec.models import CtrModel, ModelConfig, build_model, build_slim_model
from sseds_rec.models.warm_start import live_ticket, warm_start
from sseds_rec.training.optimizers import fuse_table_optimizer
from tests.models.clicks import CONFIGS, COUNT, D, batch_of, config_of, plan_of, pooled, randomize, schema_of
from tests.models.plain import fill_tables
from tests.ranks import run_ranks
from tests.slim.rotations import draw_rotation, project

DENSE = 3


def _rotated(plan: sr.DimensionPlan, seed: int, scale: float) -> sr.DimensionPlan:
    drawn = {name: draw_rotation(D, seed + i).keep(own.kept) for i, (name, own) in enumerate(plan.tables.items())}
    rotations = {name: replace(rotation, forward=scale * rotation.forward) for name, rotation in drawn.items()}
    return plan.model_copy(update={"rotations": rotations})


def _whole() -> sr.DimensionPlan:
    """All columns of all tables."""
    whole = {"kept": list(range(D)), "embedding_dim": D, "stored_dim": D}
    tables = {name: table.model_copy(update=whole) for name, table in plan_of("mixed").tables.items()}
    return sr.DimensionPlan(tables=tables, budget={}, reached={})


def _plan(name: str) -> sr.DimensionPlan:
    """e.g. "narrow", or rotated, by one of two draws: "narrow-a", "narrow-b"; "-as" is scaled as well."""
    kept, _, turned = name.partition("-")
    plan = _whole() if kept == "whole" else plan_of(kept)
    return _rotated(plan, {"a": 10, "b": 50}[turned[0]], 0.6 if turned[1:] else 1.0) if turned else plan


def _shard(model: CtrModel, runtime: Runtime) -> DistributedModelParallel:
    placement = "data_parallel" if runtime.world_size == 1 else "auto"
    optimizer = "sgd" if runtime.world_size == 1 else "rowwise_adagrad"
    fuse_table_optimizer(model, optimizer, 0.1, placement)  # type: ignore[arg-type]
    return shard(model, ShardingConfig(type=placement), runtime, COUNT)  # type: ignore[arg-type]


def _logits(model: DistributedModelParallel) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(batch_of(DENSE))[1][1]


def _tables(configs: dict[str, tuple[int, int]], seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(*shape, generator=random) for name, shape in configs.items()}


def _full(config: ModelConfig, runtime: Runtime) -> tuple[DistributedModelParallel, dict[str, Tensor]]:
    model = _shard(build_model(config, schema_of(DENSE)), runtime)
    randomize(model.module.over, seed=3)
    tables = _tables({name: (own.rows, D) for name, own in plan_of("mixed").tables.items()}, seed=4)
    fill_tables(model, tables)
    return model, tables


def _slim(config: ModelConfig, plan: sr.DimensionPlan, runtime: Runtime) -> DistributedModelParallel:
    return _shard(build_slim_model(config, schema_of(DENSE), plan, "select"), runtime)


def _trained(
    config: ModelConfig, plan: sr.DimensionPlan, runtime: Runtime
) -> tuple[DistributedModelParallel, dict[str, Tensor]]:
    """A slim model none of whose weights is as its plan made it, padding apart, and its tables."""
    model = _slim(config, plan, runtime)
    randomize(model.module.over, seed=5)
    tables = _tables({name: (own.rows, own.stored_dim) for name, own in plan.tables.items() if own.kept}, seed=6)
    for name, table in tables.items():
        table[:, plan.tables[name].embedding_dim :] = 0
    fill_tables(model, tables)
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, value in model.module.over.named_parameters():
            if ".transforms." in name:
                value.add_(0.3 * torch.randn(value.shape, generator=random))
    return model, tables


def _warm(rank: int, world_size: int, case: str, before: str, after: str) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the warm-started model, the old slim one and the full one."""
    runtime = Runtime(rank, world_size, torch.device("cpu"))
    config = config_of(case, batch_norm=True)
    old_plan, plan = _plan(before), _plan(after)
    full, _ = _full(config, runtime)
    old, _ = _trained(config, old_plan, runtime)
    new = _slim(config, plan, runtime)
    warm_start(new, plan, old, old_plan, full)
    return _logits(new), _logits(old), _logits(full)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("case", CONFIGS)
def test_an_unchanged_plan_leaves_the_model_as_it_is(case: str, world_size: int) -> None:
    turned = [] if case.startswith("dcnv2") else ["narrow-a", "dropped-as"]
    for plan in ["mixed", "dropped", *turned]:
        for new, old, full in run_ranks(world_size, _warm, case, plan, plan):
            torch.testing.assert_close(new, old, rtol=0, atol=2e-4)
            assert (old - full).abs().max() > 0.1, plan


@pytest.mark.parametrize(("case", "before", "after"), [("deepfm", "dropped", "mixed"), ("dlrm", "narrow-a", "mixed-b")])
def test_placement_changes_nothing(case: str, before: str, after: str) -> None:
    (alone,) = run_ranks(1, _warm, case, before, after)
    for shared in run_ranks(2, _warm, case, before, after):
        torch.testing.assert_close(shared[0], alone[0], rtol=0, atol=1e-4)
    assert (alone[0] - alone[1]).abs().max() > 0.01


def _columns(rank: int, world_size: int, is_trained: bool) -> None:
    runtime = Runtime(rank, world_size, torch.device("cpu"))
    config, old_plan, plan = config_of("deepfm"), plan_of("dropped"), plan_of("mixed")
    full, full_tables = _full(config, runtime)
    old, old_tables = _trained(config, old_plan, runtime)
    new = _slim(config, plan, runtime)
    warm_start(new, plan, old, old_plan, full, is_trained)
    state, was, whole = (model.state_dict() for model in (new, old, full))
    first = (f"over.{name}.weight" for name in ("deep.0", "first_order"))
    for name in first:
        assert torch.equal(state[name][:, :DENSE], was[name][:, :DENSE])
    place = {"new": DENSE, "old": DENSE}
    returned = 0
    for i, (table, own) in enumerate(plan.tables.items()):
        rows = state[f"embeddings.embedding_bags.{table}.weight"]
        earlier = old_plan.tables[table].kept
        for column in own.kept:
            at, here = own.kept.index(column), place["new"] + own.kept.index(column)
            transform = state[f"over.fields.alignment.transforms.{table}"][:, at]
            if column in earlier:
                before = earlier.index(column)
                assert torch.equal(rows[:, at], old_tables[table][:, before])
                assert torch.equal(transform, was[f"over.fields.alignment.transforms.{table}"][:, before])
                expected = was["over.deep.0.weight"][:, place["old"] + before]
            else:
                returned += 1
                assert torch.equal(rows[:, at], full_tables[table][:, column])
                assert torch.equal(transform, torch.eye(D)[:, column])
                expected = whole["over.deep.0.weight"][:, DENSE + i * D + column]
            torch.testing.assert_close(state["over.deep.0.weight"][:, here], expected, rtol=0, atol=1e-6)
        assert not rows[:, len(own.kept) :].any()
        place["new"] += len(own.kept)
        place["old"] += len(earlier)
    assert returned > 8
    torch.testing.assert_close(state["over.deep.2.weight"], was["over.deep.2.weight"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("is_trained", [True, False])
def test_columns_that_stay_are_the_old_models_and_those_that_return_the_full_ones(is_trained: bool) -> None:
    run_ranks(1, _columns, is_trained)


def _composite(rank: int, world_size: int, before: str, after: str) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a warm-started DeepFM that keeps all coordinates, and of the sum that it stands for, in plain PyTorch."""
    runtime = Runtime(rank, world_size, torch.device("cpu"))
    config, old_plan, plan = config_of("deepfm"), _plan(before), _plan(after)
    full, full_tables = _full(config, runtime)
    old, _ = _trained(config, old_plan, runtime)
    new = _slim(config, plan, runtime)
    warm_start(new, plan, old, old_plan, full)

    batch = batch_of(DENSE)
    ids = batch.sparse
    over, whole = old.module.over, full.module.over
    with torch.no_grad():
        embeddings = old.module.embeddings(ids)
        coordinates = embeddings if old.module.masses is None else old.module.masses(embeddings, ids)
        kept = coordinates.to_dict()
        hidden = over.deep[0].bias + batch.dense @ over.deep[0].weight[:, :DENSE].T
        linear = over.first_order.bias + batch.dense @ over.first_order.weight[:, :DENSE].T
        aligned, place = [], DENSE
        for i, ((field, e), (table, own)) in enumerate(
            zip(pooled(full_tables).items(), old_plan.tables.items(), strict=True)
        ):
            outside = e
            if (rotation := old_plan.rotations.get(table)) is not None:
                mass = kept[field][:, -1:] / rotation.mean_length
                centred = e - mass * rotation.mean.float()
                outside = centred - centred @ rotation.forward.float() @ rotation.inverse.float().T
            else:
                outside = e.clone()
                outside[:, own.kept] = 0
            width = own.embedding_dim + (table in old_plan.rotations)
            seen = torch.zeros(len(e), D)
            if width:
                t = kept[field][:, :width]
                hidden = hidden + t @ over.deep[0].weight[:, place : place + width].T
                linear = linear + t @ over.first_order.weight[:, place : place + width].T
                seen = t @ over.fields.alignment.transforms[table].T
                place += width
            columns = slice(DENSE + i * D, DENSE + (i + 1) * D)
            hidden = hidden + outside @ whole.deep[0].weight[:, columns].T
            linear = linear + outside @ whole.first_order.weight[:, columns].T
            aligned.append(seen + outside)
        total, squares = sum(aligned), sum(a.square().sum(1) for a in aligned)
        over.eval()
        deep = over.output(over.deep[1:](hidden))[:, 0]
        expected = linear[:, 0] + 0.5 * (total.square().sum(1) - squares) + deep
    return _logits(new), expected, _logits(old)


@pytest.mark.parametrize(
    ("before", "after"), [("mixed-a", "whole-b"), ("dropped-a", "whole-b"), ("mixed", "whole-b"), ("mixed", "whole")]
)
def test_what_the_old_model_knows_and_the_rest_of_the_full_one_add_up(before: str, after: str) -> None:
    """No new coordinate is cut here, so ê and the part of the full model's embedding outside the old span are both there."""
    ((new, expected, old),) = run_ranks(1, _composite, before, after)
    torch.testing.assert_close(new, expected, rtol=1e-4, atol=1e-3)
    assert (new - old).abs().max() > 0.1


def _ticket(rank: int, world_size: int, name: str) -> tuple[Tensor, Tensor]:
    """Logits of a slim model cut from a full one in memory, and of the full one with its tables masked or projected."""
    runtime = Runtime(rank, world_size, torch.device("cpu"))
    config, plan = config_of("deepfm"), _plan(name)
    full, tables = _full(config, runtime)
    new = _slim(config, plan, runtime)
    live_ticket(new, plan, full)
    for table, own in plan.tables.items():
        mask = torch.zeros(D)
        mask[own.kept] = 1
        rotation = plan.rotations.get(table)
        tables[table] = tables[table] * mask if rotation is None else project(tables[table], rotation).float()
    fill_tables(full, tables)
    return _logits(new), _logits(full)


@pytest.mark.parametrize("plan", ["mixed", "dropped-as"])
def test_a_ticket_of_a_model_in_memory_is_that_model_cut(plan: str) -> None:
    for new, cut in [*run_ranks(1, _ticket, plan), *run_ranks(2, _ticket, plan)]:
        torch.testing.assert_close(new, cut, rtol=1e-5, atol=1e-4)
