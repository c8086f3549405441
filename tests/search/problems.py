"""Allocation problems to draw, and allocations worked out slowly: plain Python, a group at a time, read off the docstrings."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import reduce
from itertools import pairwise
from operator import add
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st

import sseds_rec as sr
from sseds_rec.search.scores import DimensionScores, Table

#: FBGEMM's optimizers -> (float32 numbers a column, float32 numbers a row) that they keep for each row.
STATES = {
    "sgd": (0, 0),
    "lars_sgd": (1, 0),
    "adagrad": (1, 0),
    "rowwise_adagrad": (0, 1),
    "adam": (2, 0),
    "partial_rowwise_adam": (1, 1),
    "lamb": (2, 0),
    "partial_rowwise_lamb": (1, 1),
}


def make_scores(values: list[list[float]], rows: list[int]) -> DimensionScores:
    """Tables t0, t1, ... of these scores and rows."""
    tables = {f"t{i}": Table(n, len(own), (f"f{i}",)) for i, (own, n) in enumerate(zip(values, rows, strict=True))}
    raw = {name: torch.tensor(own, dtype=torch.float64) for name, own in zip(tables, values, strict=True)}
    return DimensionScores(raw, tables, {})


@dataclass
class Problem:
    """What `allocate` is asked, the budget's amount left open.

    Attributes:
        kind, options: of the budget.
        limits: table -> (fewest, most) columns, as the rules come to.
    """

    scores: DimensionScores
    multiple: int = 1
    kind: str = "parameters"
    options: dict[str, Any] = field(default_factory=dict)
    exponent: float = 0.5
    min_dim: int = 0
    floor_share: float = 0.0
    rules: dict[str, sr.TableRule] = field(default_factory=dict)
    limits: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return list(self.scores)

    def budget(self, amount: float | int) -> sr.Budget:
        return sr.Budget.model_validate({self.kind: amount, **self.options})

    def allocate(self, amount: float | int, order: str) -> sr.DimensionPlan:
        return sr.allocate(
            self.scores,
            self.budget(amount),
            multiple=self.multiple,
            min_dim=self.min_dim,
            exponent=self.exponent,
            order=order,  # type: ignore[arg-type]
            floor_share=self.floor_share,
            tables=self.rules,
        )

    def cost(self, name: str, width: int, transforms: bool | None = None) -> int:
        """What one table costs when it keeps `width` columns."""
        table = self.scores.tables[name]
        counted = self.options.get("transforms", False) if transforms is None else transforms
        if self.kind == "dims":
            return width
        if self.kind == "parameters":
            return width * table.rows + (width * table.dim if counted else 0)
        stored = width
        while stored % 4:
            stored += 1
        column, row = STATES[self.options.get("optimizer", "adam")]
        weight = {"fp32": 4, "fp16": 2, "bf16": 2}[self.options.get("precision", "fp32")]
        state = 4 * (stored * column + row) if width else 0
        return table.rows * (stored * weight + state) + (width * table.dim * 3 * 4 if counted else 0)

    def total(self, widths: dict[str, int]) -> int:
        return sum(self.cost(name, width) for name, width in widths.items())

    def full(self) -> int:
        """What the model costs as it is, which has no transforms."""
        return sum(self.cost(name, table.dim, transforms=False) for name, table in self.scores.tables.items())

    def best_columns(self, name: str) -> list[int]:
        return sorted(range(self.scores.tables[name].dim), key=lambda c: (-float(self.scores[name][c]), c))

    def key(self, name: str, width: int) -> float:
        """What ranks the group that comes after `width` columns."""
        columns = self.best_columns(name)[width : width + self.multiple]
        mean = (
            reduce(add, [float(self.scores[name][c]) for c in columns]) / self.multiple
        )  # `sum` compensates from 3.12 on
        return mean / self.scores.tables[name].rows ** self.exponent

    def widths(self, amount: int, order: str) -> dict[str, int]:
        """The widths that "stop" or "fill" come to; nobody has any if even the first group does not fit."""
        ranks = self._ranks()
        widths = {name: fewest for name, (fewest, _) in self.limits.items()}
        spent = self.total(widths)
        while True:
            groups = []  # the next of each table: (rank, cost, table)
            for name, width in widths.items():
                if width < self.limits[name][1]:
                    more = self.cost(name, width + self.multiple) - self.cost(name, width)
                    groups.append((ranks[name, width], more, name))
            if not groups:
                return widths
            small = [group for group in groups if 2 * group[1] <= spent]
            if order == "stop" or small:
                _, more, name = min(small if order == "fill" else groups)
            else:
                _, more, name = min(groups, key=lambda group: (group[1], group[0]))
            if spent + more > amount:
                return widths
            spent += more
            widths[name] += self.multiple

    def _ranks(self) -> dict[tuple[str, int], int]:
        """(table, columns before it) -> the group's place in the ranking."""
        groups, soft = [], []
        for index, (name, (fewest, most)) in enumerate(self.limits.items()):
            share = float(self.scores[name].sum())
            assume(self.floor_share == 0 or abs(share - self.floor_share) > 1e-9)
            for width in range(fewest, most, self.multiple):
                groups.append((-self.key(name, width), index, name, width))
            if self.floor_share and share >= self.floor_share and fewest == 0 < most:
                soft.append((-share / self.cost(name, self.multiple), index, name, 0))
        # A tie is a tie, but what only rounding tells apart has no defined order.
        for ranks in (sorted(group[0] for group in groups), sorted(group[0] for group in soft)):
            assume(all(b == a or b - a > 1e-9 * abs(a) for a, b in pairwise(ranks)))
        order = [group[2:] for group in sorted(soft)]
        order += [group[2:] for group in sorted(groups, key=lambda g: (g[0], g[1], g[3])) if group[2:] not in order]
        return {group: rank for rank, group in enumerate(order)}


