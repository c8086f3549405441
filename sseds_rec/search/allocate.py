"""From scores to a plan under an exact budget (Eq. 12, and what the paper leaves open)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from sseds_rec.errors import UserError
from sseds_rec.search import knapsack
from sseds_rec.search.budget import Budget
from sseds_rec.search.groups import Groups, fill_order, first_groups, groups_of
from sseds_rec.search.keeping import plan_keeping
from sseds_rec.search.plan import DimensionPlan
from sseds_rec.search.rules import TableRule, width_bounds
from sseds_rec.search.scores import DimensionScores, Table

Order = Literal["fill", "stop", "knapsack"]


def allocate(
    scores: DimensionScores,
    budget: Budget,
    *,
    multiple: int = 4,
    min_dim: int = 0,
    exponent: float = 0.5,
    order: Order = "knapsack",
    floor_share: float = 0.0,
    tables: Mapping[str, TableRule] | None = None,
) -> DimensionPlan:
    """Keeps the best-ranked columns that the budget can hold.

    Within a table columns are taken best first, in groups of `multiple`. Groups of all tables are ranked by their mean
    score over n_i^exponent. With `multiple=1, exponent=0, order="stop"` and no floors this is the paper's Eq. 12.
    Ties go to the table that comes first, then to the lower column index.

    Args:
        scores: from `score_dimensions`.
        budget: what may stay; the plan never exceeds it.
        multiple: widths are multiples of this. FBGEMM takes multiples of 4 only; with 1 (the paper) a table is stored
            padded, and the plan counts both.
        min_dim: columns that every table keeps, whatever its scores (rounded up to `multiple`): a floor against field
            collapse. The budget must hold it.
        exponent: p in s / n^p. 0 ranks columns as the paper does, 1 by score per parameter.
        order: how the budget is spent.
            "knapsack": the widths of the most value that it can hold, where a group is worth what it is ranked by times n_i
            (in a dims budget times 1), so that rank order is the relaxed problem's: with exponent=1 (dims: 0) that is the
            most score. It keeps no column that scores 0, unless all fit the cluster of a budget. Should the search end before
            the proof that nothing is better, `knapsack_gap` in the plan is the share of value by which something may be.
            "stop": groups in rank order, up to the first that does not fit (the paper).
            "fill": the best-ranked of the groups that cost at most half of what is kept by then, or the cheapest if all cost
            more, up to the first that does not fit. Then either nothing more fits or two thirds of the budget are spent.
            In "stop" and "fill" more budget never drops a kept column. So they leave some budget unspent: to make room for
            a large group whenever it fits, smaller ones would have to go.
        floor_share: a soft floor against field collapse: the best group of each table that holds at least this share of all
            scores is ranked first, those of the highest share for their cost before others; 0 for none. What the
            budget cannot hold is given up.
        tables: table name -> limits to its width.

    Returns:
        The plan. `reached` is never above `budget`.

    Raises:
        UserError: see `check_budget`; or `order="stop"` ends before the first group.
    """
    check_budget(scores.tables, budget, multiple, min_dim, tables)
    bounds = width_bounds(scores.tables, multiple, min_dim, tables)
    own = [scores.tables[name] for name in scores]
    floors = np.array([bounds[name][0] for name in scores])
    columns = {name: np.argsort(-scores[name].numpy(), kind="stable") for name in scores}  # best first
    held = budget.cost(own, floors.tolist())

    ranked = [scores[name].numpy()[columns[name]] for name in scores]
    groups = groups_of(ranked, own, [bounds[name] for name in scores], budget, multiple, exponent)
    first = first_groups(groups, np.array([values.sum() for values in ranked]), floors, floor_share)
    line = np.argsort(-groups.keys, kind="stable")
    line = np.concatenate([first, line[~np.isin(line, first)]])
    line = fill_order(groups, line, held) if order == "fill" else line
    weights = np.array([1 if budget.kind == "dims" else table.rows for table in own], np.float64)

    def spend(limit: int) -> tuple[np.ndarray, float]:
        """Widths, and the share of value that is still in doubt."""
        gap = 0.0
        if limit < held:
            return np.zeros_like(floors), gap
        if order == "knapsack":
            taken, gap = _most_value(groups, first, weights, limit - held)
        else:
            taken = line[: np.searchsorted(groups.costs[line].cumsum(), limit - held, side="right")]
        return floors + multiple * np.bincount(groups.owners[taken], minlength=len(own)), gap

    memory: dict[str, float | int] | None = None
    if budget.kind == "fits":
        from sseds_rec.search.fitting import largest_fit  # TorchRec, which takes seconds

        dims, gap, memory = largest_fit(own, budget, groups, floors, multiple, order == "knapsack", spend)
    else:
        dims, gap = spend(budget.limit(own))
    if not dims.any():
        raise UserError(
            "the budget cannot hold the first-ranked columns, and order=stop ends there; raise the budget or use order=fill"
            if order == "stop"
            else "the columns that the budget can hold score 0; raise the budget"
        )
    settings: dict[str, Any] = {"multiple": multiple, "min_dim": min_dim, "exponent": exponent, "order": order}
    settings |= {"knapsack_gap": gap} if gap else {}
    settings |= {"floor_share": floor_share} if floor_share else {}
    settings |= {"tables": {n: r.model_dump(exclude_defaults=True) for n, r in tables.items()}} if tables else {}
    kept = {name: sorted(columns[name][:dim].tolist()) for name, dim in zip(scores, dims, strict=True)}
    totals = {name: float(scores[name].sum()) for name in scores}
    shares = {
        name: float(scores[name][own].sum()) / totals[name] if totals[name] else 0.0 for name, own in kept.items()
    }
    rotations = {name: rotation.keep(kept[name]) for name, rotation in scores.rotations.items()}
    return plan_keeping(scores.tables, kept, budget, {**scores.search, **settings}, shares, rotations, memory)


def check_budget(
    tables: Mapping[str, Table],
    budget: Budget,
    multiple: int,
    min_dim: int,
    rules: Mapping[str, TableRule] | None = None,
) -> None:
    """Refuses what no scores could make possible; needs no scores, so it can be asked before training.

    Raises:
        UserError: a table's width is not a multiple of `multiple`, a rule names no table or cannot be kept, the floors alone
            exceed the budget, it cannot hold the cheapest group of columns, or rules drop every table.
    """
    bounds = width_bounds(tables, multiple, min_dim, rules)
    own = list(tables.values())
    limit = budget.limit(own)
    name = f"the budget fits={budget.fits}" if budget.fits else "the budget"
    floors = budget.cost(own, [fewest for fewest, _ in bounds.values()])
    if floors > limit:
        asked = [f"a floor of {min_dim} columns in each of {len(tables)} tables"] if min_dim else []
        asked += ["the rules for tables"] if rules else []
        raise UserError(
            f"{' and '.join(asked)} {'need' if rules else 'needs'} {floors:,}, {name} allows {limit:,}; "
            f"lower {'them' if rules else 'min_dim'} or raise the budget"
        )
    if not any(most for _, most in bounds.values()):
        raise UserError("the rules drop every table; leave one without fixed=0")
    widths = np.array([multiple])
    cheapest = min(int(budget.costs(tables[name], widths)[0]) for name, (_, most) in bounds.items() if most)
    if not floors and cheapest > limit:
        raise UserError(
            f"{name} of {limit:,} keeps no column: the cheapest group of {multiple} costs {cheapest:,}; raise the budget"
        )


def _most_value(groups: Groups, first: np.ndarray, weights: np.ndarray, left: int) -> tuple[np.ndarray, float]:
    """The groups of the most value that `left` can hold, soft floors held as far as they fit, and the share still in doubt."""
    held = []
    for group in first:
        if groups.costs[group] <= left:
            held.append(group)
            left -= int(groups.costs[group])
    free = np.setdiff1d(np.arange(len(groups.keys)), held)
    owners = groups.owners[free]
    places = np.arange(len(free)) - np.searchsorted(owners, owners)  # within the table
    costs = np.zeros((len(weights), places.max(initial=-1) + 2), np.int64)
    values = np.full(costs.shape, -np.inf)
    values[:, 0] = 0.0
    costs[owners, places + 1] = groups.costs[free]
    values[owners, places + 1] = groups.keys[free] * weights[owners]
    choice = knapsack.solve(costs.cumsum(axis=1), values.cumsum(axis=1), left)
    return np.append(held, free[places < choice.options[owners]]).astype(np.int64), choice.gap
