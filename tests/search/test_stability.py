"""What scores say of other batches, against other batches."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sseds_rec as sr
from sseds_rec.constants import STABLE
from sseds_rec.search.scores import DimensionScores, Table
from sseds_rec.search.stability import expected_overlap, standard_errors
from tests.search.reference import ClickModel, make_batch, make_rows

BATCHES, ROWS = 16, 24
PLAN = partial(sr.allocate, budget=sr.Budget(dims=0.5), multiple=1, exponent=0.0)


@pytest.fixture(scope="module")
def model() -> ClickModel:
    torch.manual_seed(3)
    return ClickModel().eval()


def _batches(seed: int, count: int = BATCHES) -> list[Any]:
    rows = make_rows(count * ROWS, seed)
    return [make_batch(rows, first, first + ROWS) for first in range(0, count * ROWS, ROWS)]


def _flat(scores: Any) -> Tensor:
    return torch.cat(list(scores.values()))


def _kept(scores: DimensionScores) -> set[tuple[str, int]]:
    return {(name, column) for name, table in PLAN(scores).tables.items() for column in table.kept}


@pytest.mark.parametrize("criterion", ["snip", "ggn"])
def test_errors_and_overlap_are_those_of_batches_drawn_again(model: ClickModel, criterion: str) -> None:
    drawn = [sr.score_dimensions(model, _batches(seed), criterion) for seed in range(24)]
    actual = torch.stack([_flat(scores) for scores in drawn]).std(dim=0)
    errors = [standard_errors(scores) for scores in drawn[:10]]
    estimated = torch.stack([_flat(found) for found in errors if found]).mean(dim=0)
    assert len(estimated) == len(actual)
    ratio = estimated / actual
    assert 0.8 < float(ratio.median()) < 1.2
    assert float(ratio.min()) > 0.5 and float(ratio.max()) < 2.0

    kept = [_kept(scores) for scores in drawn]
    pairs = [2 * len(a & b) / (len(a) + len(b)) for a, b in itertools.combinations(kept, 2)]
    expected = np.mean([expected_overlap(scores, PLAN) for scores in drawn[:10]])
    assert expected == pytest.approx(np.mean(pairs), abs=0.08)


def test_one_batch_says_nothing_of_others(model: ClickModel) -> None:
    scores = sr.score_dimensions(model, _batches(0), num_batches=1)
    assert standard_errors(scores) is None
    assert math.isnan(expected_overlap(scores, PLAN))
    given = DimensionScores({"t": torch.ones(4)}, {"t": Table(10, 4)}, {})
    assert standard_errors(given) is None


def test_more_batches_than_are_kept_apart_still_all_count(model: ClickModel) -> None:
    rows = make_rows(70 * ROWS, seed=1)
    many = sr.score_dimensions(model, [make_batch(rows, n * ROWS, (n + 1) * ROWS) for n in range(70)], "ggn")
    one = sr.score_dimensions(model, [make_batch(rows, 0, 70 * ROWS)], "ggn")
    assert many.search["batches"] == 70 and many.draws is not None and many.draws.groups == 32
    torch.testing.assert_close(dict(many), dict(one), rtol=1e-5, atol=0)


def test_auto_takes_as_many_batches_as_the_plan_needs(model: ClickModel) -> None:
    rows = make_rows(128, seed=0)
    small = [make_batch(rows, first, first + 1) for first in range(128)]
    budget = sr.Budget(dims=0.2)
    plan = partial(sr.allocate, multiple=1, exponent=0.0)
    bound = partial(plan, budget=budget)
    found = sr.score_dimensions(model, small, "taylor_abs", "auto", budget=budget, allocation=plan)
    assert found.search["batches"] == 64
    assert expected_overlap(found, bound) >= STABLE
    for fewer in (8, 16, 32):
        assert expected_overlap(sr.score_dimensions(model, small, "taylor_abs", fewer), bound) < STABLE
    ended = sr.score_dimensions(model, small[:10], "taylor_abs", "auto", budget=budget, allocation=plan)
    assert ended.search["batches"] == 10
