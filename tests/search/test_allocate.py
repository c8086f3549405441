"""The orders against a slow reading of their definitions and by what they promise, and the plan as a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.modules.embedding_configs import PoolingType

import sseds_rec as sr
from sseds_rec.search.scores import DimensionScores, Table
from tests.search.problems import Problem, make_scores, problems

GREEDY = ("stop", "fill")
ORDERS = ("stop", "fill", "knapsack")
#: What is asked, as a part of what everything costs; above 1 for the transforms.
PARTS = st.floats(0.0, 1.5)


def _scores(values: dict[str, list[float]], rows: dict[str, int]) -> DimensionScores:
    tables = {name: Table(rows[name], len(own), (f"feature_{name}",)) for name, own in values.items()}
    return DimensionScores(
        {name: torch.tensor(own, dtype=torch.float64) for name, own in values.items()}, tables, {"criterion": "snip"}
    )


def _plan(problem: Problem, amount: int, order: str) -> sr.DimensionPlan | None:
    """The plan, or None where the amount allows none."""
    try:
        return problem.allocate(amount, order)
    except sr.UserError as error:
        assert "\n" not in str(error) and ("raise the budget" in str(error) or "drop every table" in str(error))
        return None


@settings(max_examples=400, deadline=None)
@given(problems(), PARTS, st.sampled_from(GREEDY))
def test_the_greedy_orders_follow_their_definition(problem: Problem, part: float, order: str) -> None:
    amount = max(2, int(part * problem.full()))
    plan = _plan(problem, amount, order)
    floors = problem.total({name: fewest for name, (fewest, _) in problem.limits.items()})
    if floors > amount:
        assert plan is None
        return
    widths = problem.widths(amount, order)
    assert (plan.dims() if plan else dict.fromkeys(problem.names, 0)) == widths
    for name, table in plan.tables.items() if plan else ():
        assert table.kept == sorted(problem.best_columns(name)[: widths[name]])


@settings(max_examples=400, deadline=None)
@given(problems(), st.integers(1, 100), st.sampled_from(ORDERS))
def test_the_reached_budget_is_counted_right_and_never_above_the_asked(
    problem: Problem, percent: int, order: str
) -> None:
    plan = _plan(problem, percent / 100, order)
    if plan is None:
        return
    kept, full = problem.total(plan.dims()), problem.full()
    assert kept * 100 <= percent * full  # in whole numbers
    counted = (
        "parameters_and_transforms" if problem.kind == "parameters" and problem.options["transforms"] else problem.kind
    )
    assert plan.reached[counted] == {"kept": kept, "of": full, "fraction": kept / full}
    assert plan.reached["parameters"]["kept"] == sum(t.rows * len(t.kept) for t in plan.tables.values())
    assert plan.reached["stored_parameters"]["kept"] == sum(t.rows * t.stored_dim for t in plan.tables.values())
    assert plan.reached["dims"]["kept"] == sum(len(t.kept) for t in plan.tables.values())
    for name, table in plan.tables.items():
        assert table.stored_dim % 4 == 0 and 0 <= table.stored_dim - len(table.kept) < 4
        assert table.kept == sorted(problem.best_columns(name)[: len(table.kept)])
        fewest, most = problem.limits[name]
        assert fewest <= len(table.kept) <= most and len(table.kept) % problem.multiple == 0


@settings(max_examples=150, deadline=None)
@given(problems(), st.lists(PARTS, min_size=2, max_size=8), st.sampled_from(GREEDY))
def test_more_budget_never_drops_a_column_in_the_greedy_orders(
    problem: Problem, parts: list[float], order: str
) -> None:
    before: sr.DimensionPlan | None = None
    for part in sorted(parts):
        plan = _plan(problem, max(2, int(part * problem.full())), order)
        for name, table in before.tables.items() if before else ():
            assert plan is not None and set(table.kept) <= set(plan.tables[name].kept)
        before = plan


@settings(max_examples=300, deadline=None)
@given(problems(), PARTS)
def test_fill_spends_two_thirds_of_the_budget_or_nothing_more_fits(problem: Problem, part: float) -> None:
    amount = max(2, int(part * problem.full()))
    plan = _plan(problem, amount, "fill")
    if plan is None:
        return
    spent = problem.total(plan.dims())
    for name, width in plan.dims().items():
        if width < problem.limits[name][1]:
            more = problem.cost(name, width + problem.multiple) - problem.cost(name, width)
            assert spent + more > amount or 3 * spent > 2 * amount


@settings(max_examples=100, deadline=None)
@given(problems(), PARTS, st.sampled_from(ORDERS))
def test_the_same_question_has_the_same_answer(problem: Problem, part: float, order: str) -> None:
    plans = [_plan(problem, max(2, int(part * problem.full())), order) for _ in range(2)]
    assert plans[0] == plans[1]


@pytest.mark.parametrize("order", ORDERS)
def test_ties_go_to_the_first_table_and_the_lower_columns(order: Any) -> None:
    scores = make_scores([[1.0] * 8] * 3, [5, 5, 5])
    plan = sr.allocate(scores, sr.Budget(parameters=20), order=order)
    assert [table.kept for table in plan.tables.values()] == [[0, 1, 2, 3], [], []]


@pytest.mark.parametrize("order", GREEDY)
def test_ties_fill_one_table_before_the_next(order: Any) -> None:
    plan = sr.allocate(make_scores([[1.0] * 8] * 3, [5, 5, 5]), sr.Budget(parameters=0.5), order=order)
    assert [table.kept for table in plan.tables.values()] == [[*range(8)], [0, 1, 2, 3], []]


@settings(max_examples=100, deadline=None)
@given(problems(multiples=(8, 16), groups=3), PARTS, st.sampled_from(GREEDY))
def test_wider_multiples(problem: Problem, part: float, order: str) -> None:
    amount = max(2, int(part * problem.full()))
    plan = _plan(problem, amount, order)
    if plan is not None:
        assert all(len(table.kept) % problem.multiple == 0 for table in plan.tables.values())
        assert problem.total(plan.dims()) <= amount


def test_paper_order_equals_a_threshold_on_the_scores() -> None:
    """Eq. 12: α = 1(s >= s~), the threshold being the lowest that stays in the budget."""
    torch.manual_seed(0)
    rows = {"a": 3, "b": 40, "c": 11}
    scores = _scores({name: torch.rand(8).tolist() for name in rows}, rows)
    plan = sr.allocate(scores, sr.Budget(parameters=0.3), multiple=1, exponent=0.0, order="stop")
    every = sorted((float(s) for values in scores.values() for s in values), reverse=True)
    fitting = [
        t
        for t in every
        if sum(rows[n] * int((v >= t).sum()) for n, v in scores.items()) <= 0.3 * 8 * sum(rows.values())
    ]
    threshold = min(fitting)
    assert {n: t.kept for n, t in plan.tables.items()} == {
        n: torch.nonzero(v >= threshold).flatten().tolist() for n, v in scores.items()
    }


def test_ranking_by_rows_keeps_fields_that_the_paper_order_drops() -> None:
    scores = _scores(
        {"big": [9.0, 8.0, 7.0, 6.0] * 2, "small": [1.0] * 8, "tiny": [0.5] * 8}, {"big": 100, "small": 10, "tiny": 2}
    )
    budget = sr.Budget(parameters=0.6)
    assert sr.allocate(scores, budget, exponent=0.0, order="stop").dims() == {"big": 4, "small": 0, "tiny": 0}
    assert sr.allocate(scores, budget, exponent=0.5, order="knapsack").dims() == {"big": 4, "small": 8, "tiny": 8}


def test_fill_lets_small_groups_go_before_a_large_one_until_it_is_half_of_what_is_kept() -> None:
    """Groups cost 40 of "big", 8 of "small" and 4 of "tiny", and are ranked in that order."""
    scores = _scores({"big": [9.0] * 8, "small": [5.0] * 40, "tiny": [1.0] * 40}, {"big": 10, "small": 2, "tiny": 1})
    at = {
        amount: sr.allocate(scores, sr.Budget(parameters=amount), exponent=0.0, order="fill").dims()
        for amount in (4, 15, 16, 79, 80, 119, 120)
    }
    assert at[4] == {"big": 0, "small": 0, "tiny": 4}  # the cheapest, for want of anything small
    assert at[15] == {"big": 0, "small": 0, "tiny": 12}
    assert at[16] == {"big": 0, "small": 0, "tiny": 16}  # and from here on "small" is
    assert at[79] == {"big": 0, "small": 28, "tiny": 16}
    assert at[80] == {"big": 0, "small": 32, "tiny": 16}  # now big's 40 are half of it, and they come next
    assert at[119] == at[80] and at[120] == {"big": 4, "small": 32, "tiny": 16}


@pytest.mark.parametrize("order", ["knapsack", "fill"])
def test_a_soft_floor_keeps_every_table_that_scores_as_far_as_the_budget_goes(order: Any) -> None:
    scores = make_scores([[10.0] * 16, [0.2] * 16, [0.1] * 16, [0.0] * 16], [10, 10, 10, 10])
    plan = sr.allocate(scores, sr.Budget(dims=0.25), order=order, floor_share=0.001)
    assert list(plan.dims().values()) == [8, 4, 4, 0]
    plan = sr.allocate(scores, sr.Budget(dims=8), order=order, floor_share=0.001)
    assert list(plan.dims().values()) == [4, 4, 0, 0]  # the larger shares first


def test_the_plan_says_how_it_was_made() -> None:
    scores = _scores({"a": [1.0] * 8, "b": [2.0] * 8}, {"a": 10, "b": 10})
    plan = sr.allocate(scores, sr.Budget(dims=0.5), order="fill")
    assert plan.search == {"criterion": "snip", "multiple": 4, "min_dim": 0, "exponent": 0.5, "order": "fill"}
    rules = {"a": sr.TableRule(drop="never")}
    plan = sr.allocate(scores, sr.Budget(dims=0.5), order="fill", floor_share=0.1, tables=rules)
    assert plan.search["floor_share"] == 0.1 and plan.search["tables"] == {"a": {"drop": "never"}}


def test_impossible_allocations_are_refused() -> None:
    scores = _scores({"a": [1.0] * 6, "b": [1.0] * 6}, {"a": 10, "b": 10})
    with pytest.raises(sr.UserError, match="table a: embedding_dim 6 is not a multiple of 4"):
        sr.allocate(scores, sr.Budget(parameters=0.5))
    with pytest.raises(sr.UserError, match="keeps no column: the cheapest group of 2 costs 20"):
        sr.allocate(scores, sr.Budget(parameters=19), multiple=2)
    with pytest.raises(sr.UserError, match="every score is zero"):
        _scores({"a": [0.0] * 4}, {"a": 1})
    with pytest.raises(sr.UserError, match="table a: its scores are not finite"):
        _scores({"a": [float("nan")] * 4}, {"a": 1})


def test_an_order_that_keeps_nothing_is_refused() -> None:
    scores = _scores({"large": [1.0] * 4, "small": [0.0] * 4}, {"large": 1000, "small": 1})
    with pytest.raises(sr.UserError, match="cannot hold the first-ranked columns, and order=stop ends there"):
        sr.allocate(scores, sr.Budget(parameters=100), order="stop")
    with pytest.raises(sr.UserError, match="the columns that the budget can hold score 0"):
        sr.allocate(scores, sr.Budget(parameters=100), order="knapsack")
    assert sr.allocate(scores, sr.Budget(parameters=100), order="fill").dims() == {"large": 0, "small": 4}


@pytest.mark.parametrize("order", ORDERS)
def test_a_thousand_tables(order: Any) -> None:
    torch.manual_seed(0)
    scores = make_scores(torch.rand(1000, 512).tolist(), [10 + i for i in range(1000)])
    plan = sr.allocate(scores, sr.Budget(parameters=0.1), order=order)
    assert 0.0999 < plan.reached["parameters"]["fraction"] <= 0.1


def test_plan_round_trip_and_configs(tmp_path: Path) -> None:
    scores = _scores({"a": [1.0, 9.0, 8.0, 0.0, 1.0], "b": [0.0] * 5}, {"a": 10, "b": 4})
    plan = sr.allocate(scores, sr.Budget(parameters=0.5), multiple=1)
    plan.save(tmp_path / "plan.json")
    assert sr.DimensionPlan.load(tmp_path / "plan.json") == plan
    saved = json.loads((tmp_path / "plan.json").read_text())
    assert saved["version"] == 1 and saved["budget"] == {"parameters": 0.5}
    assert {"rows", "original_dim", "kept", "embedding_dim", "stored_dim"} <= set(saved["tables"]["a"])
    configs = {c.name: c for c in plan.embedding_bag_configs()}
    assert configs["a"].num_embeddings == 10 and configs["a"].embedding_dim == plan.tables["a"].stored_dim
    assert configs["a"].feature_names == ["feature_a"] and configs["a"].pooling == PoolingType.SUM
    assert set(configs) == {name for name, dim in plan.dims().items() if dim}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: plan.update(version=2), "plan.json: version:"),
        (lambda plan: plan["tables"]["a"].update(kept=[2, 1]), "plan.json: tables.a: .*ascending column indices"),
        (lambda plan: plan["tables"]["a"].update(kept=[0, 9]), "plan.json: tables.a: .*below original_dim=8"),
        (lambda plan: plan["tables"]["a"].update(embedding_dim=3), "plan.json: tables.a: .*embedding_dim=3"),
        (lambda plan: plan["tables"]["a"].pop("rows"), "plan.json: tables.a.rows: Field required"),
        (lambda plan: plan.update(extra=1), "plan.json: extra: Extra"),
    ],
)
def test_damaged_plans_are_refused_in_one_line(tmp_path: Path, change, message) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "plan.json"
    sr.allocate(_scores({"a": [1.0] * 8}, {"a": 10}), sr.Budget(parameters=0.5)).save(path)
    plan = json.loads(path.read_text())
    change(plan)
    path.write_text(json.dumps(plan))
    with pytest.raises(sr.UserError, match=message) as caught:
        sr.DimensionPlan.load(path)
    assert "\n" not in str(caught.value)


def test_missing_and_unreadable_plans(tmp_path: Path) -> None:
    with pytest.raises(sr.UserError, match="nothing.json: no such file"):
        sr.DimensionPlan.load(tmp_path / "nothing.json")
    (tmp_path / "half.json").write_text('{"version": 1, "tab')
    with pytest.raises(sr.UserError, match="half.json: not valid JSON"):
        sr.DimensionPlan.load(tmp_path / "half.json")
