"""From the columns that stay to a plan, with what they cost counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sseds_rec.constants import stored_dim
from sseds_rec.search.budget import Budget
from sseds_rec.search.plan import DimensionPlan, TablePlan
from sseds_rec.search.rotation import Rotation
from sseds_rec.search.scores import Table


def plan_keeping(
    tables: Mapping[str, Table],
    kept: Mapping[str, Sequence[int]],
    budget: Budget,
    search: Mapping[str, Any],
    saliency_kept: Mapping[str, float] | None = None,
    rotations: Mapping[str, Rotation] | None = None,
    memory: dict[str, float | int] | None = None,
) -> DimensionPlan:
    """The plan that keeps these columns.

    Args:
        tables: name -> rows and columns of the full table.
        kept: the same names -> column indices that stay, ascending.
        budget: what was asked; whether it is kept is the caller's affair.
        search: the method and its settings.
        saliency_kept: table -> share of its saliency that the columns hold, of methods that have one.
        rotations: table -> its rotation to the kept coordinates.
        memory: of a budget that fits a cluster, what the plan takes of its fullest device.
    """
    plans = {
        name: TablePlan(
            rows=table.rows,
            original_dim=table.dim,
            kept=list(kept[name]),
            embedding_dim=len(kept[name]),
            stored_dim=stored_dim(len(kept[name])),
            saliency_kept=saliency_kept[name] if saliency_kept else 0.0,
            feature_names=list(table.feature_names),
            pooling=table.pooling,
        )
        for name, table in tables.items()
    }
    all_plans = plans.values()
    reached = {
        "parameters": share(
            sum(t.rows * t.embedding_dim for t in all_plans), sum(t.rows * t.original_dim for t in all_plans)
        ),
        "stored_parameters": share(
            sum(t.rows * t.stored_dim for t in all_plans), sum(t.rows * stored_dim(t.original_dim) for t in all_plans)
        ),
        "dims": share(sum(t.embedding_dim for t in all_plans), sum(t.original_dim for t in all_plans)),
    }
    facts = list(tables.values())
    counted = share(budget.cost(facts, [t.embedding_dim for t in all_plans]), budget.total(facts))
    if budget.kind in ("bytes", "fits"):
        reached["bytes"] = counted
        reached |= {"memory_per_rank": memory} if memory else {}
    elif budget.transforms:
        reached["parameters_and_transforms"] = counted
    return DimensionPlan(
        tables=plans, budget=budget.asked(), reached=reached, search=dict(search), rotations=dict(rotations or {})
    )


def share(kept: int, of: int) -> dict[str, float | int]:
    """An entry of a plan's `reached`."""
    return {"kept": kept, "of": of, "fraction": kept / of}
