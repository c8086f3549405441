"""Uniform: every table gets the same width, the most that the budget holds. What any search must beat.

d = max{d : Σ_i cost(n_i, d) ≤ budget}, in steps of one column; trained from scratch, without transform matrices, which are for
tables of different widths. A width that is no multiple of 4 is stored padded, and the plan counts both.
"""

from __future__ import annotations

from collections.abc import Mapping

from sseds_rec.errors import UserError
from sseds_rec.search.budget import Budget
from sseds_rec.search.keeping import plan_keeping
from sseds_rec.search.plan import DimensionPlan
from sseds_rec.search.scores import Table


def allocate_uniform(tables: Mapping[str, Table], budget: Budget) -> DimensionPlan:
    """The widest uniform plan that the budget holds.

    Args:
        tables: name -> rows and columns of the full table.
        budget: what may stay, counted in parameters, bytes or dims.

    Raises:
        UserError: it does not hold one column of every table.
    """
    facts = list(tables.values())
    limit = budget.limit(facts)
    widest = max(table.dim for table in facts)
    fitting = [d for d in range(1, widest + 1) if budget.cost(facts, [min(d, table.dim) for table in facts]) <= limit]
    if not fitting:
        need = budget.cost(facts, [1] * len(facts))
        raise UserError(
            f"search.method=uniform: one column of every table costs {need:,}, the budget is {limit:,}; raise it"
        )
    kept = {name: list(range(min(fitting[-1], table.dim))) for name, table in tables.items()}
    return plan_keeping(tables, kept, budget, {"method": "uniform"})
