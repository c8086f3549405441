"""Allocations against brute force and the paper's rule, and the plan as a file."""

from __future__ import annotations

import itertools
import json
from functools import reduce
from itertools import pairwise
from operator import add
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torchrec.modules.embedding_configs import PoolingType

import sseds_rec as sr
from sseds_rec.search.scores import DimensionScores, Table


def _scores(values: dict[str, list[float]], rows: dict[str, int]) -> DimensionScores:
    tables = {name: Table(rows[name], len(own), (f"feature_{name}",)) for name, own in values.items()}
    return DimensionScores(
        {name: torch.tensor(own, dtype=torch.float64) for name, own in values.items()}, tables, {"criterion": "snip"}
    )


@st.composite
def problems(draw: st.DrawFn) -> tuple[DimensionScores, int]:
    multiple = draw(st.sampled_from([1, 2, 4]))
    values, rows = {}, {}
    for index in range(draw(st.integers(1, 5))):
        dim = multiple * draw(st.integers(1, 4))
        # few distinct values, so that ties happen
        values[f"t{index}"] = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 7.0]), min_size=dim, max_size=dim))
        rows[f"t{index}"] = draw(st.integers(1, 50))
    values["t0"][0] = 1.0
    return _scores(values, rows), multiple


def _used(plan: sr.DimensionPlan) -> int:
    return sum(t.rows * t.embedding_dim for t in plan.tables.values())


def _total(plan: sr.DimensionPlan) -> int:
    return sum(t.rows * t.original_dim for t in plan.tables.values())


@settings(max_examples=300, deadline=None)
@given(
    problems(), st.decimals("0.01", "1", places=2), st.sampled_from(["fill", "stop"]), st.sampled_from([0.0, 0.5, 1.0])
)
def test_budget_is_never_exceeded_and_best_columns_of_a_table_stay(problem, share, order, exponent) -> None:  # type: ignore[no-untyped-def]
    scores, multiple = problem
    try:
        plan = sr.allocate(
            scores, sr.Budget(parameters=float(share)), multiple=multiple, exponent=exponent, order=order
        )
    except sr.UserError:
        return
    assert _used(plan) * 100 <= int(share * 100) * _total(plan)  # in whole numbers
    assert plan.reached["parameters"] == {
        "kept": _used(plan),
        "of": _total(plan),
        "fraction": _used(plan) / _total(plan),
    }
    assert plan.reached["parameters"]["fraction"] <= float(share)
    for name, table in plan.tables.items():
        assert len(table.kept) % multiple == 0
        assert table.stored_dim % 4 == 0 and 0 <= table.stored_dim - len(table.kept) < 4
        dropped = set(range(table.original_dim)) - set(table.kept)
        best_dropped = max((float(scores[name][c]) for c in dropped), default=-1.0)
        assert all(float(scores[name][c]) >= best_dropped for c in table.kept)


@settings(max_examples=200, deadline=None)
@given(problems(), st.sampled_from([0.0, 0.5, 1.0]), st.integers(1, 400))
def test_stop_follows_its_definition(problem, exponent, count) -> None:  # type: ignore[no-untyped-def]
    """An independent, one-column-at-a-time reading of the rule, with lists and sorts."""
    scores, multiple = problem
    groups = []
    for index, name in enumerate(scores):
        columns = sorted(range(scores.tables[name].dim), key=lambda c, name=name: (-float(scores[name][c]), c))
        for rank in range(0, len(columns), multiple):
            members = columns[rank : rank + multiple]
            mean = reduce(add, (float(scores[name][c]) for c in members)) / multiple  # `sum` compensates from 3.12 on
            groups.append((-mean / scores.tables[name].rows ** exponent, index, rank, name, members))
    limit, used, expected = (
        count if count > 1 else sum(t.rows * t.dim for t in scores.tables.values()),
        0,
        {name: [] for name in scores},
    )
    ranks = sorted(rank for rank, *_ in groups)
    # A tie is a tie, but two means that only rounding tells apart have no defined order.
    assume(all(b == a or b - a > 1e-12 for a, b in pairwise(ranks)))
    for _, _, _, name, members in sorted(groups, key=lambda g: g[:3]):
        cost = len(members) * scores.tables[name].rows
        if used + cost <= limit:
            used += cost
            expected[name] += members
        else:
            break
    budget = sr.Budget(parameters=count)
    if not any(expected.values()):
        with pytest.raises(sr.UserError, match="keeps no column|first-ranked"):
            sr.allocate(scores, budget, multiple=multiple, exponent=exponent, order="stop")
        return
    plan = sr.allocate(scores, budget, multiple=multiple, exponent=exponent, order="stop")
    assert {name: t.kept for name, t in plan.tables.items()} == {
        name: sorted(columns) for name, columns in expected.items()
    }


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
    assert sr.allocate(scores, budget, exponent=0.5, order="fill").dims() == {"big": 4, "small": 8, "tiny": 8}


def test_floor_is_kept_by_every_table_and_rounded_up() -> None:
    scores = _scores({"a": [9.0] * 8, "b": [0.0] * 7 + [0.1]}, {"a": 10, "b": 10})
    plan = sr.allocate(scores, sr.Budget(parameters=0.5), min_dim=1)
    assert plan.dims() == {"a": 4, "b": 4}
    assert 7 in plan.tables["b"].kept
    with pytest.raises(sr.UserError, match="a floor of 5 columns in each of 2 tables needs 160, the budget allows 80"):
        sr.allocate(scores, sr.Budget(parameters=0.5), min_dim=5)


def test_dims_budget_counts_columns_and_not_rows() -> None:
    scores = _scores({"a": [5.0] * 8, "b": [1.0] * 8}, {"a": 1000, "b": 1})
    plan = sr.allocate(scores, sr.Budget(dims=0.5), exponent=0.0)
    assert plan.dims() == {"a": 8, "b": 0} and plan.reached["dims"]["fraction"] == 0.5


@pytest.mark.parametrize("value", [0, 0.0, -0.1, 1.5, -3])
def test_budgets_outside_their_range_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="is not a share in"):
        sr.Budget(parameters=value)


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


def test_a_thousand_tables_take_little() -> None:
    torch.manual_seed(0)
    rows = {f"t{i}": 10 + i for i in range(1000)}
    scores = _scores({name: torch.rand(512).tolist() for name in rows}, rows)
    plan = sr.allocate(scores, sr.Budget(parameters=0.1))
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


def test_ties_are_decided_by_table_and_column_order() -> None:
    values = dict(zip("abc", itertools.repeat([1.0] * 8), strict=False))
    plan = sr.allocate(_scores(values, {"a": 5, "b": 5, "c": 5}), sr.Budget(parameters=0.5), order="fill")
    assert {n: t.kept for n, t in plan.tables.items()} == {"a": [*range(8)], "b": [0, 1, 2, 3], "c": []}
