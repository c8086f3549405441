"""Every embedding module and placement: models slimmed from shard to shard and through checkpoints, against masked plain ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.model_parallel import DistributedModelParallel

import sseds_rec as sr
from tests.ranks import run_ranks
from tests.search import placed
from tests.search.zoo import (
    ROWS,
    TABLES,
    Case,
    build,
    fill_maps,
    make_batch,
    plain_model,
    weights_of,
)
from tests.slim.moves import convert, load, mask, plan_keeping, save, shards, train

CUTS = {1: [(0, ROWS)], 2: [(0, 25), (25, ROWS)], 4: [(0, 5), (5, 20), (20, 31), (31, ROWS)]}
#: Of a width that is stored wider, of all columns, of a table of two features, and of none.
KEPT = {"t0": [0, 3, 6], "t1": list(range(8)), "t2": [1, 2, 5, 7], "t3": []}
EVERY = ["table_wise", "row_wise", "column_wise", "data_parallel"]


def _sharded(case: Case, types: list[str], model: nn.Module | None = None) -> DistributedModelParallel:
    """Sharded so, with a fused optimizer."""
    made = build(case, "meta") if model is None else model
    tables = [p for name, p in made.named_parameters() if name.endswith(".weight") and ".embedding" in name]
    fresh = [p for p in tables if not hasattr(p, "_optimizer_classes")]
    kind = torch.optim.SGD if case.repeats else torch.optim.Adagrad  # FBGEMM cannot do Adagrad then
    apply_optimizer_in_backward(kind, fresh, {"lr": 0.05})
    named = {name.split(".")[-2] for name, p in made.named_parameters() if any(p is own for own in tables)}
    return placed.shard(made, {t: own for t, own in zip(TABLES, types, strict=True) if t in named})


def _full(case: Case, types: list[str]) -> DistributedModelParallel:
    model = _sharded(case, types)
    placed.load(model, weights_of(case))
    fill_maps(model)
    return model


def _logits(model: nn.Module, case: Case, rank: int, world_size: int) -> Tensor:
    model.eval()
    return model(make_batch(case, *CUTS[world_size][rank]))[1]


def _both_ways(
    rank: int, world_size: int, case: Case, sources: list[str], targets: list[str], folder: str
) -> tuple[Tensor, list[float], dict[str, tuple[Tensor, Tensor]]]:
    """Logits of the slim model made live, losses of training it, and what the two ways left on this rank."""
    full = _full(case, sources)
    rows = ROWS // world_size  # TorchRec's backward on gloo wants as many on every rank
    batch = make_batch(case, rank * rows, (rank + 1) * rows)
    full.train()
    trains = not case.repeats  # which TorchRec cannot on gloo, where batches are to be even
    for _ in range(2 if trains and case.kind not in ("mc", "mcec") else 0):  # so that there is optimizer state
        full(batch)[0].backward()
    placed.load(full, weights_of(case))
    plan = plan_keeping(build(case, "meta"), KEPT)
    live = sr.slim(full, plan, shard=lambda model: _sharded(case, targets, model))
    logits = _logits(live, case, rank, world_size)
    save(full, folder)
    loaded = _sharded(case, targets, sr.slim(build(case, "meta"), plan))
    load(loaded, convert(folder, plan))
    both = {
        name: (one.clone(), other.clone())
        for (name, one), (_, other) in zip(shards(live.state_dict()), shards(loaded.state_dict()), strict=True)
    }
    losses = train(live, lambda: live(batch)[0]) if trains else [1.0, 0.0]
    return logits, losses, both


def _compare(world_size: int, case: Case, sources: list[str], targets: list[str], folder: Path) -> None:
    masked = plain_model(case).eval()
    mask(masked, KEPT)
    answers = run_ranks(world_size, _both_ways, case, sources, targets, str(folder / "full"))
    for (logits, _, both), cut in zip(answers, CUTS[world_size], strict=True):
        torch.testing.assert_close(logits, masked(make_batch(case, *cut))[1], rtol=0, atol=1e-6)
        assert any(".embedding" in name for name in both)
        for name, (live, loaded) in both.items():
            assert torch.equal(live, loaded), name
    assert sum(losses[-1] - losses[0] for _, losses, _ in answers) < 0


@pytest.mark.parametrize("target", EVERY)
@pytest.mark.parametrize("source", EVERY)
def test_any_placement_to_any_other(source: str, target: str, tmp_path: Path) -> None:
    _compare(2, Case(), [source] * 4, [target] * 4, tmp_path)


@pytest.mark.parametrize(
    ("case", "sources", "targets"),
    [
        (Case("ec"), ["table_wise", "row_wise", "column_wise", "row_wise"], ["row_wise"] * 4),
        (Case("ec"), ["row_wise"] * 4, ["column_wise", "table_wise", "row_wise", "table_wise"]),
        (Case("fp"), EVERY, ["row_wise"] * 4),
        (Case("mc"), ["row_wise"] * 4, ["row_wise"] * 4),
        (Case("mcec"), ["row_wise"] * 4, ["row_wise"] * 4),
        (Case(weighted=True), EVERY, EVERY[::-1]),
        (Case(pooling="MEAN"), ["table_wise", "column_wise", "data_parallel", "table_wise"], ["column_wise"] * 4),
        (Case(twice=True), EVERY, EVERY[::-1]),
        (Case(repeats=True), ["table_wise", "row_wise", "column_wise", "row_wise"], ["table_wise"] * 4),
    ],
    ids=str,
)
def test_every_module(case: Case, sources: list[str], targets: list[str], tmp_path: Path) -> None:
    _compare(2, case, sources, targets, tmp_path)


@pytest.mark.parametrize("world_size", [1, 4])
def test_on_other_numbers_of_ranks(world_size: int, tmp_path: Path) -> None:
    _compare(
        world_size, Case(), [*EVERY[:3], "row_wise"], ["row_wise", "column_wise", "table_wise", "row_wise"], tmp_path
    )
