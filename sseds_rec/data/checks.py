"""Checks of what a file holds; every refusal names file, row and field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sseds_rec.data.schema import Field
from sseds_rec.errors import UserError

INT32_ROWS = 1 << 31

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Place:
    """Where rows come from.

    Attributes:
        file: Path.
        before: Rows of the file before them.
        advice: What to do about bad rows.
    """

    file: str
    before: int
    advice: str

    def refuse(self, row: int, what: str) -> UserError:
        """The error about a row, counted from 0 among these."""
        return UserError(f"{self.file}, row {self.before + row + 1}: {what}; {self.advice}")


def check_labels(labels: Array, place: Place) -> None:
    """Refuses labels [R] other than 0 and 1."""
    good = (labels == 0) | (labels == 1)
    if not good.all():
        row = int(good.argmin())
        raise place.refuse(row, f"label {labels[row]} is neither 0 nor 1")


def check_ids(ids: Array, field: Field, place: Place, offsets: Array | None = None) -> None:
    """Refuses ids outside a field's table; `offsets` [R + 1] says where the rows of a sequence begin."""
    assert field.cardinality is not None, "sparse fields have a cardinality"
    if not len(ids) or (ids.min() >= 0 and ids.max() < field.cardinality):
        return
    at = int(((ids < 0) | (ids >= field.cardinality)).argmax())
    row = at if offsets is None else int(np.searchsorted(offsets, at, side="right")) - 1
    hint = " (modulo would map it into it)" if field.transform == "stored" else ""
    what = f"field {field.name!r}: id {ids[at]} is outside its table of {field.cardinality} rows{hint}"
    raise place.refuse(row, what)


def check_finite(values: Array, name: str, place: Place, offsets: Array | None = None) -> None:
    """Refuses NaN and infinity among the floats of a column; `offsets` as in `check_ids`."""
    good = np.isfinite(values)
    if not good.all():
        at = int(good.argmin())
        row = at if offsets is None else int(np.searchsorted(offsets, at, side="right")) - 1
        raise place.refuse(row, f"{name!r} is {values[at]}")


def modulo(ids: Array, cardinality: int) -> Array:
    """ids % cardinality, not negative, of integers of any type."""
    if ids.dtype == np.uint64:  # numpy would compute uint64 % int64 in floats
        return ids % np.uint64(cardinality)
    return ids.astype(np.int64, copy=False) % cardinality


def id_type(fields: list[Field]) -> type[np.signedinteger]:
    """The narrowest type of tensor that holds the ids of all these tables."""
    return np.int32 if all((field.cardinality or 0) <= INT32_ROWS for field in fields) else np.int64
