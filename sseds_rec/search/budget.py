"""How much of a model may stay, and what a table costs at each width."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, model_validator

from sseds_rec.constants import stored_dim
from sseds_rec.footprint import STATE_BYTES, STATES, WEIGHT_BYTES, Optimizer, Precision
from sseds_rec.search.scores import Table

Kind = Literal["parameters", "bytes", "dims"]
#: A transform matrix is dense: float32, with both of Adam's moments.
_TRANSFORM_BYTES = 12
_UNITS: dict[Kind, str] = {"parameters": "parameters", "bytes": "bytes", "dims": "columns"}


class Budget(BaseModel):
    """How much may stay; exactly one of `parameters`, `bytes`, `dims` is given: a share in (0, 1], or a whole number above 1.

    A share is of what the full tables cost by the same count, without transform matrices: the full model has none.

    Attributes:
        parameters: embedding parameters. Column j of table i costs its n_i rows (Eq. 8).
        bytes: memory for training the tables: weights and optimizer states, at the width that FBGEMM stores (a multiple of 4).
            A state with one number a row costs rows x 4 bytes as soon as the table keeps a column.
        dims: columns, whatever their rows.
        optimizer: of the tables, for `bytes`; default "adam", as our trainer's.
        precision: of the tables' weights, for `bytes`; optimizer states are float32.
        transforms: count the transform matrices M_i in R^{D x d_i} (Eq. 13) as well: D more parameters for each kept column of
            a table of D columns; in bytes 12 D, for float32 and Adam's two moments.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    parameters: float | int | None = None
    bytes: float | int | None = None
    dims: float | int | None = None
    optimizer: Optimizer = "adam"
    precision: Precision = "fp32"
    transforms: bool = False

    @model_validator(mode="after")
    def _one_positive(self) -> Budget:
        given = [kind for kind in _UNITS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(_UNITS)}")
        kind, value = self.kind, self._value
        if value <= 0 or (value > 1 and not isinstance(value, int)):
            raise ValueError(f"{kind}={value} is not a share in (0, 1] or a whole number of {_UNITS[kind]}")
        options = self._options()
        if kind == "dims" and "transforms" in options:
            raise ValueError("dims counts columns and no transforms; ask for parameters or bytes")
        if kind != "bytes" and options.keys() - {"transforms"}:
            raise ValueError(f"optimizer and precision change bytes only, and this budget counts {kind}")
        return self

    @property
    def kind(self) -> Kind:
        """What is counted."""
        return next(kind for kind in _UNITS if getattr(self, kind) is not None)

    @property
    def _value(self) -> float | int:
        value: float | int = getattr(self, self.kind)
        return value

    def _options(self) -> dict[str, Any]:
        return self.model_dump(include={"optimizer", "precision", "transforms"}, exclude_defaults=True)

    def asked(self) -> dict[str, Any]:
        """The budget as it was given, defaults left out: {"parameters": 0.1}, {"bytes": 0.1, "optimizer": "sgd"}."""
        return {self.kind: self._value, **self._options()}

    def costs(self, table: Table, widths: np.ndarray) -> np.ndarray:
        """What a table costs, in this budget's unit, when it keeps `widths` columns: nondecreasing, 0 for none.

        Args:
            table: its rows and original columns.
            widths: int64 [W].

        Returns:
            int64 [W].
        """
        if self.kind == "dims":
            return widths.copy()
        transforms = table.dim * widths if self.transforms else 0
        if self.kind == "parameters":
            return table.rows * widths + transforms
        wide, single = STATES[self.optimizer]
        column = WEIGHT_BYTES[self.precision] + STATE_BYTES * wide
        row = stored_dim(widths) * column + (widths > 0) * (STATE_BYTES * single)  # type: ignore[arg-type]
        return table.rows * row + _TRANSFORM_BYTES * transforms

    def cost(self, tables: Sequence[Table], dims: Sequence[int]) -> int:
        """What all tables cost at these widths."""
        return sum(int(self.costs(table, np.array([dim]))[0]) for table, dim in zip(tables, dims, strict=True))

    def total(self, tables: Sequence[Table]) -> int:
        """What the full tables cost, without transforms: what a share is a share of."""
        return self.model_copy(update={"transforms": False}).cost(tables, [table.dim for table in tables])

    def limit(self, tables: Sequence[Table]) -> int:
        """The most that may be kept, in this budget's unit."""
        if self._value > 1:
            return int(self._value)
        # The decimal the user wrote, not its binary neighbour: 0.29 of 100 is 29.
        return int(Fraction(str(self._value)) * self.total(tables))

    def at(self, progress: float, tables: Sequence[Table]) -> Budget:
        """The budget of a round on the exponential way from everything to this one: limit^progress * everything^(1-progress).

        Args:
            progress: 0 for everything, 1 for this budget itself.
            tables: all tables.

        Returns:
            A budget of the same kind, as a count (which is at least 2: 1 is a share).
        """
        everything = self.cost(tables, [table.dim for table in tables])
        limit = min(self.limit(tables), everything)
        if progress >= 1 or limit < 1:
            return self
        count = round(float(limit) ** progress * float(everything) ** (1 - progress)) if progress > 0 else everything
        return self.model_copy(update={self.kind: max(limit, min(count, everything), 2)})
