"""Groups of columns, the pieces in which a budget is spent, and the orders in which they come."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sseds_rec.search.budget import Budget
from sseds_rec.search.scores import Table


@dataclass(frozen=True)
class Groups:
    """The groups of columns that may be added to the floors, table by table, best first [N].

    Attributes:
        owners: the table's index.
        keys: what ranks them; not increasing within a table, so that a stable sort keeps that order.
        costs: in the budget's unit, after those before it in the table.
    """

    owners: np.ndarray
    keys: np.ndarray
    costs: np.ndarray


def groups_of(
    ranked: Sequence[np.ndarray],
    tables: Sequence[Table],
    bounds: Sequence[tuple[int, int]],
    budget: Budget,
    multiple: int,
    exponent: float,
) -> Groups:
    """Of all tables.

    Args:
        ranked: scores of each table, the best first, [T] of [D].
        tables: [T].
        bounds: (fewest, most) columns of each table.
        budget: counts the costs.
        multiple: columns of a group.
        exponent: p of s / n^p.
    """
    keys, costs = [], []
    for values, table, (fewest, most) in zip(ranked, tables, bounds, strict=True):
        keys.append(values[fewest:most].reshape(-1, multiple).mean(axis=1) / float(table.rows) ** exponent)
        costs.append(np.diff(budget.costs(table, np.arange(fewest, most + 1, multiple))))
    owners = np.repeat(np.arange(len(tables)), [len(own) for own in keys])
    return Groups(owners, np.concatenate(keys), np.concatenate(costs))


def first_groups(groups: Groups, shares: np.ndarray, floors: np.ndarray, floor_share: float) -> np.ndarray:
    """The best groups of tables above `floor_share` that no floor holds yet, most share for their cost first."""
    owners, first = np.unique(groups.owners, return_index=True)
    wanted = (shares[owners] >= floor_share) & (floors[owners] == 0) & (floor_share > 0)
    density = shares[owners[wanted]] / groups.costs[first[wanted]]
    return first[wanted][np.argsort(-density, kind="stable")]


def fill_order(groups: Groups, line: np.ndarray, kept: int) -> np.ndarray:
    """The order in which "fill" takes groups; no budget enters it, and one takes its beginning: so more budget drops nothing.

    Args:
        groups: all [N].
        line: their indices in rank order [N].
        kept: what the floors cost.

    Returns:
        Their indices in the order [N].
    """
    places = np.empty_like(line)
    places[line] = np.arange(len(line))
    costs, ranks, owners = groups.costs.tolist(), places.tolist(), groups.owners.tolist()
    best = np.unique(groups.owners, return_index=True)[1].tolist()
    waiting = [(costs[group], ranks[group], group) for group in best]  # the next group of every table
    heapq.heapify(waiting)
    small: list[tuple[int, int]] = []
    order: list[int] = []
    largest = max(costs, default=0)
    while kept < 2 * largest and len(order) < len(line):
        while waiting and (not small or 2 * waiting[0][0] <= kept):
            heapq.heappush(small, heapq.heappop(waiting)[1:])
        _, group = heapq.heappop(small)
        order.append(group)
        kept += costs[group]
        if group + 1 < len(owners) and owners[group + 1] == owners[group]:
            heapq.heappush(waiting, (costs[group + 1], ranks[group + 1], group + 1))
    return np.concatenate([np.array(order, np.int64), line[~np.isin(line, order)]])  # all that is left is small
