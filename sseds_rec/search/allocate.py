"""From scores to a plan under an exact budget (Eq. 12, and what the paper leaves open)."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, model_validator

from sseds_rec.distributed.tables import stored_dim
from sseds_rec.errors import UserError
from sseds_rec.search.plan import DimensionPlan, TablePlan
from sseds_rec.search.scores import DimensionScores, Table

Order = Literal["fill", "stop"]


class Budget(BaseModel):
    """How much may stay; exactly one of the two is given.

    Attributes:
        parameters: share of all embedding parameters, in (0, 1], or a count of them (an integer above 1).
            Dropping column j of table i frees its n_i rows (Eq. 8).
        dims: share of Σd, in (0, 1]: every column costs the same, whatever its rows.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    parameters: float | int | None = None
    dims: float | None = None

    @model_validator(mode="after")
    def _one_positive(self) -> Budget:
        given = self.asked()
        if len(given) != 1:
            raise ValueError("give exactly one of parameters, dims")
        ((name, value),) = given.items()
        count = name == "parameters" and isinstance(value, int)
        if value <= 0 or (value > 1 and not count):
            kind = "a share in (0, 1] or a whole number of parameters" if name == "parameters" else "a share in (0, 1]"
            raise ValueError(f"{name}={value} is not {kind}")
        return self

    def asked(self) -> dict[str, float | int]:
        """The budget as it was given: {"parameters": 0.1}."""
        return {
            name: value for name, value in (("parameters", self.parameters), ("dims", self.dims)) if value is not None
        }

    def column_cost(self, table: Table) -> int:
        """What one column of a table costs in this budget's unit."""
        return table.rows if self.parameters is not None else 1

    def limit(self, tables: list[Table]) -> int:
        """The most that may be kept, in this budget's unit."""
        (value,) = self.asked().values()
        if value > 1:
            return int(value)
        # The decimal the user wrote, not its binary neighbour: 0.29 of 100 is 29.
        return int(Fraction(str(value)) * sum(table.dim * self.column_cost(table) for table in tables))


def allocate(
    scores: DimensionScores,
    budget: Budget,
    *,
    multiple: int = 4,
    min_dim: int = 0,
    exponent: float = 0.5,
    order: Order = "fill",
) -> DimensionPlan:
    """Keeps the best-ranked columns that the budget can hold.

    Within a table columns are taken best first, in groups of `multiple`. Groups of all tables are ranked by their mean
    score over n_i^exponent. With `multiple=1, exponent=0, order="stop", min_dim=0` this is the paper's Eq. 12.
    Ties go to the table that comes first, then to the lower column index.

    Args:
        scores: from `score_dimensions`.
        budget: what may stay; the plan never exceeds it.
        multiple: widths are multiples of this. FBGEMM takes multiples of 4 only; with 1 (the paper) a table is stored
            padded, and the plan counts both.
        min_dim: columns that every table keeps, whatever its scores (rounded up to `multiple`): a floor against field
            collapse.
        exponent: p in s / n^p. 0 ranks columns as the paper does, 1 by score per parameter.
        order: "stop" ends at the first group that does not fit (the paper); "fill" skips it and goes on.

    Returns:
        The plan. `reached` is never above `budget`.

    Raises:
        UserError: see `check_budget`; or `order="stop"` ends before the first group.
    """
    names = list(scores)
    tables = [scores.tables[name] for name in names]
    check_budget(scores.tables, budget, multiple, min_dim)
    ranked_columns = [np.argsort(-scores[name].numpy(), kind="stable") for name in names]
    dims = np.array([_floor(table, multiple, min_dim) for table in tables])
    left = budget.limit(tables) - int(
        sum(dim * budget.column_cost(table) for dim, table in zip(dims, tables, strict=True))
    )

    sorted_scores = [scores[name].numpy()[columns] for name, columns in zip(names, ranked_columns, strict=True)]
    owners, keys = _ranked_groups(sorted_scores, tables, dims, multiple, exponent)
    for owner in owners[np.argsort(-keys, kind="stable")]:
        cost = multiple * budget.column_cost(tables[owner])
        if cost <= left:
            dims[owner] += multiple
            left -= cost
        elif order == "stop":
            break
    if not dims.any():
        raise UserError(
            "the budget cannot hold the first-ranked columns, and order=stop ends there; raise the budget or use order=fill"
        )
    kept = {
        name: sorted(columns[:dim].tolist()) for name, columns, dim in zip(names, ranked_columns, dims, strict=True)
    }
    ranking = {"multiple": multiple, "min_dim": min_dim, "exponent": exponent, "order": order}
    return _plan(scores, kept, budget, ranking)


def check_budget(tables: Mapping[str, Table], budget: Budget, multiple: int, min_dim: int) -> None:
    """Refuses what no scores could make possible; needs no scores, so it can be asked before training.

    Raises:
        UserError: a table's width is not a multiple of `multiple`, the floor alone exceeds the budget, or the budget
            cannot hold the cheapest group of columns.
    """
    for name, table in tables.items():
        if table.dim % multiple:
            raise UserError(
                f"table {name}: embedding_dim {table.dim} is not a multiple of {multiple}; "
                "allocate with multiple=1 or widen the table"
            )
    limit = budget.limit(list(tables.values()))
    floors = sum(_floor(table, multiple, min_dim) * budget.column_cost(table) for table in tables.values())
    if floors > limit:
        raise UserError(
            f"a floor of {min_dim} columns in each of {len(tables)} tables needs {floors:,}, the budget allows {limit:,}; "
            "lower min_dim or raise the budget"
        )
    cheapest = multiple * min(budget.column_cost(table) for table in tables.values())
    if cheapest > limit:
        raise UserError(
            f"the budget of {limit:,} keeps no column: the cheapest group of {multiple} costs {cheapest:,}; raise the budget"
        )


def _floor(table: Table, multiple: int, min_dim: int) -> int:
    return min(-(-min_dim // multiple) * multiple, table.dim)


def _ranked_groups(
    sorted_scores: list[np.ndarray], tables: list[Table], floors: np.ndarray, multiple: int, exponent: float
) -> tuple[np.ndarray, np.ndarray]:
    """(owner, key) of every group above the floors; a table's groups come best first, so a stable sort keeps prefixes."""
    owners, keys = [], []
    for index, (values, table, floor) in enumerate(zip(sorted_scores, tables, floors, strict=True)):
        groups = values[floor:].reshape(-1, multiple).mean(axis=1) / float(table.rows) ** exponent
        owners.append(np.full(len(groups), index))
        keys.append(groups)
    return np.concatenate(owners), np.concatenate(keys)


def _plan(
    scores: DimensionScores, kept: dict[str, list[int]], budget: Budget, ranking: Mapping[str, float | int | str]
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
    return DimensionPlan(tables=tables, budget=budget.asked(), reached=reached, search={**scores.search, **ranking})


def _share(kept: int, of: int) -> dict[str, float | int]:
    return {"kept": kept, "of": of, "fraction": kept / of}
