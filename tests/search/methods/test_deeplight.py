"""DeepLight's pruning: its schedule, followed to the element while weights change, on one rank and on two."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch

from sseds_rec.search.elements import Elements
from sseds_rec.search.methods.deeplight import DeepLightConfig, Pruning
from sseds_rec.training.optimizers import fuse_table_optimizer
from tests.ranks import run_ranks
from tests.search.placed import shard
from tests.search.zoo import DIM, TABLES, Case, build

TOTAL = sum(rows * DIM for rows, _ in TABLES.values())
EPOCHS, EPOCH_STEPS, EVERY, KEEP = 3, 14, 5, 101
DAMPING, DAMPING_STEPS = 0.9, 2


def _zeros_after_each_step(rank: int, world_size: int, kind: str) -> list[int]:
    model = build(Case(), "meta")
    if kind != "data_parallel":
        fuse_table_optimizer(model, "adagrad", 0.1, "auto")
    sharded = shard(model, dict.fromkeys(TABLES, kind))
    config = DeepLightConfig(epochs=EPOCHS, damping=DAMPING, damping_steps=DAMPING_STEPS, every=EVERY)
    elements = Elements(sharded)
    pruning = Pruning(elements, KEEP, config, EPOCH_STEPS)
    random = torch.Generator().manual_seed(5 if kind == "data_parallel" else rank)
    zeros = []
    for step in range(1, EPOCHS * EPOCH_STEPS + 1):
        for part in elements.parts:  # training moves all of them, pruned ones too
            part.values.add_(torch.randn(part.values.shape, generator=random))
        assert pruning(step) is False
        zeros.append(TOTAL - sum(one.nonzeros for one in elements.stored().values()))
    return zeros


def _scheduled(step: int) -> int:
    """(TOTAL - KEEP) (1 - √.9^k) rounded down, in rational numbers: the largest n with (1 - n/(TOTAL - KEEP))² >= .9^k."""
    if step == EPOCHS * EPOCH_STEPS:
        return TOTAL - KEEP
    pruned = 0
    while (1 - Fraction(pruned + 1, TOTAL - KEEP)) ** 2 >= Fraction(9, 10) ** step:
        pruned += 1
    return pruned


@pytest.mark.parametrize(("ranks", "kind"), [(1, "table_wise"), (2, "row_wise"), (2, "data_parallel")])
def test_sparsity_is_the_schedules_at_every_pruning_and_exact_at_the_end(ranks: int, kind: str) -> None:
    answers: list[Any] = run_ranks(ranks, _zeros_after_each_step, kind)
    prunings = {step for step in range(1, EPOCHS * EPOCH_STEPS + 1) if step % EVERY == 0 or step % EPOCH_STEPS == 0}
    expected = [_scheduled(step) if step in prunings else 0 for step in range(1, EPOCHS * EPOCH_STEPS + 1)]
    assert answers == [expected] * ranks
    assert 0 < expected[4] < expected[9] < expected[39] < expected[41] == TOTAL - KEEP


def test_the_defaults_are_the_papers() -> None:
    pruning = Pruning(type("Elements", (), {"total": 10**6})(), 100_000, DeepLightConfig(epochs=1), 10**6)
    assert pruning.scheduled(100) == 9_000  # S (1 - .99)
    assert pruning.scheduled(200) == 17_910  # S (1 - .9801)
    assert pruning.scheduled(10**6) == 900_000
