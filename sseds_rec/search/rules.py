"""What a user asks of single tables: a floor, a cap, a width."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sseds_rec.errors import UserError
from sseds_rec.search.scores import Table


class TableRule(BaseModel):
    """Limits to one table's width; the best columns within them are kept.

    Attributes:
        min_dim: columns it keeps at least, rounded up to the allocation's `multiple`.
        max_dim: columns it keeps at most, rounded down.
        fixed: columns it keeps, exactly: a multiple of `multiple`; 0 drops the table.
        drop: "never" has it keep one group at least.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    min_dim: int = Field(0, ge=0)
    max_dim: int | None = Field(None, ge=1)
    fixed: int | None = Field(None, ge=0)
    drop: Literal["never"] | None = None

    @model_validator(mode="after")
    def _no_contradiction(self) -> TableRule:
        if self.fixed is not None and (self.min_dim or self.max_dim is not None):
            raise ValueError(f"fixed={self.fixed} already says how many columns stay; leave out min_dim and max_dim")
        if self.fixed == 0 and self.drop == "never":
            raise ValueError("fixed=0 drops the table and drop=never keeps it")
        if self.max_dim is not None and self.min_dim > self.max_dim:
            raise ValueError(f"min_dim={self.min_dim} is above max_dim={self.max_dim}")
        return self


def width_bounds(
    tables: Mapping[str, Table], multiple: int, min_dim: int, rules: Mapping[str, TableRule] | None
) -> dict[str, tuple[int, int]]:
    """Table name -> (fewest, most) columns it may keep, both multiples of `multiple`.

    A rule comes before `min_dim`: a table's `max_dim` or `fixed` below it holds.

    Raises:
        UserError: a table's width is not a multiple of `multiple`, a rule names no table, or no width satisfies a rule.
    """
    rules = rules or {}
    for name in rules:
        if name not in tables:
            near = difflib.get_close_matches(name, tables, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}?" if near else f"the tables are {', '.join(tables)}"
            raise UserError(f"a rule for table {name}: there is no such table; {hint}")
    return {
        name: _bounds(name, table, multiple, min_dim, rules.get(name, TableRule())) for name, table in tables.items()
    }


def _bounds(name: str, table: Table, multiple: int, min_dim: int, rule: TableRule) -> tuple[int, int]:
    if table.dim % multiple:
        raise UserError(
            f"table {name}: embedding_dim {table.dim} is not a multiple of {multiple}; "
            "allocate with multiple=1 or widen the table"
        )
    for key, value in (("min_dim", rule.min_dim), ("fixed", rule.fixed)):
        if value is not None and value > table.dim:
            raise UserError(f"table {name}: {key}={value}, but it has {table.dim} columns; lower it")
    if rule.fixed is not None:
        if rule.fixed % multiple:
            raise UserError(
                f"table {name}: fixed={rule.fixed} is not a multiple of {multiple}; choose one, or a smaller multiple"
            )
        return rule.fixed, rule.fixed
    most = table.dim if rule.max_dim is None else min(rule.max_dim // multiple * multiple, table.dim)
    own = _up(rule.min_dim, multiple)
    if most < max(own, multiple):
        limits = f"max_dim={rule.max_dim}" + (f" with min_dim={rule.min_dim}" if rule.min_dim else "")
        raise UserError(
            f"table {name}: {limits} leaves no width that is a multiple of {multiple}; raise max_dim"
            + ("" if rule.min_dim else ", or set fixed=0 to drop the table")
        )
    fewest = max(own, _up(min_dim, multiple), multiple if rule.drop == "never" else 0)
    return min(fewest, most), most


def _up(dim: int, multiple: int) -> int:
    return -(-dim // multiple) * multiple
