"""Uniform and MDE: the widths against their definitions, by brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sseds_rec as sr
from sseds_rec.search.methods.mde import MdeConfig, allocate_mde
from sseds_rec.search.methods.uniform import allocate_uniform
from sseds_rec.search.scores import Table

TABLES = {
    name: Table(rows, 64, (name,)) for name, rows in (("hour", 24), ("city", 800), ("ad", 30_000), ("user", 2_000_000))
}
BUDGETS = st.one_of(
    st.builds(lambda share: sr.Budget(parameters=share), st.floats(0.05, 1)),
    st.builds(lambda share: sr.Budget(bytes=share), st.floats(0.2, 1)),
    st.builds(lambda share: sr.Budget(dims=share), st.floats(0.05, 1)),
)
SIZES = st.lists(st.integers(1, 10**6), min_size=1, max_size=6)


def _tables(sizes: list[int], dim: int = 32) -> dict[str, Table]:
    return {f"t{i}": Table(rows, dim) for i, rows in enumerate(sizes)}


@settings(deadline=None, max_examples=60)
@given(SIZES, BUDGETS)
def test_uniform_is_the_widest_that_fits(sizes: list[int], budget: sr.Budget) -> None:
    tables = _tables(sizes)
    facts = list(tables.values())
    dims = allocate_uniform(tables, budget).dims()
    (width,) = set(dims.values())
    assert budget.cost(facts, [width] * len(facts)) <= budget.limit(facts)
    assert width == 32 or budget.cost(facts, [width + 1] * len(facts)) > budget.limit(facts)


@settings(deadline=None, max_examples=60)
@given(SIZES, BUDGETS, st.floats(0, 1), st.sampled_from(["down", "power_of_two"]))
def test_mde_is_the_power_law_of_the_largest_scale_that_fits(
    sizes: list[int], budget: sr.Budget, temperature: float, rounding: str
) -> None:
    tables = _tables(sizes)
    facts = list(tables.values())
    config = MdeConfig(temperature=temperature, rounding=rounding)  # type: ignore[arg-type]
    plan = allocate_mde(tables, budget, config)
    dims = list(plan.dims().values())
    assert budget.cost(facts, dims) <= budget.limit(facts)
    for scale in np.geomspace(max(plan.search["scale"], 1e-3) * (1 + 1e-6), 1e9, 400):
        wider = [_rounded(scale * rows**-temperature, rounding) for rows in sizes]
        assert wider == dims or budget.cost(facts, wider) > budget.limit(facts)


def _rounded(width: float, rounding: str) -> int:
    within = min(max(width, 1.0), 32.0)
    return 2 ** math.floor(math.log2(within)) if rounding == "power_of_two" else math.floor(within)


@pytest.mark.parametrize("temperature", [0.2, 0.3, 0.5])
def test_mde_widths_fall_with_cardinality_as_the_power_law(temperature: float) -> None:
    """On a log-log plot the slope of the widths, where no bound cuts them, is -α within what rounding to columns does."""
    tables = {f"t{rows}": Table(rows, 4096) for rows in (10, 100, 1000, 10_000, 100_000)}
    dims = allocate_mde(tables, sr.Budget(parameters=0.05), MdeConfig(temperature=temperature)).dims()
    inside = {table.rows: dims[name] for name, table in tables.items() if 16 <= dims[name] < 4096}
    assert len(inside) >= 3
    slope = np.polyfit(np.log(list(inside)), np.log(list(inside.values())), 1)[0]
    assert slope == pytest.approx(-temperature, abs=0.02)


def test_mde_at_temperature_0_is_uniform() -> None:
    budget = sr.Budget(parameters=0.3)
    assert allocate_mde(TABLES, budget, MdeConfig(temperature=0)).dims() == allocate_uniform(TABLES, budget).dims()


def test_mde_by_traffic_takes_a_table_for_as_large_as_its_traffic_makes_it() -> None:
    """A tall table whose look-ups go to a few rows gets the width of a small one."""
    budget, config = sr.Budget(parameters=0.1), MdeConfig(temperature=0.3, popularity="traffic")
    dims = allocate_mde(TABLES, budget, config, {"ad": 24.0}).dims()
    assert dims["ad"] == dims["hour"] > dims["city"] > dims["user"]


@pytest.mark.parametrize("method", ["uniform", "mde"])
def test_a_budget_below_one_column_of_each_table_is_one_line(method: str) -> None:
    budget = sr.Budget(parameters=0.01)
    with pytest.raises(
        sr.UserError, match=rf"search\.method={method}: one column of every table costs 2,030,824, the budget is"
    ):
        allocate_uniform(TABLES, budget) if method == "uniform" else allocate_mde(TABLES, budget, MdeConfig())


def test_reached_counts_columns_and_what_is_stored() -> None:
    plan = allocate_uniform({"a": Table(100, 64)}, sr.Budget(parameters=0.1))
    assert plan.dims() == {"a": 6}
    assert plan.reached["parameters"] == {"kept": 600, "of": 6400, "fraction": 600 / 6400}
    assert plan.reached["stored_parameters"]["kept"] == 800
