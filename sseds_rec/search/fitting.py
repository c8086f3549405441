"""The largest allocation that a cluster can hold, with TorchRec's planner in the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sseds_rec.distributed.capacity import place_in_more
from sseds_rec.distributed.dry_plan import fits, place
from sseds_rec.distributed.hardware import show_size
from sseds_rec.distributed.workload import Shape, Workload, tables_only
from sseds_rec.errors import UserError
from sseds_rec.search.budget import BATCH_SIZE, TRANSFORM_BYTES, Budget
from sseds_rec.search.groups import Groups
from sseds_rec.search.scores import Table

Widths = tuple[int, ...]


def largest_fit(
    tables: Sequence[Table],
    budget: Budget,
    groups: Groups,
    floors: np.ndarray,
    multiple: int,
    widen: bool,
    spend: Callable[[int], tuple[np.ndarray, float]],
) -> tuple[np.ndarray, float, dict[str, float | int] | None]:
    """The largest widths that fit a budget's cluster, as `Budget` defines them: all that the rules allow, if those do.

    Args:
        tables: all [T].
        budget: of kind `fits`.
        groups: of all tables, above the floors.
        floors: columns that tables keep in any case [T].
        multiple: columns of a group.
        widen: whether groups may be added that are not next in line.
        spend: bytes -> widths, all zero where nothing can be bought, and the share of value in doubt.

    Returns:
        Widths [T], all zero if `spend` buys nothing that fits though something would; the share of value in doubt; and what they
        take: bytes of the fullest rank ("max") and on average ("mean") of those that the device has ("of").

    Raises:
        UserError: the cluster cannot hold even the floors, or without them the cheapest group (says what they need).
    """
    gaps: dict[Widths, float] = {}
    starts = np.searchsorted(groups.owners, np.arange(len(tables) + 1))

    def widths_for(limit: int) -> Widths:
        dims, gap = spend(limit)
        widths = tuple(dims.tolist())
        gaps[widths] = gap
        return widths

    def rank(table: int, width: int) -> float:
        group = starts[table] + (width - floors[table]) // multiple
        is_worth = group < starts[table + 1] and groups.keys[group] > 0
        return float(groups.keys[group]) if is_worth else -np.inf

    fitting = _Fitting(tables, budget)
    everything = floors + multiple * np.diff(starts)
    if fitting.holds(whole := tuple(everything.tolist())):  # columns that score 0 and all
        return everything, 0.0, fitting.reached(whole)
    unit = int(groups.costs[groups.costs > 0].min(initial=budget.limit(tables)))
    widths = fitting.largest(widths_for, max(1, unit))
    if widths is None:
        firsts = starts[:-1][np.diff(starts) > 0]
        cheapest = -1 if floors.any() else int(groups.owners[firsts[np.argmin(groups.costs[firsts])]])
        fitting.check(tuple(int(floor) + multiple * (table == cheapest) for table, floor in enumerate(floors)))
        return np.zeros_like(floors), 0.0, None
    gap = gaps[widths]
    widths = fitting.widened(widths, multiple, rank) if widen else widths
    return np.array(widths), gap, fitting.reached(widths)


class _Fitting:
    """Widths on the budget's cluster.

    Args:
        tables: all [T].
        budget: names the cluster, and what is on it beside the tables.
    """

    def __init__(self, tables: Sequence[Table], budget: Budget) -> None:
        self._tables, self._budget, self._cluster = tables, budget, budget.cluster
        self._known: dict[Widths, bool] = {}

    def holds(self, widths: Widths) -> bool:
        """Whether the planner finds a place for tables of these widths."""
        if widths not in self._known:
            self._known[widths] = any(widths) and fits(self._workload(widths), self._cluster)
        return self._known[widths]

    def largest(self, spend: Callable[[int], Widths], unit: int) -> Widths | None:
        """The widths for the most bytes that fit, found by bisection; None if none do.

        Args:
            spend: bytes -> widths, all zero where that buys nothing.
            unit: the bytes of the cheapest group: from there on the bisection would find nothing new.
        """
        everything = self._budget.cost(self._tables, [table.dim for table in self._tables])
        low, high = 0, min(self._budget.limit(self._tables), everything)
        best, most = None, spend(high)
        if self.holds(most):
            return most
        while high - low > unit:
            middle = (low + high) // 2
            widths = spend(middle)
            if not any(widths):
                low = middle
            elif self.holds(widths):
                low, best = middle, widths
            else:
                high = middle
        return best

    def widened(self, widths: Widths, multiple: int, rank: Callable[[int, int], float]) -> Widths:
        """Adds groups of columns, the best-ranked first, until no table can take another and still fit.

        Args:
            widths: that fit.
            multiple: columns of a group.
            rank: (table, its width) -> the rank of its next group; -inf if it has none to take.
        """
        grown = True
        while grown:
            grown = False
            for table in sorted(range(len(widths)), key=lambda table: -rank(table, widths[table])):
                wider = self._widened(widths, table, multiple, rank)
                grown, widths = grown or wider != widths, wider
        return widths

    def _widened(self, widths: Widths, table: int, multiple: int, rank: Callable[[int, int], float]) -> Widths:
        """As many groups as this table can take: 1, then 2, 4, ... more as long as they fit, then fewer again."""
        step = 1
        while step:
            wider = widths
            for _ in range(step):
                if rank(table, wider[table]) == -np.inf:
                    break
                wider = (*wider[:table], wider[table] + multiple, *wider[table + 1 :])
            if wider != widths and self.holds(wider):
                widths, step = wider, 2 * step
            else:
                step //= 2
        return widths

    def reached(self, widths: Widths) -> dict[str, float | int]:
        """What a plan that fits takes."""
        placement = place(self._workload(widths), self._cluster)
        assert placement is not None, "it fits"
        used = placement.used
        return {"max": int(used.max()), "mean": float(used.mean()), "of": self._cluster.device.memory}

    def check(self, smallest: Widths) -> None:
        """Refuses a cluster that cannot hold even the smallest plan."""
        if self.holds(smallest):
            return
        need = place_in_more(self._workload(smallest), self._cluster).used.max()
        has = self._cluster.device.memory
        raise UserError(
            f"budget fits={self._cluster}: even the smallest plan, {sum(smallest):,} columns in all, needs {show_size(need)} "
            f"on the fullest rank, and a device has {show_size(has)}; take a larger cluster, or lower floors or batch_size"
        )

    def _workload(self, widths: Widths) -> Workload:
        shapes = [
            Shape(table.rows, width, max(1, len(table.feature_names)))
            for table, width in zip(self._tables, widths, strict=True)
        ]
        budget = self._budget
        matrices = sum(table.dim * width for table, width in zip(self._tables, widths, strict=True))
        dense = (budget.dense_bytes or 0) + (TRANSFORM_BYTES * matrices if budget.transforms else 0)
        return tables_only(shapes, budget.optimizer or "adam", budget.precision, budget.batch_size or BATCH_SIZE, dense)
