"""Raw columns to the values that a vocabulary counts, or to the floats of a dense input."""

from collections.abc import Callable
from dataclasses import dataclass

import polars as pl

from sseds_rec.data.schema import Kind, Transform
from sseds_rec.errors import UserError


@dataclass(frozen=True)
class FieldSpec:
    """How one raw column becomes a field.

    Attributes:
        name: Column of the source, and name of the field.
        kind: What the column holds.
        transform: See `schema.Field`.
        min_count: Values seen less often in the train split share one id.
        separator: Between the elements of a sequence written as text.
    """

    name: str
    kind: Kind = "categorical"
    transform: Transform = "vocabulary"
    min_count: int = 10
    separator: str = "|"

    def values(self, column: pl.Series, where: Callable[[int], str]) -> pl.Series:
        """The column's values, null where empty.

        Args:
            column: Raw cells of one chunk.
            where: Names the file and row of an index into the chunk.

        Returns:
            String (categorical), List(String) without empty elements (sequence), Int64 (`log2_bucket`)
            or Float32 without nulls (`log1p`).

        Raises:
            UserError: A cell of a numeric column is not a finite number.
        """
        if self.kind == "categorical":
            return text(column)
        if self.kind == "sequence":
            return _elements(column, self.separator)
        numbers = _numbers(column, where)
        return log2_bucket(numbers) if self.transform == "log2_bucket" else log1p(numbers)


def text(column: pl.Series) -> pl.Series:
    """Cells as text without surrounding spaces; null where nothing is left."""
    return _apply(column, _clean(pl.all().cast(pl.String)))


def log2_bucket(numbers: pl.Series) -> pl.Series:
    """floor(log(x)²) for x > 2, the integer part of x for the others (the paper, 4.1.1: the Criteo winner's transform).

    >>> log2_bucket(pl.Series([-3.0, 1.9, 2.0, 3.0, 1000.0, None])).to_list()
    [-3, 1, 2, 1, 47, None]
    """
    x = pl.all().clip(lower_bound=-(2.0**62))  # what an int64 holds
    return _apply(numbers, pl.when(x > 2).then(x.log().pow(2).floor()).otherwise(x).cast(pl.Int64))


def log1p(numbers: pl.Series) -> pl.Series:
    """sign(x)·log(1+|x|) as float32, 0 where empty: heavy tails tamed, order and sign kept."""
    x = pl.all()
    return _apply(numbers, (x.sign() * x.abs().log1p()).fill_null(0.0).cast(pl.Float32))


def _numbers(column: pl.Series, where: Callable[[int], str]) -> pl.Series:
    cells = text(column) if column.dtype == pl.String else column
    numbers = _apply(cells, pl.all().cast(pl.Float64, strict=False))
    bad = (numbers.is_null() & cells.is_not_null()) | numbers.is_infinite().fill_null(False)
    if bad.any():
        row = bad.arg_max() or 0
        raise UserError(f"{where(row)}: numeric column {column.name!r} holds {cells[row]!r}, not a finite number")
    return numbers.fill_nan(None)


def _elements(column: pl.Series, separator: str) -> pl.Series:
    cells = pl.all()
    is_list = isinstance(column.dtype, pl.List)
    elements = cells.cast(pl.List(pl.String)) if is_list else cells.cast(pl.String).str.split(separator)
    kept = elements.list.eval(_clean(pl.element()).drop_nulls())
    return _apply(column, kept.fill_null(pl.lit([], pl.List(pl.String))))


def _clean(cells: pl.Expr) -> pl.Expr:
    stripped = cells.str.strip_chars()
    return pl.when(stripped != "").then(stripped)


def _apply(column: pl.Series, expression: pl.Expr) -> pl.Series:
    try:
        return column.to_frame().select(expression.alias(column.name)).to_series()
    except pl.exceptions.PolarsError:
        raise UserError(f"column {column.name!r}: {column.dtype} cannot be read as this kind of field") from None
