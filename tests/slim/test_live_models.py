"""TorchRec's own models and ours, sharded, slimmed without touching what is around their tables."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.model_parallel import DistributedModelParallel

import sseds_rec as sr
from sseds_rec.distributed.runtime import Runtime
from sseds_rec.distributed.sharding import ShardingConfig, shard
from sseds_rec.models import CtrModel, build_model, build_slim_model
from sseds_rec.models.ticket import load_ticket
from sseds_rec.training.checkpoint import save_weights
from sseds_rec.training.optimizers import fuse_table_optimizer
from tests.models.clicks import CONFIGS, COUNT, D, batch_of, config_of, plan_of, randomize, schema_of
from tests.ranks import run_ranks
from tests.search import placed, published
from tests.slim.moves import convert, load, mask, plan_keeping, save, train

TARGETS = dict(zip(published.TABLES, ["column_wise", "row_wise", "table_wise"], strict=True))
OF_PUBLISHED = {"t_user": [0, 3, 4, 7], "t_place": [2, 5], "t_hour": []}


def _tables(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if ".embedding_bags." in name]


def _place_published(model: nn.Module, types: dict[str, str]) -> DistributedModelParallel:
    fresh = [p for p in _tables(model) if not hasattr(p, "_optimizer_classes")]
    apply_optimizer_in_backward(torch.optim.Adagrad, fresh, {"lr": 0.05})
    there = {name.split(".")[-2] for name, _ in model.named_parameters() if ".embedding_bags." in name}
    return placed.shard(model, {table: kind for table, kind in types.items() if table in there})


def _published(rank: int, world_size: int, name: str, folder: str) -> tuple[Tensor, Tensor, list[float]]:
    full = _place_published(published.build(name, "meta"), published.TYPES)
    placed.load(full, published.weights_of(name))
    count = published.COUNT // world_size
    batch = published.make_batch(rank * count, (rank + 1) * count)
    plan = plan_keeping(published.build(name, "meta"), _by_score_name(name))
    live = sr.slim(full, plan, shard=lambda model: _place_published(model, TARGETS)).eval()
    found = published.logits_of(name, live.module, batch)
    save(full, folder)
    loaded = _place_published(sr.slim(published.build(name, "meta"), plan), TARGETS).eval()
    load(loaded, convert(folder, plan))
    loss_fn = published.LOSSES[name]
    losses = train(live, lambda: loss_fn(live, batch) if loss_fn else live(batch)[0])
    return found.detach(), published.logits_of(name, loaded.module, batch).detach(), losses


def _by_score_name(name: str) -> dict[str, list[int]]:
    if name != "two_tower":
        return OF_PUBLISHED
    return {f"{'candidate' if t == 't_place' else 'query'}.{t}": kept for t, kept in OF_PUBLISHED.items()}


@pytest.mark.parametrize("name", list(published.LOSSES))
def test_torchrecs_models_run_unchanged(name: str, tmp_path: Path) -> None:
    masked = published.build(name).eval()
    masked.load_state_dict(published.weights_of(name))
    mask(masked, OF_PUBLISHED)
    expected = published.logits_of(name, masked, published.make_batch()).detach()
    answers = run_ranks(2, _published, name, str(tmp_path / "full"))
    for way in (0, 1):
        torch.testing.assert_close(torch.cat([own[way] for own in answers]), expected, rtol=0, atol=1e-6)
    assert sum(losses[-1] - losses[0] for *_, losses in answers) < 0


TYPES = ["table_wise", "row_wise", "column_wise", "data_parallel"]


def _place(model: CtrModel, placement: str, rank: int, world_size: int) -> DistributedModelParallel:
    fuse_table_optimizer(model, "rowwise_adagrad", 0.05, placement)
    runtime = Runtime(rank, world_size, torch.device("cpu"))
    return shard(model, ShardingConfig(type=placement), runtime, COUNT // world_size)  # type: ignore[arg-type]


def _full_model(case: str, placement: str, rank: int, world_size: int, kept: bool) -> DistributedModelParallel:
    """The full model, with the same weights everywhere; if not all columns are `kept`, those that the plan drops are zero."""
    model = _place(build_model(config_of(case, batch_norm=True), schema_of(3)), placement, rank, world_size)
    randomize(model.module.over, seed=3)
    random = torch.Generator().manual_seed(4)
    for table, own in plan_of("dropped").tables.items():
        weight = 0.3 * torch.randn(own.rows, D, generator=random)
        if not kept:
            weight[:, [column for column in range(D) if column not in own.kept]] = 0
        placed.load(model, {f"embeddings.embedding_bags.{table}.weight": weight})
    return model.eval()


def _rows(rank: int, world_size: int) -> slice:
    count = COUNT // world_size
    return slice(rank * count, (rank + 1) * count)


def _logits(model: DistributedModelParallel, rank: int, world_size: int) -> Tensor:
    return model.eval()(batch_of(3, _rows(rank, world_size)))[1][1]


def _masked(rank: int, world_size: int, case: str) -> Tensor:
    return _logits(_full_model(case, "table_wise", rank, world_size, kept=False), rank, world_size)


def _live(rank: int, world_size: int, case: str, source: str, target: str, folder: str) -> tuple[Tensor, list[float]]:
    """Logits of the drop-in made live and losses of training it; leaves the full model's slim checkpoint."""
    full = _full_model(case, source, rank, world_size, kept=True)
    live = sr.slim(full, plan_of("dropped"), shard=lambda model: _place(model, target, rank, world_size))
    save_weights(Path(folder), full, Runtime(rank, world_size, torch.device("cpu")))
    convert(folder, plan_of("dropped"))
    logits = _logits(live, rank, world_size)
    return logits, train(live, lambda: live(batch_of(3, _rows(rank, world_size)))[0], steps=6)


