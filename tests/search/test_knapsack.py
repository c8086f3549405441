"""The knapsack against all choices there are."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sseds_rec as sr
from sseds_rec.search import knapsack
from tests.search.problems import Problem, problems


@st.composite
def instances(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    """Costs [T, J] that do not fall along a row, values [T, J] of any shape, some of the options missing, and a capacity."""
    classes, options = draw(st.integers(1, 5)), draw(st.integers(2, 5))
    steps = st.integers(0, draw(st.sampled_from([1, 5, 10**6])))
    cost_steps = draw(
        st.lists(st.lists(steps, min_size=options - 1, max_size=options - 1), min_size=classes, max_size=classes)
    )
    costs = np.array([[0, *itertools.accumulate(row)] for row in cost_steps])
    kind = draw(st.sampled_from(["few", "any", "equal densities", "two densities", "falling"]))
    draws = {
        "few": lambda more: draw(st.sampled_from([0.0, 0.5, 1.0, 7.0])),
        "any": lambda more: draw(st.floats(0, 1e6)),
        "equal densities": lambda more: float(more),
        "two densities": lambda more: more * draw(st.sampled_from([1.0, 2.0])),
        "falling": lambda more: draw(st.floats(-10, 10)),
    }
    gains = [[draws[kind](more) for more in row] for row in cost_steps]
    values = np.array([[0.0, *itertools.accumulate(row)] for row in gains])
    for row in range(classes):
        missing = draw(st.integers(0, options - 1)) if draw(st.booleans()) else 0
        costs[row, options - missing :] = costs[row, options - missing - 1]
        values[row, options - missing :] = -math.inf
    return costs, values, draw(st.integers(0, int(costs[:, -1].sum()) + 1))


def _worth(costs: np.ndarray, values: np.ndarray, options: Any) -> tuple[int, float]:
    rows = np.arange(len(costs))
    return int(costs[rows, options].sum()), float(values[rows, options].sum())


def _rounding(values: np.ndarray) -> float:
    """What sums of these values cannot tell apart."""
    return 1e-11 * float(values.max(axis=1).sum())


def _best(costs: np.ndarray, values: np.ndarray, capacity: int) -> float:
    every = itertools.product(range(costs.shape[1]), repeat=len(costs))
    found = (_worth(costs, values, np.array(options)) for options in every)
    return max(value for cost, value in found if cost <= capacity)


@settings(max_examples=500, deadline=None)
@given(instances(), st.sampled_from([1, 2, 128]))
def test_it_is_the_best_of_all_choices(instance: tuple[np.ndarray, np.ndarray, int], states: int) -> None:
    costs, values, capacity = instance
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack, "_FEWEST_STATES", states)  # so that some are dropped, and it has to start again
        choice = knapsack.solve(costs, values, capacity)
    cost, value = _worth(costs, values, choice.options)
    assert choice.gap == 0 and cost <= capacity
    assert value == pytest.approx(_best(costs, values, capacity), rel=1e-11, abs=_rounding(values))


@settings(max_examples=300, deadline=None)
@given(instances())
def test_where_it_ends_early_it_says_how_much_better_the_best_may_be(
    instance: tuple[np.ndarray, np.ndarray, int],
) -> None:
    costs, values, capacity = instance
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack, "_FEWEST_STATES", 1)
        patch.setattr(knapsack, "_MOST_WORK", 0)
        choice = knapsack.solve(costs, values, capacity)
    cost, value = _worth(costs, values, choice.options)
    best = _best(costs, values, capacity)
    assert cost <= capacity and best - value <= choice.gap * best + _rounding(values)


def test_there_are_instances_at_which_it_ends_early(monkeypatch: pytest.MonkeyPatch) -> None:
    costs, values = np.array([[0, 5, 9], [0, 7, 11], [0, 4, 13]]), np.array([[0.0, 6, 10], [0, 8, 12.5], [0, 4.5, 14]])
    monkeypatch.setattr(knapsack, "_FEWEST_STATES", 1)
    monkeypatch.setattr(knapsack, "_MOST_WORK", 0)
    gaps = [knapsack.solve(costs, values, capacity).gap for capacity in range(30)]
    assert max(gaps) > 0


@pytest.mark.parametrize("capacity", [0, 3])
def test_a_capacity_that_holds_nothing(capacity: int) -> None:
    choice = knapsack.solve(np.array([[0, 4], [0, 5]]), np.array([[0.0, 1.0], [0.0, 1.0]]), capacity)
    assert choice.options.tolist() == [0, 0] and choice.gap == 0


def test_everything_fits() -> None:
    choice = knapsack.solve(np.array([[0, 4, 8], [0, 5, 9]]), np.array([[0.0, 1.0, 1.0], [0.0, 1.0, 3.0]]), 100)
    assert choice.options.tolist() == [1, 2]  # what is worth nothing more is not taken


def test_values_may_be_as_small_as_numbers_are() -> None:
    costs, values = np.array([[0, 2, 4], [0, 3, 6]]), np.array([[0.0, 5e-324, 1e-323], [0.0, 1e-323, 1.5e-323]])
    assert [knapsack.solve(costs, values, capacity).options.tolist() for capacity in (0, 3, 5, 9)] == [
        [0, 0],
        [0, 1],
        [1, 1],
        [2, 1],
    ]


def test_what_costs_nothing_and_is_worth_nothing_is_not_taken() -> None:
    """As columns are that only fill up the width at which a table is stored."""
    costs, values = np.array([[0, 5, 5], [0, 1, 1]]), np.array([[0.0, 3.0, 3.0], [0.0, 2.0, 2.0]])
    assert knapsack.solve(costs, values, 5).options.tolist() == [1, 0]


@settings(max_examples=300, deadline=None)
@given(problems(tables=3), st.floats(0.0, 1.2))
def test_an_allocation_is_the_best_of_all_widths(problem: Problem, part: float) -> None:
    problem.floor_share = 0.0  # which is held before
    amount = max(2, int(part * problem.full()))

    def value(widths: dict[str, int]) -> float:
        total = 0.0
        for name, width in widths.items():
            rows = problem.scores.tables[name].rows if problem.kind != "dims" else 1
            starts = range(problem.limits[name][0], width, problem.multiple)
            total += sum(problem.key(name, start) * rows for start in starts)
        return total

    every = (
        dict(zip(problem.names, widths, strict=True))
        for widths in itertools.product(*(range(a, b + 1, problem.multiple) for a, b in problem.limits.values()))
    )
    best = max((value(widths) for widths in every if problem.total(widths) <= amount), default=None)
    try:
        plan = problem.allocate(amount, "knapsack")
    except sr.UserError:
        assert not best  # no widths, or none that are worth something
        return
    assert value(plan.dims()) == pytest.approx(best, rel=1e-11) and "knapsack_gap" not in plan.search


@settings(max_examples=200, deadline=None)
@given(problems(), st.floats(0.0, 1.2))
def test_no_column_that_scores_nothing_is_kept(problem: Problem, part: float) -> None:
    problem.rules, problem.min_dim = {}, 0
    try:
        plan = problem.allocate(max(2, int(part * problem.full())), "knapsack")
    except sr.UserError:
        return
    for name, width in plan.dims().items():
        assert width == 0 or problem.key(name, width - problem.multiple) > 0


def _many_tables(exponent: float, multiple: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    rows = (10 ** random.uniform(1, 8, (300, 1))).astype(np.int64)
    scores = np.exp(random.normal(0, 2, (300, 1))) * random.exponential(size=(300, 128))
    keys = -np.sort(-scores, axis=1).reshape(300, -1, multiple).mean(axis=2)
    values = np.hstack([np.zeros((300, 1)), (keys * rows ** (1 - exponent)).cumsum(axis=1)])
    return rows * np.arange(0, 129, multiple), values


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("multiple", [1, 4])
def test_many_tables_are_solved_to_the_end(exponent: float, multiple: int) -> None:
    costs, values = _many_tables(exponent, multiple)
    capacity = int(costs[:, -1].sum()) // 10
    choice = knapsack.solve(costs, values, capacity)
    cost, _ = _worth(costs, values, choice.options)
    assert choice.gap == 0 and 0.9999 * capacity < cost <= capacity