@st.composite
def budget_options(draw: st.DrawFn, kind: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if kind == "bytes":
        options["optimizer"] = draw(st.sampled_from([*STATES]))
        options["precision"] = draw(st.sampled_from(["fp32", "fp16", "bf16"]))
    if kind != "dims":
        options["transforms"] = draw(st.booleans())
    return options


@st.composite
def problems(draw: st.DrawFn, tables: int = 4, groups: int = 4, multiples: tuple[int, ...] = (1, 2, 4)) -> Problem:
    """Small problems of all kinds; few distinct scores, so that ties happen, and floors and rules now and then."""
    multiple, kind = draw(st.sampled_from(multiples)), draw(st.sampled_from(["parameters", "bytes", "dims"]))
    values, rows = [], []
    for _ in range(draw(st.integers(1, tables))):
        dim = multiple * draw(st.integers(1, groups))
        values.append(draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 7.0]), min_size=dim, max_size=dim)))
        rows.append(draw(st.sampled_from([1, 2, 3, 5, 10, 31, 100, 1000])))
    values[0][0] = 1.0
    problem = Problem(make_scores(values, rows), multiple, kind, draw(budget_options(kind)))
    problem.exponent = draw(st.sampled_from([0.0, 0.5, 1.0]))
    problem.floor_share = draw(st.sampled_from([0.0, 0.0, 0.1]))
    problem.min_dim = draw(st.sampled_from([0, 0, 0, 1, multiple]))
    for name, table in problem.scores.tables.items():
        rule, fewest, most = draw(rules(table.dim, multiple, problem.min_dim))
        problem.limits[name] = fewest, most
        if rule:
            problem.rules[name] = sr.TableRule(**rule)
    return problem


@st.composite
def rules(draw: st.DrawFn, dim: int, multiple: int, min_dim: int) -> tuple[dict[str, Any], int, int]:
    """(rule, fewest, most): a rule for a table of `dim` columns, mostly none, and what it comes to."""
    floor = min_dim if min_dim % multiple == 0 else multiple
    choice = draw(st.sampled_from(["none"] * 6 + ["fixed", "max_dim", "min_dim", "never"]))
    if choice == "fixed":
        width = draw(st.integers(0, dim // multiple)) * multiple
        return {"fixed": width}, width, width
    if choice == "max_dim":
        most = draw(st.integers(1, dim // multiple)) * multiple
        return {"max_dim": most + draw(st.integers(0, multiple - 1))}, min(floor, most), most
    if choice == "min_dim":
        fewest = draw(st.integers(1, dim // multiple)) * multiple
        return {"min_dim": fewest - draw(st.integers(0, multiple - 1))}, max(floor, fewest), dim
    if choice == "never":
        return {"drop": "never"}, multiple, dim
    return {}, min(floor, dim), dim