def _from_checkpoint(rank: int, world_size: int, case: str, placement: str, folder: str) -> tuple[Tensor, list[float]]:
    """Logits of our slim model, whose dropped fields are gone, and losses of training it."""
    plan = plan_of("dropped")
    slim = _place(
        build_slim_model(config_of(case, batch_norm=True), schema_of(3), plan, "select"), placement, rank, world_size
    )
    load_ticket(Path(folder), slim, plan)
    logits = _logits(slim, rank, world_size)
    return logits, train(slim, lambda: slim(batch_of(3, _rows(rank, world_size)))[0], steps=6)


def _check(answers: list[tuple[Tensor, list[float]]], expected: Tensor) -> None:
    torch.testing.assert_close(torch.cat([logits for logits, _ in answers]), expected, rtol=1e-6, atol=1e-6)
    assert sum(losses[-1] - losses[0] for _, losses in answers) < 0


@pytest.mark.parametrize("case", CONFIGS)
def test_our_models_from_any_placement_to_any_other_and_other_numbers_of_ranks(case: str, tmp_path: Path) -> None:
    (expected,) = run_ranks(1, _masked, case)
    assert expected.std() > 0.02
    for source, target in zip(TYPES, TYPES[1:] + TYPES[:1], strict=True):
        folder = str(tmp_path / source)
        _check(run_ranks(2, _live, case, source, target, folder), expected)
        _check(run_ranks(2, _from_checkpoint, case, target, f"{folder}-slim"), expected)
    for ranks, placement in ((1, "row_wise"), (4, "column_wise")):
        _check(run_ranks(ranks, _from_checkpoint, case, placement, str(tmp_path / "row_wise-slim")), expected)
    _check(run_ranks(1, _live, case, "row_wise", "table_wise", str(tmp_path / "one")), expected)
    _check(run_ranks(2, _from_checkpoint, case, "column_wise", str(tmp_path / "one-slim")), expected)
