"""From scores to a plan under an exact budget (Eq. 12, and what the paper leaves open)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sseds_rec.distributed.tables import stored_dim
from sseds_rec.errors import UserError
from sseds_rec.search import knapsack
from sseds_rec.search.budget import Budget
from sseds_rec.search.plan import DimensionPlan, TablePlan
from sseds_rec.search.rules import TableRule, width_bounds
from sseds_rec.search.scores import DimensionScores, Table

Order = Literal["fill", "stop", "knapsack"]

#: order="fill": a group waits if what is kept so far is less than so many times its size.
_LARGE = 4


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
        order: "knapsack" has the most value that any widths can have under the budget, where a group is worth what it is
            ranked by times n_i (in a dims budget times 1), so that rank order is the relaxed problem's: with exponent=1
            (dims: 0) that is the most score. It keeps no column that scores 0. "stop" takes groups in rank order and ends
            at the first that does not fit (the paper). "fill" does too, but lets smaller groups go before one that is large
            beside what is kept by then (see `_fill_order`). In both, more budget never drops a kept column.
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
    names = list(scores)
    own = [scores.tables[name] for name in names]
    bounds = width_bounds(scores.tables, multiple, min_dim, tables)
    ranked_columns = [np.argsort(-scores[name].numpy(), kind="stable") for name in names]
    dims = np.array([bounds[name][0] for name in names])
    left = budget.limit(own) - budget.cost(own, dims.tolist())

    sorted_scores = [scores[name].numpy()[columns] for name, columns in zip(names, ranked_columns, strict=True)]
    groups = _groups(sorted_scores, own, [bounds[name] for name in names], budget, multiple, exponent)
    shares = np.array([values.sum() for values in sorted_scores])
    first = _first_groups(groups, shares, dims, floor_share)
    settings: dict[str, Any] = {"multiple": multiple, "min_dim": min_dim, "exponent": exponent, "order": order}
    if order == "knapsack":
        taken, gap = _most_value(groups, first, [1 if budget.kind == "dims" else t.rows for t in own], left)
        settings |= {"knapsack_gap": gap} if gap else {}
    else:
        rank = np.argsort(-groups.keys, kind="stable")
        rank = np.concatenate([first, rank[~np.isin(rank, first)]])
        if order == "fill":
            rank = rank[_fill_order(groups.costs[rank], groups.sizes[rank], budget.limit(own) - left, left)]
        taken = rank[: np.searchsorted(np.cumsum(groups.costs[rank]), left, side="right")]
    dims = dims + multiple * np.bincount(groups.owners[taken], minlength=len(dims))
    if not dims.any():
        raise UserError(
            "the budget cannot hold the first-ranked columns, and order=stop ends there; raise the budget or use order=fill"
            if order == "stop"
            else "the columns that the budget can hold score 0; raise the budget"
        )
    settings |= {"floor_share": floor_share} if floor_share else {}
    settings |= {"tables": {n: r.model_dump(exclude_defaults=True) for n, r in tables.items()}} if tables else {}
    kept = {
        name: sorted(columns[:dim].tolist()) for name, columns, dim in zip(names, ranked_columns, dims, strict=True)
    }
    return _plan(scores, kept, budget, settings)


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
    floors = budget.cost(own, [fewest for fewest, _ in bounds.values()])
    if floors > limit:
        asked = [
            f"a floor of {min_dim} columns in each of {len(tables)} tables" if min_dim else "",
            "the rules for tables" if rules else "",
        ]
        raise UserError(
            f"{' and '.join(filter(None, asked))} needs {floors:,}, the budget allows {limit:,}; "
            f"lower {'min_dim' if min_dim else 'them'} or raise the budget"
        )
    if not any(most for _, most in bounds.values()):
        raise UserError("the rules drop every table; leave one without fixed=0")
    widths = np.array([multiple])
    cheapest = min(int(budget.costs(tables[name], widths)[0]) for name, (_, most) in bounds.items() if most)
    if not floors and cheapest > limit:
        raise UserError(
            f"the budget of {limit:,} keeps no column: the cheapest group of {multiple} costs {cheapest:,}; raise the budget"
        )


@dataclass(frozen=True)
class _Groups:
    """The groups of columns that may be added to the floors, table by table, best first [N].

    Attributes:
        owners: the table's index.
        keys: what ranks them; not increasing within a table, so that a stable sort keeps that order.
        costs: in the budget's unit, after those before it in the table.
        sizes: the highest cost of it and those before it in the table, which cannot come after it.
    """

    owners: np.ndarray
    keys: np.ndarray
    costs: np.ndarray
    sizes: np.ndarray


def _groups(
    sorted_scores: list[np.ndarray],
    tables: list[Table],
    bounds: list[tuple[int, int]],
    budget: Budget,
    multiple: int,
    exponent: float,
) -> _Groups:
    keys, costs, sizes = [], [], []
    for values, table, (fewest, most) in zip(sorted_scores, tables, bounds, strict=True):
        keys.append(values[fewest:most].reshape(-1, multiple).mean(axis=1) / float(table.rows) ** exponent)
        costs.append(np.diff(budget.costs(table, np.arange(fewest, most + 1, multiple))))
        sizes.append(np.maximum.accumulate(costs[-1]))
    owners = np.repeat(np.arange(len(tables)), [len(own) for own in keys])
    return _Groups(owners, np.concatenate(keys), np.concatenate(costs), np.concatenate(sizes))


def _first_groups(groups: _Groups, shares: np.ndarray, floors: np.ndarray, floor_share: float) -> np.ndarray:
    """The best groups of tables above `floor_share` that no floor holds yet, most share for their cost first."""
    owners, first = np.unique(groups.owners, return_index=True)
    wanted = (shares[owners] >= floor_share) & (floors[owners] == 0) & (floor_share > 0)
    density = shares[owners[wanted]] / groups.costs[first[wanted]]
    return first[wanted][np.argsort(-density, kind="stable")]


def _fill_order(costs: np.ndarray, sizes: np.ndarray, kept: int, left: int) -> np.ndarray:
    """Rank order, in which a large group waits until cheaper ones have spent about as much as it will.

    A group whose size is above a quarter of what is kept when its turn comes lets the smaller groups behind it go first, in
    rank order and by the same rule, until the next of them would bring what they spend above its size; then it follows.
    The order depends on costs and ranks alone, and a budget takes a beginning of it, up to the first group that does not
    fit: of two budgets the lower one's beginning is part of the higher one's, so that nothing kept is dropped for more.
    Within a table the order stays, because sizes do not fall along a table and only groups of smaller size go first.

    Taking whatever still fits into the budget instead would drop columns for more budget: of a group that scores 10 and
    costs 10 and one that scores 1 and costs 1, a budget of 5 would keep the second and one of 10 the first only.

    Args:
        costs: of the groups in rank order [N].
        sizes: of the groups in rank order [N].
        kept: what the floors cost.
        left: what may be spent; the order ends where that is exceeded.

    Returns:
        Indices into the ranks, as many as matter.
    """
    end, limit = kept + left + int(costs.sum()), kept + left
    ordered: list[np.ndarray] = []
    taken = np.zeros(len(costs), bool)
    candidates = np.arange(len(costs))
    waiting: list[tuple[int, np.ndarray, int]] = []
    while kept <= limit:
        candidates = candidates[~taken[candidates]]
        after = kept + np.cumsum(costs[candidates])
        large = _LARGE * sizes[candidates] > after - costs[candidates]
        halts = np.flatnonzero(large | (after > end))
        halt = halts[0] if len(halts) else len(candidates)
        ordered.append(candidates[:halt])
        kept = int(after[halt - 1]) if halt else kept
        taken[candidates[:halt]] = True
        if halt < len(candidates) and after[halt] <= end:
            group, behind = candidates[halt], candidates[halt + 1 :]
            waiting.append((group, behind, end))
            candidates, end = behind[sizes[behind] < sizes[group]], kept + int(sizes[group])
        elif waiting:
            group, candidates, end = waiting.pop()
            ordered.append(np.array([group]))
            kept += int(costs[group])
            taken[group] = True
        else:
            break
    return np.concatenate(ordered) if ordered else candidates[:0]


def _most_value(groups: _Groups, first: np.ndarray, weights: list[int], left: int) -> tuple[np.ndarray, float]:
    """The groups of the most value that `left` can hold, soft floors held as far as they fit, and the share still in doubt."""
    held = np.zeros(len(weights), bool)
    for group in first:
        if groups.costs[group] <= left:
            held[groups.owners[group]] = True
            left -= int(groups.costs[group])
    taken = first[held[groups.owners[first]]]
    free = ~np.isin(np.arange(len(groups.keys)), taken)
    owners = groups.owners[free]
    counts = np.bincount(owners, minlength=len(weights))
    inside = np.arange(counts.max(initial=0)) < counts[:, None]
    costs, values = np.zeros(inside.shape, np.int64), np.full(inside.shape, -np.inf)
    costs[inside] = groups.costs[free]
    values[inside] = groups.keys[free] * np.array(weights, np.float64)[owners]
    none = np.zeros((len(weights), 1), np.int64)
    choice = knapsack.solve(
        np.hstack([none, np.where(inside, costs.cumsum(axis=1), 0)]),
        np.hstack([none.astype(np.float64), values.cumsum(axis=1)]),
        left,
    )
    chosen = np.flatnonzero(free)[
        np.concatenate([np.arange(n) < k for n, k in zip(counts, choice.options, strict=True)])
    ]
    return np.concatenate([taken, chosen]), choice.gap


def _plan(
    scores: DimensionScores, kept: dict[str, list[int]], budget: Budget, settings: Mapping[str, Any]
) -> DimensionPlan:
    tables = {}
    for name, columns in kept.items():
        table, own = scores.tables[name], scores[name]
        total = float(own.sum())
        tables[name] = TablePlan(
            rows=table.rows,
            original_dim=table.dim,
            kept=columns,
            embedding_dim=len(columns),
            stored_dim=stored_dim(len(columns)),
            saliency_kept=float(own[columns].sum()) / total if total else 0.0,
            feature_names=list(table.feature_names),
            pooling=table.pooling,
        )
    plans = tables.values()
    reached = {
        "parameters": _share(sum(t.rows * t.embedding_dim for t in plans), sum(t.rows * t.original_dim for t in plans)),
        "stored_parameters": _share(
            sum(t.rows * t.stored_dim for t in plans), sum(t.rows * stored_dim(t.original_dim) for t in plans)
        ),
        "dims": _share(sum(t.embedding_dim for t in plans), sum(t.original_dim for t in plans)),
    }
    facts = [scores.tables[name] for name in kept]
    counted = _share(budget.cost(facts, [len(columns) for columns in kept.values()]), budget.total(facts))
    if budget.kind == "bytes":
        reached["bytes"] = counted
    elif budget.transforms:
        reached["parameters_and_transforms"] = counted
    rotations = {name: rotation.keep(kept[name]) for name, rotation in scores.rotations.items()}
    return DimensionPlan(
        tables=tables,
        budget=budget.asked(),
        reached=reached,
        search={**scores.search, **settings},
        rotations=rotations,
    )


def _share(kept: int, of: int) -> dict[str, float | int]:
    return {"kept": kept, "of": of, "fraction": kept / of}
