"""Which rows are train, validation and test, and what their labels are: one pass over two columns."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from sseds_rec.data.schema import SPLITS
from sseds_rec.data.sources import Chunk, Source
from sseds_rec.data.transforms import text
from sseds_rec.errors import UserError

_LABELS = {"0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}
_SPLIT_NAMES = {"train": 0, "validation": 1, "valid": 1, "val": 1, "test": 2}
_ISO_DATE = r"^\d{4}-\d{2}-\d{2}([T ].*)?$"  # sorts as text


@dataclass(frozen=True)
class SplitSpec:
    """How rows are divided.

    Attributes:
        by: `random`; `time:COLUMN` (earliest rows train, latest test; equal times stay together);
            `column:COLUMN` (its values name the split).
        fractions: Of train, validation and test; `column:` needs none.
        seed: Of the random division.
    """

    by: str = "random"
    fractions: Sequence[float] = (0.8, 0.1, 0.1)
    seed: int = 0

    def __post_init__(self) -> None:
        shown = ",".join(f"{fraction:g}" for fraction in self.fractions)
        if len(self.fractions) != len(SPLITS) or not all(fraction > 0 for fraction in self.fractions):
            raise UserError(f"split {shown}: give three fractions above 0, for train, validation and test")
        if not math.isclose(sum(self.fractions), 1, abs_tol=1e-6):
            raise UserError(f"split {shown}: sums to {sum(self.fractions):g}, not to 1")
        if self.by != "random" and not (self.kind in ("time", "column") and self.column):
            raise UserError(f"split-by {self.by!r}: must be random, time:COLUMN or column:COLUMN")

    @property
    def kind(self) -> str:
        """`random`, `time` or `column`."""
        return self.by.partition(":")[0]

    @property
    def column(self) -> str | None:
        """The column that decides, if one does."""
        return self.by.partition(":")[2].strip() or None


def read_labels_and_splits(
    source: Source, label: str, positive: str | None, spec: SplitSpec
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int8]]:
    """Reads the label of every row and decides its split.

    Args:
        source: The rows.
        label: Column with 0/1, true/false, or with `positive` among its values.
        positive: The value that counts as 1; None for a column that is binary already.
        spec: How to divide.

    Returns:
        Labels, and indices into `SPLITS`, one per row.

    Raises:
        UserError: No rows, a label that is not binary, a split column with a cell that says nothing, an empty split.
    """
    labels, keys = [], []
    for chunk in source.chunks(list(dict.fromkeys([label, *([spec.column] if spec.column else [])]))):
        labels.append(_labels(chunk, label, positive))
        if spec.column:
            keys.append(_named_splits(chunk, spec.column) if spec.kind == "column" else _times(chunk, spec.column))
    if not labels:
        raise UserError(f"{source.name}: has no rows")
    label_of = np.concatenate(labels)
    if positive is not None and not label_of.any():
        raise UserError(f"{source.name}: no row has {positive!r} in the label column {label!r}")

    if len({key.dtype for key in keys}) > 1:
        raise UserError(f"{source.name}: time column {spec.column!r} holds numbers in some rows and dates in others")
    if spec.kind == "random":
        split_of = _random_splits(len(label_of), spec)
    elif spec.kind == "time":
        split_of = _time_splits(pl.concat(keys), spec)
    else:
        split_of = pl.concat(keys).to_numpy()
    for index, name in enumerate(SPLITS):
        if not (split_of == index).any():
            raise UserError(f"{source.name}: split-by {spec.by} leaves no {name} row ({len(label_of)} rows in all)")
    return label_of, split_of


def _labels(chunk: Chunk, label: str, positive: str | None) -> npt.NDArray[np.int8]:
    cells = text(chunk.frame[label])
    if positive is None:
        known = cells.str.to_lowercase().replace_strict(_LABELS, default=None, return_dtype=pl.Int8)
    else:
        known = (cells == positive.strip()).cast(pl.Int8)
    if known.has_nulls():
        row = known.is_null().arg_max() or 0
        if cells[row] is None:
            raise UserError(f"{chunk.where(row)}: the label {label!r} is empty")
        hint = "it must be 0 or 1, or the value that counts as 1 must be given as positive"
        raise UserError(f"{chunk.where(row)}: the label {label!r} is {cells[row]!r}; {hint}")
    return known.to_numpy()


def _named_splits(chunk: Chunk, column: str) -> pl.Series:
    cells = text(chunk.frame[column])
    known = cells.str.to_lowercase().replace_strict(_SPLIT_NAMES, default=None, return_dtype=pl.Int8)
    if known.has_nulls():
        row = known.is_null().arg_max() or 0
        found = "is empty" if cells[row] is None else f"holds {cells[row]!r}"
        raise UserError(f"{chunk.where(row)}: split column {column!r} {found}; it must be train, validation or test")
    return known


def _times(chunk: Chunk, column: str) -> pl.Series:
    cells = chunk.frame[column]
    if cells.dtype == pl.String:
        cells = text(cells)
        numbers = cells.cast(pl.Float64, strict=False)
        is_number = numbers.filter(cells.is_not_null()).head(1).is_finite().any()
        cells, usable = (numbers, numbers.is_finite()) if is_number else (cells, cells.str.contains(_ISO_DATE))
    elif cells.dtype.is_numeric() or cells.dtype.is_temporal():
        cells = cells.to_physical().cast(pl.Float64)
        usable = cells.is_finite()
    else:
        raise UserError(f"{chunk.file}: time column {column!r} holds {cells.dtype}, not times")
    usable = usable.fill_null(False)
    if not usable.all():
        row = (~usable).arg_max() or 0
        found = "is empty" if cells[row] is None else f"holds {chunk.frame[column][row]!r}"
        raise UserError(f"{chunk.where(row)}: time column {column!r} {found}; all must be numbers, or all ISO dates")
    return cells


def _random_splits(rows: int, spec: SplitSpec) -> npt.NDArray[np.int8]:
    first, second = _cuts(rows, spec)
    split_of = np.repeat(np.arange(3, dtype=np.int8), [first, second - first, rows - second])
    np.random.default_rng(spec.seed).shuffle(split_of)
    return split_of


def _time_splits(times: pl.Series, spec: SplitSpec) -> npt.NDArray[np.int8]:
    ordered = times.sort()
    first, second = _cuts(len(times), spec)
    split_of = (times >= ordered[first]).cast(pl.Int8) + (times >= ordered[min(second, len(times) - 1)]).cast(pl.Int8)
    return split_of.to_numpy()


def _cuts(rows: int, spec: SplitSpec) -> tuple[int, int]:
    train, validation, _ = spec.fractions
    return round(rows * train), round(rows * (train + validation))
