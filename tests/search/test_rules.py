"""Limits to single tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sseds_rec as sr
from sseds_rec.search.rules import width_bounds
from sseds_rec.search.scores import Table
from tests.search.problems import make_scores

TABLES = {"user": Table(20, 16), "item": Table(20, 16)}


@pytest.mark.parametrize(
    ("rule", "min_dim", "multiple", "expected"),
    [
        ({}, 0, 4, (0, 16)),
        ({}, 5, 4, (8, 16)),
        ({}, 99, 4, (16, 16)),  # a floor above a table's width is all of it
        ({"min_dim": 5}, 0, 4, (8, 16)),
        ({"min_dim": 5}, 0, 1, (5, 16)),
        ({"min_dim": 5}, 12, 4, (12, 16)),
        ({"max_dim": 7}, 0, 4, (0, 4)),
        ({"max_dim": 7}, 0, 1, (0, 7)),
        ({"max_dim": 99}, 0, 4, (0, 16)),
        ({"max_dim": 7}, 8, 4, (4, 4)),  # a rule comes before min_dim
        ({"min_dim": 3, "max_dim": 9}, 0, 8, (8, 8)),
        ({"fixed": 8}, 12, 4, (8, 8)),
        ({"fixed": 0}, 4, 4, (0, 0)),
        ({"fixed": 0}, 4, 16, (0, 0)),
        ({"drop": "never"}, 0, 4, (4, 16)),
        ({"drop": "never"}, 0, 1, (1, 16)),
        ({"drop": "never", "max_dim": 8}, 0, 8, (8, 8)),
        ({"drop": "never", "min_dim": 5}, 0, 4, (8, 16)),
        ({"drop": "never", "fixed": 4}, 0, 4, (4, 4)),
    ],
)
def test_bounds(rule: Any, min_dim: int, multiple: int, expected: tuple[int, int]) -> None:
    bounds = width_bounds(TABLES, multiple, min_dim, {"item": sr.TableRule(**rule)})
    assert bounds["item"] == expected
    assert bounds["user"] == width_bounds(TABLES, multiple, min_dim, None)["user"]


@pytest.mark.parametrize("order", ["knapsack", "fill", "stop"])
def test_plans_keep_the_rules(order: Any) -> None:
    torch.manual_seed(0)
    scores = make_scores(torch.rand(5, 16).tolist(), [50] * 5)
    rules = {
        "t0": sr.TableRule(fixed=12),
        "t1": sr.TableRule(max_dim=4),
        "t2": sr.TableRule(min_dim=5),
        "t3": sr.TableRule(drop="never", max_dim=7),
        "t4": sr.TableRule(fixed=0),
    }
    plan = sr.allocate(scores, sr.Budget(dims=0.6), order=order, tables=rules)
    dims = plan.dims()
    assert dims["t0"] == 12 and dims["t1"] <= 4 and dims["t2"] >= 8 and dims["t3"] == 4 and dims["t4"] == 0
    assert plan.tables["t0"].kept == sorted(torch.argsort(scores["t0"], descending=True)[:12].tolist())


@pytest.mark.parametrize("order", ["knapsack", "fill", "stop"])
def test_rules_may_leave_nothing_open(order: Any) -> None:
    scores = make_scores([[1.0] * 16] * 2, [20, 20])
    plan = sr.allocate(scores, sr.Budget(dims=0.5), order=order, tables={n: sr.TableRule(fixed=8) for n in scores})
    assert plan.dims() == {"t0": 8, "t1": 8}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"t0": {"fixed": 20}}, "table t0: fixed=20, but it has 16 columns; lower it"),
        ({"t0": {"min_dim": 20}}, "table t0: min_dim=20, but it has 16 columns; lower it"),
        ({"t0": {"fixed": 6}}, "table t0: fixed=6 is not a multiple of 4"),
        ({"t0": {"max_dim": 3}}, "table t0: max_dim=3 leaves no width .* or set fixed=0 to drop the table"),
        ({"t1": {"min_dim": 5, "max_dim": 7}}, "table t1: max_dim=7 with min_dim=5 leaves no width .*; raise max_dim$"),
        ({"t10": {"fixed": 0}}, r"a rule for table t10: there is no such table; did you mean t1\?"),
        ({"other": {"fixed": 0}}, "a rule for table other: there is no such table; the tables are t0, t1"),
        ({"t0": {"fixed": 0}, "t1": {"fixed": 0}}, "the rules drop every table; leave one without fixed=0"),
        (
            {"t0": {"min_dim": 16}, "t1": {"min_dim": 16}},
            "the rules for tables need 640, the budget allows 320; lower them or raise the budget",
        ),
    ],
)
def test_rules_that_cannot_be_kept_are_refused_in_one_line(rules: Any, message: str) -> None:
    scores = make_scores([[1.0] * 16] * 2, [20, 20])
    with pytest.raises(sr.UserError, match=message) as caught:
        sr.allocate(scores, sr.Budget(parameters=0.5), tables={n: sr.TableRule(**r) for n, r in rules.items()})
    assert "\n" not in str(caught.value)


def test_floors_that_the_budget_cannot_hold_are_refused() -> None:
    scores = make_scores([[1.0] * 16] * 2, [20, 20])
    with pytest.raises(
        sr.UserError, match="^a floor of 5 columns in each of 2 tables needs 320, the budget allows 64; lower min_dim"
    ):
        sr.allocate(scores, sr.Budget(parameters=0.1), min_dim=5)
    rules = {"t0": sr.TableRule(min_dim=16)}
    with pytest.raises(
        sr.UserError, match="^a floor of 5 columns in each of 2 tables and the rules for tables need 480,"
    ):
        sr.allocate(scores, sr.Budget(parameters=0.1), min_dim=5, tables=rules)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"fixed": 4, "min_dim": 4}, "fixed=4 already says how many columns stay"),
        ({"fixed": 4, "max_dim": 8}, "fixed=4 already says how many columns stay"),
        ({"fixed": 0, "drop": "never"}, "fixed=0 drops the table and drop=never keeps it"),
        ({"min_dim": 8, "max_dim": 4}, "min_dim=8 is above max_dim=4"),
        ({"max_dim": 0}, "greater than or equal to 1"),
        ({"min_dim": -1}, "greater than or equal to 0"),
        ({"drop": "always"}, "Input should be 'never'"),
        ({"width": 4}, "Extra inputs"),
    ],
)
def test_rules_that_contradict_themselves_are_refused(rule: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sr.TableRule(**rule)
