"""What budgets count, how they read the amount asked, and which they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sseds_rec as sr
from sseds_rec.search.scores import Table
from tests.search.problems import STATES, Problem, problems

TABLES = [Table(rows=10, dim=8), Table(rows=3, dim=4)]


@settings(max_examples=300, deadline=None)
@given(problems())
def test_costs_of_every_width(problem: Problem) -> None:
    budget = problem.budget(0.5)
    for name, table in problem.scores.tables.items():
        widths = range(table.dim + 1)
        costs = budget.costs(table, np.array(widths)).tolist()
        assert costs == [problem.cost(name, width) for width in widths]
        assert costs[0] == 0 and costs == sorted(costs)
    tables = list(problem.scores.tables.values())
    assert budget.total(tables) == problem.full()
    dims = {name: table.dim for name, table in problem.scores.tables.items()}
    assert budget.cost(tables, list(dims.values())) == problem.total(dims)


@pytest.mark.parametrize(
    ("optimizer", "precision", "expected"),
    [
        ("sgd", "fp32", 10 * 8 * 4),
        ("sgd", "fp16", 10 * 8 * 2),
        ("rowwise_adagrad", "bf16", 10 * (8 * 2 + 4)),
        ("adagrad", "fp32", 10 * 8 * (4 + 4)),
        ("adam", "fp16", 10 * 8 * (2 + 8)),
        ("partial_rowwise_adam", "fp32", 10 * (8 * (4 + 4) + 4)),
        ("lamb", "fp32", 10 * 8 * (4 + 8)),
        ("partial_rowwise_lamb", "fp32", 10 * (8 * (4 + 4) + 4)),
        ("lars_sgd", "fp32", 10 * 8 * (4 + 4)),
    ],
)
def test_bytes_of_five_columns_which_are_stored_as_eight(optimizer: Any, precision: Any, expected: int) -> None:
    budget = sr.Budget(bytes=0.5, optimizer=optimizer, precision=precision)
    assert budget.costs(Table(rows=10, dim=16), np.array([5])).tolist() == [expected]


def test_a_billion_rows_do_not_overflow() -> None:
    budget = sr.Budget(bytes=0.5, transforms=True)
    assert budget.total([Table(rows=1_000_000_000, dim=512)] * 3) == 3 * 10**9 * 512 * 12
    assert budget.limit([Table(rows=1_000_000_000, dim=512)] * 3) == 3 * 10**9 * 256 * 12


@pytest.mark.parametrize(
    ("amount", "limit"),
    [
        (0.29, 26),  # of 92; 0.29 as it is written, not its binary neighbour
        (0.25, 23),
        (1.0, 92),
        (1, 92),
        (2, 2),
        (100_000, 100_000),
        (1e-05, 0),
    ],
)
def test_shares_are_of_everything_and_counts_are_counts(amount: float, limit: int) -> None:
    assert sr.Budget(parameters=amount).limit(TABLES) == limit


@given(st.integers(1, 999), st.integers(1, 10**12))
def test_shares_are_decimals(thousandths: int, rows: int) -> None:
    tables = [Table(rows=rows, dim=4)]
    assert sr.Budget(parameters=thousandths / 1000).limit(tables) == thousandths * rows * 4 // 1000


def test_a_share_is_of_the_full_model_which_has_no_transforms() -> None:
    plain, counted = sr.Budget(parameters=0.5), sr.Budget(parameters=0.5, transforms=True)
    assert plain.limit(TABLES) == counted.limit(TABLES) == 46
    assert counted.cost(TABLES, [8, 4]) == 92 + 8 * 8 + 4 * 4


def test_a_budget_is_recorded_as_it_was_asked() -> None:
    assert sr.Budget(parameters=0.1).asked() == {"parameters": 0.1}
    assert sr.Budget(bytes=10**9, optimizer="sgd", precision="fp16", transforms=True).asked() == {
        "bytes": 10**9,
        "optimizer": "sgd",
        "precision": "fp16",
        "transforms": True,
    }
    assert sr.Budget(bytes=0.5, optimizer="adam", precision="fp32").asked() == {"bytes": 0.5}


@settings(max_examples=200, deadline=None)
@given(problems(), st.integers(1, 99), st.integers(2, 6))
def test_budgets_of_rounds_go_down_in_equal_ratios_to_the_budget(problem: Problem, percent: int, rounds: int) -> None:
    budget, tables = problem.budget(percent / 100), list(problem.scores.tables.values())
    everything = budget.cost(tables, [table.dim for table in tables])
    limits = [budget.at(current / rounds, tables).limit(tables) for current in range(rounds + 1)]
    assert limits[-1] == budget.limit(tables)
    if limits[-1] >= 2:
        assert limits[0] == everything and limits == sorted(limits, reverse=True)
        for current, limit in enumerate(limits):
            ideal = everything * (limits[-1] / everything) ** (current / rounds)
            assert abs(limit - ideal) <= 1 + 1e-9 * everything


@pytest.mark.parametrize("value", [0, 0.0, -0.1, 1.5, -3])
@pytest.mark.parametrize("kind", ["parameters", "bytes", "dims"])
def test_budgets_outside_their_range_are_refused(kind: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{kind}={value} is not a share in"):
        sr.Budget(**{kind: value})


@pytest.mark.parametrize(
    ("given_budget", "message"),
    [
        ({}, "give exactly one of parameters, bytes, dims"),
        ({"parameters": 0.1, "dims": 0.1}, "give exactly one of parameters, bytes, dims"),
        ({"parameters": 0.1, "optimizer": "sgd"}, "optimizer and precision change bytes only, .* counts parameters"),
        ({"dims": 0.1, "precision": "fp16"}, "optimizer and precision change bytes only, .* counts dims"),
        ({"dims": 0.1, "transforms": True}, "dims counts columns and no transforms"),
        ({"bytes": 0.1, "optimizer": "adamw"}, "Input should be 'sgd'"),
        ({"bytes": 0.1, "precision": "fp8"}, "Input should be 'fp32'"),
        ({"parameters": float("nan")}, "finite number"),
        ({"parameters": True}, "valid"),
        ({"parameters": "0.1"}, "valid"),
        ({"rows": 0.1}, "Extra inputs"),
    ],
)
def test_budgets_that_say_nothing_or_two_things_are_refused(given_budget: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sr.Budget(**given_budget)


def test_every_optimizer_has_its_states() -> None:
    for optimizer, (wide, single) in STATES.items():
        cost = sr.Budget(bytes=0.5, optimizer=optimizer).costs(Table(rows=1, dim=8), np.array([8]))  # type: ignore[arg-type]
        assert cost.tolist() == [8 * 4 + 8 * 4 * wide + 4 * single]
