"""Budgets of every kind, counted anew from the plan; orders by their promises; the knapsack against brute force."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sseds_rec as sr
from sseds_rec.search.scores import DimensionScores, Table

#: Optimizer -> (float32 numbers a column, float32 numbers a row): what FBGEMM keeps beside the weights.
STATES = {
    "sgd": (0, 0),
    "adagrad": (1, 0),
    "rowwise_adagrad": (0, 1),
    "adam": (2, 0),
    "partial_rowwise_adam": (1, 1),
    "lamb": (2, 0),
    "partial_rowwise_lamb": (1, 1),
    "lars_sgd": (1, 0),
}


def make_scores(values: list[list[float]], rows: list[int]) -> DimensionScores:
    tables = {f"t{i}": Table(n, len(own)) for i, (own, n) in enumerate(zip(values, rows, strict=True))}
    raw = {name: torch.tensor(own, dtype=torch.float64) for name, own in zip(tables, values, strict=True)}
    return DimensionScores(raw, tables, {})


@st.composite
def problems(draw: st.DrawFn) -> tuple[DimensionScores, int]:
    multiple = draw(st.sampled_from([1, 2, 4]))
    values, rows = [], []
    for _ in range(draw(st.integers(1, 4))):
        dim = multiple * draw(st.integers(1, 3))
        values.append(draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 7.0]), min_size=dim, max_size=dim)))
        rows.append(draw(st.integers(1, 60)))
    values[0][0] = 1.0
    return make_scores(values, rows), multiple


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(["parameters", "dims", "bytes"]))
    found: dict[str, Any] = {"kind": kind}
    if kind == "bytes":
        found |= {
            "optimizer": draw(st.sampled_from([*STATES])),
            "precision": draw(st.sampled_from(["fp32", "fp16", "bf16"])),
        }
    if kind != "dims":
        found["transforms"] = draw(st.booleans())
    return found


def budget_of(kind: str, value: float | int, **others: Any) -> sr.Budget:
    return sr.Budget.model_validate({kind: value, **others})


def cost(tables: list[Table], dims: list[int], kind: str, **others: Any) -> int:
    """What tables of these widths cost."""
    total = 0
    for table, dim in zip(tables, dims, strict=True):
        stored = (dim + 3) // 4 * 4
        if kind == "dims":
            total += dim
        elif kind == "parameters":
            total += table.rows * dim
        else:
            wide, single = STATES[others["optimizer"]]
            weight = {"fp32": 4, "fp16": 2, "bf16": 2}[others["precision"]]
            total += table.rows * (stored * (weight + 4 * wide) + (4 * single if dim else 0))
        if others.get("transforms"):
            total += table.dim * dim * (12 if kind == "bytes" else 1)
    return total


@settings(max_examples=300, deadline=None)
@given(
    problems(),
    options(),
    st.integers(1, 100),
    st.sampled_from(["knapsack", "fill", "stop"]),
    st.sampled_from([0, 0.5, 1]),
)
def test_the_reached_budget_is_counted_right_and_never_above_the_asked(
    problem, chosen, percent, order, exponent
) -> None:  # type: ignore[no-untyped-def]
    scores, multiple = problem
    tables = list(scores.tables.values())
    full = cost(tables, [t.dim for t in tables], **{**chosen, "transforms": False})
    try:
        plan = sr.allocate(
            scores, budget_of(value=percent / 100, **chosen), multiple=multiple, order=order, exponent=exponent
        )
    except sr.UserError:
        return
    kept = cost(tables, list(plan.dims().values()), **chosen)
    assert kept * 100 <= percent * full
    key = "parameters_and_transforms" if chosen["kind"] == "parameters" and chosen["transforms"] else chosen["kind"]
    assert plan.reached[key] == {"kept": kept, "of": full, "fraction": kept / full}
    assert all(dim % multiple == 0 for dim in plan.dims().values())


@settings(max_examples=300, deadline=None)
@given(problems(), options(), st.integers(2, 3000), st.integers(0, 3000), st.sampled_from(["fill", "stop"]))
def test_more_budget_never_drops_a_column_in_the_greedy_orders(problem, chosen, count, more, order) -> None:  # type: ignore[no-untyped-def]
    scores, multiple = problem
    scale = 40 if chosen["kind"] == "bytes" else 1
    plans = []
    for value in (count * scale, (count + more) * scale):
        try:
            plans.append(sr.allocate(scores, budget_of(value=value, **chosen), multiple=multiple, order=order))
        except sr.UserError:
            plans.append(None)
    if plans[0] is None:
        return
    assert plans[1] is not None
    for name, table in plans[0].tables.items():
        assert set(table.kept) <= set(plans[1].tables[name].kept)


@settings(max_examples=300, deadline=None)
@given(problems(), options(), st.integers(2, 3000), st.sampled_from([0.0, 0.5, 1.0]))
def test_the_knapsack_is_the_best_of_all_widths(problem, chosen, count, exponent) -> None:  # type: ignore[no-untyped-def]
    scores, multiple = problem
    limit = count * (40 if chosen["kind"] == "bytes" else 1)
    tables = list(scores.tables.values())
    columns = [sorted(own.tolist(), reverse=True) for own in scores.values()]

    def value(dims: tuple[int, ...]) -> float:
        by_table = zip(columns, dims, tables, strict=True)
        return sum(
            sum(own[:d]) * (t.rows ** (1 - exponent) if chosen["kind"] != "dims" else t.rows**-exponent)
            for own, d, t in by_table
        )

    every = itertools.product(*(range(0, t.dim + 1, multiple) for t in tables))
    best = max(value(dims) for dims in every if cost(tables, list(dims), **chosen) <= limit)
    try:
        plan = sr.allocate(
            scores, budget_of(value=limit, **chosen), multiple=multiple, order="knapsack", exponent=exponent
        )
    except sr.UserError:
        assert best == 0 or min(cost([t], [multiple], **chosen) for t in tables) > limit
        return
    assert value(tuple(plan.dims().values())) == pytest.approx(best, rel=1e-9)
    assert plan.search.get("knapsack_gap", 0) == 0


def _fill(groups: list[tuple[int, int]], kept: int, end: float) -> list[tuple[int, int]]:
    """(number, size) in rank order -> the order in which "fill" takes them, read off its rule."""
    ordered: list[tuple[int, int]] = []
    while groups:
        first, *behind = groups
        if kept + first[1] > end:
            break
        if 4 * first[1] > kept:  # it waits
            smaller = [group for group in behind if group[1] < first[1]]
            before = _fill(smaller, kept, kept + first[1])
            ordered += before
            kept += sum(size for _, size in before)
            behind = [group for group in behind if group not in before]
        ordered.append(first)
        kept += first[1]
        groups = behind
    return ordered


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 200), st.integers(1, 3)), min_size=1, max_size=6),
    st.integers(4, 3000),
    st.randoms(use_true_random=False),
)
def test_fill_lets_smaller_groups_go_before_large_ones(shapes, limit, random) -> None:  # type: ignore[no-untyped-def]
    rows, widths = zip(*shapes, strict=True)
    total = sum(widths)
    draws = iter(random.sample(range(1, 10 * total), total))
    values = [sorted((float(next(draws)) for _ in range(width)), reverse=True) for width in widths]
    scores = make_scores([[v for v in own for _ in range(4)] for own in values], list(rows))
    by_rank = sorted(((v, t) for t, own in enumerate(values) for v in own), reverse=True)
    groups = [(number, 4 * rows[t]) for number, (_, t) in enumerate(by_rank)]
    spent, dims = 0, [0] * len(rows)
    for number, size in _fill(groups, 0, float("inf")):
        spent += size
        if spent > limit:
            break
        dims[by_rank[number][1]] += 4
    try:
        plan = sr.allocate(scores, sr.Budget(parameters=limit), order="fill", exponent=0.0)
    except sr.UserError:
        assert not any(dims)
        return
    assert list(plan.dims().values()) == dims


def test_ties_go_to_the_first_table_and_the_lower_column() -> None:
    scores = make_scores([[1.0] * 8, [1.0] * 8], [10, 10])
    for order in ("knapsack", "fill", "stop"):
        plan = sr.allocate(scores, sr.Budget(parameters=0.25), order=order)  # type: ignore[arg-type]
        assert [table.kept for table in plan.tables.values()] == [[0, 1, 2, 3], []]
        again = sr.allocate(scores, sr.Budget(parameters=0.25), order=order)  # type: ignore[arg-type]
        assert again.model_dump() == plan.model_dump()


@pytest.mark.parametrize("multiple", [8, 16])
def test_wider_multiples(multiple: int) -> None:
    torch.manual_seed(0)
    scores = make_scores(torch.rand(3, 32).tolist(), [7, 90, 1000])
    for order in ("knapsack", "fill", "stop"):
        plan = sr.allocate(scores, sr.Budget(dims=0.5), multiple=multiple, order=order)  # type: ignore[arg-type]
        assert any(plan.dims().values()) and all(dim % multiple == 0 for dim in plan.dims().values())


@pytest.mark.parametrize("order", ["knapsack", "fill", "stop"])
def test_rules_for_single_tables_hold(order: Any) -> None:
    torch.manual_seed(0)
    scores = make_scores(torch.rand(5, 16).tolist(), [50] * 5)
    rules = {
        "t0": sr.TableRule(fixed=12),
        "t1": sr.TableRule(max_dim=4),
        "t2": sr.TableRule(min_dim=5),
        "t3": sr.TableRule(drop="never", max_dim=7),
        "t4": sr.TableRule(fixed=0),
    }
    dims = sr.allocate(scores, sr.Budget(dims=0.6), order=order, tables=rules).dims()
    assert dims["t0"] == 12 and dims["t1"] <= 4 and dims["t2"] >= 8 and dims["t3"] == 4 and dims["t4"] == 0


@pytest.mark.parametrize("order", ["knapsack", "fill"])
def test_a_soft_floor_keeps_every_table_that_scores_as_far_as_the_budget_goes(order: Any) -> None:
    scores = make_scores([[10.0] * 16, [0.2] * 16, [0.1] * 16, [0.0] * 16], [10, 10, 10, 10])
    plan = sr.allocate(scores, sr.Budget(dims=0.25), order=order, floor_share=0.001)
    assert list(plan.dims().values()) == [8, 4, 4, 0]
    plan = sr.allocate(scores, sr.Budget(dims=8), order=order, floor_share=0.001)
    assert list(plan.dims().values()) == [4, 4, 0, 0]  # the larger shares first


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"t0": {"fixed": 20}}, "table t0: fixed=20, but it has 16 columns"),
        ({"t0": {"fixed": 6}}, "table t0: fixed=6 is not a multiple of 4"),
        ({"t0": {"max_dim": 3}}, "table t0: max_dim=3 leave no width"),
        ({"t10": {"fixed": 0}}, "a rule for table t10: there is no such table; did you mean t1?"),
        ({"t0": {"fixed": 0}, "t1": {"fixed": 0}}, "the rules drop every table"),
        ({"t0": {"min_dim": 16}, "t1": {"min_dim": 16}}, "the rules for tables needs 640, the budget allows 320"),
    ],
)
def test_rules_that_cannot_be_kept_are_refused(rule: Any, message: str) -> None:
    scores = make_scores([[1.0] * 16] * 2, [20, 20])
    with pytest.raises(sr.UserError, match=message.replace("?", r"\?")):
        sr.allocate(scores, sr.Budget(parameters=0.5), tables={n: sr.TableRule(**r) for n, r in rule.items()})


@pytest.mark.parametrize(
    ("given_budget", "message"),
    [
        ({}, "give exactly one of parameters, bytes, dims"),
        ({"parameters": 0.1, "dims": 0.1}, "give exactly one"),
        ({"dims": 0.1, "transforms": True}, "dims counts columns and no transforms"),
        ({"parameters": 0.1, "optimizer": "sgd"}, "optimizer and precision change bytes only"),
        ({"bytes": 1.5}, "bytes=1.5 is not a share"),
    ],
)
def test_budgets_that_say_nothing_are_refused(given_budget: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sr.Budget(**given_budget)
