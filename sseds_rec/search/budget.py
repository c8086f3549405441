"""How much of a model may stay, and what a table costs at each width."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from sseds_rec.constants import stored_dim
from sseds_rec.distributed.hardware import Cluster
from sseds_rec.errors import UserError
from sseds_rec.footprint import STATE_BYTES, STATES, WEIGHT_BYTES, Optimizer, Precision
from sseds_rec.search.scores import Table

Kind = Literal["parameters", "bytes", "dims", "fits"]

#: A transform matrix is dense: float32, with both of Adam's moments.
TRANSFORM_BYTES = 12
#: Rows a step of each device, where nobody says it.
BATCH_SIZE = 2048
_UNITS: dict[Kind, str] = {"parameters": "parameters", "bytes": "bytes", "dims": "columns", "fits": "bytes"}


class Budget(BaseModel):
    """How much may stay; exactly one of `parameters`, `bytes`, `dims`, `fits` is given.

    The first three are a share in (0, 1], or a whole number above 1. A share is of what the full tables cost by the same count,
    without transform matrices: the full model has none.

    Attributes:
        parameters: embedding parameters. Column j of table i costs its n_i rows (Eq. 8).
        bytes: memory for training the tables: weights and optimizer states, at the width that FBGEMM stores (a multiple of 4).
            A state with one number a row costs rows x 4 bytes as soon as the table keeps a column.
        dims: columns, whatever their rows.
        fits: a cluster, as "1x8xH100-80GB" (see `sseds_rec.distributed.hardware.Cluster.parse`): as much as TorchRec's planner
            can place there: all columns, if they fit. Else, of `bytes` budgets, it takes the largest whose plan fits. Then, with
            order="knapsack", groups of `multiple` columns are added until no table can take one more and still fit, the others
            as they are; with "fill" and "stop" the next group in line does not fit.
        optimizer: of the tables, for `bytes` and `fits`; "adam" if not given, or in a run what trains them there.
        precision: of the tables' weights, for `bytes` and `fits`; optimizer states are float32.
        batch_size: rows a step of each device, for `fits`: look-ups take memory as well. 2,048 if not given, or in a run its part
            of `train.batch_size`.
        dense_bytes: of each device, for `fits`: what is no table (dense weights, gradients, optimizer states, activations). 0 if
            not given, or in a run what the full model's take, activations left out.
        transforms: count the transform matrices M_i in R^{D x d_i} (Eq. 13) as well: D more parameters for each kept column of
            a table of D columns; in bytes 12 D, for float32 and Adam's two moments (in `fits`, on each device).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    parameters: float | int | None = None
    bytes: float | int | None = None
    dims: float | int | None = None
    fits: str | None = None
    optimizer: Optimizer | None = None
    precision: Precision = "fp32"
    batch_size: int | None = Field(None, ge=1)
    dense_bytes: int | None = Field(None, ge=0)
    transforms: bool = False

    @model_validator(mode="after")
    def _one_positive(self) -> Budget:
        given = [kind for kind in _UNITS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(_UNITS)}")
        kind, value, options = self.kind, self._value, self._options()
        if kind != "fits" and options.keys() & {"batch_size", "dense_bytes"}:
            raise ValueError(f"batch_size and dense_bytes go with fits only, and this budget counts {kind}")
        if isinstance(value, str):
            try:
                Cluster.parse(value)
            except UserError as error:
                raise ValueError(str(error)) from None
            return self
        if value <= 0 or (value > 1 and not isinstance(value, int)):
            raise ValueError(f"{kind}={value} is not a share in (0, 1] or a whole number of {_UNITS[kind]}")
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
    def cluster(self) -> Cluster:
        """Of `fits`."""
        assert self.fits is not None, "the budget names a cluster"
        return Cluster.parse(self.fits)

    @property
    def _value(self) -> float | int | str:
        value: float | int | str = getattr(self, self.kind)
        return value

    def _options(self) -> dict[str, Any]:
        options = {"optimizer", "precision", "transforms", "batch_size", "dense_bytes"}
        given = self.model_dump(include=options, exclude_defaults=True)
        return {key: value for key, value in given.items() if (key, value) != ("optimizer", "adam")}

    def asked(self) -> dict[str, Any]:
        """What is asked, defaults left out: {"parameters": 0.1}, {"bytes": 0.1, "optimizer": "sgd"}.

        Of a run's budget that is also what its config fills in where the budget leaves it open
        (`sseds_rec.forecast.search_budget`).
        """
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
        wide, single = STATES[self.optimizer or "adam"]
        column = WEIGHT_BYTES[self.precision] + STATE_BYTES * wide
        row = stored_dim(widths) * column + (widths > 0) * (STATE_BYTES * single)  # type: ignore[arg-type]
        return table.rows * row + TRANSFORM_BYTES * transforms

    def cost(self, tables: Sequence[Table], dims: Sequence[int]) -> int:
        """What all tables cost at these widths."""
        return sum(int(self.costs(table, np.array([dim]))[0]) for table, dim in zip(tables, dims, strict=True))

    def total(self, tables: Sequence[Table]) -> int:
        """What the full tables cost, without transforms: what a share is a share of."""
        return self.model_copy(update={"transforms": False}).cost(tables, [table.dim for table in tables])

    def limit(self, tables: Sequence[Table]) -> int:
        """The most that may be kept, in this budget's unit; of `fits`, all that tables can take of the devices' memory."""
        value = self._value
        if isinstance(value, str):
            return self.cluster.usable
        if value > 1:
            return int(value)
        # The decimal the user wrote, not its binary neighbour: 0.29 of 100 is 29.
        return int(Fraction(str(value)) * self.total(tables))

    def in_bytes(self, count: int) -> Budget:
        """Of so many bytes, counted as this budget counts (at least 2: 1 is a share)."""
        return Budget(
            bytes=max(2, count), optimizer=self.optimizer, precision=self.precision, transforms=self.transforms
        )

    def without_planner(self, tables: Sequence[Table]) -> Budget:
        """This budget; of `fits`, that of all bytes which the cluster could hold, for plans that are on the way to the last."""
        return self.in_bytes(self.limit(tables)) if self.kind == "fits" else self

    def at(self, progress: float, tables: Sequence[Table]) -> Budget:
        """The budget of a round on the exponential way from everything to this one: limit^progress * everything^(1-progress).

        Args:
            progress: 0 for everything, 1 for this budget itself.
            tables: all tables.

        Returns:
            A budget of the same kind, as a count (which is at least 2: 1 is a share); of `fits`, one of bytes before the last.
        """
        if self.kind == "fits" and progress < 1:
            return self.without_planner(tables).at(progress, tables)
        everything = self.cost(tables, [table.dim for table in tables])
        limit = min(self.limit(tables), everything)
        if progress >= 1 or limit < 1:
            return self
        count = round(float(limit) ** progress * float(everything) ** (1 - progress)) if progress > 0 else everything
        return self.model_copy(update={self.kind: max(limit, min(count, everything), 2)})
