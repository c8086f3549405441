"""Raw columns to the values of a field: what a vocabulary counts, a hash takes, or a dense input is."""

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from sseds_rec.data.cells import Reading
from sseds_rec.data.schema import Kind, Transform
from sseds_rec.errors import UserError


@dataclass(frozen=True)
class FieldSpec:
    """How one raw column becomes a field.

    Attributes:
        name: Column of the source, and name of the field.
        kind: What the column holds.
        transform: See `schema.Field`.
        min_count: Values of a vocabulary seen less often in the train split share one id.
        separator: Between the elements of a sequence written as text.
        rows: Rows of the table of a hashed or raw field; None for the others.
        weights: Column with one weight an element, for a sequence; None for none.
    """

    name: str
    kind: Kind = "categorical"
    transform: Transform = "vocabulary"
    min_count: int = 10
    separator: str = "|"
    rows: int | None = None
    weights: str | None = None

    @property
    def has_vocabulary(self) -> bool:
        """Whether the values are counted, and the frequent ones get ids."""
        return self.transform in ("vocabulary", "log2_bucket")

    @property
    def columns(self) -> Sequence[str]:
        """See `cells.Reader`."""
        return [self.name, *([self.weights] if self.weights else [])]

    def reading(self, types: pl.Schema) -> Reading:
        """The field's values: String (vocabulary, hash), Int64 (`log2_bucket`, raw) or Float32 without nulls (`log1p`).

        Those of a sequence are lists, and without empty elements unless they have weights. See `cells.Reader`.
        """
        if self.kind == "sequence":
            return self._sequence(types)
        cells, dtype = pl.col(self.name), types[self.name]
        if dtype.is_nested():
            raise UserError(f"column {self.name!r} holds {dtype}: it is no {self.kind} field, perhaps a sequence")
        parsed = pl.col(f"\0{self.name}")
        if self.kind == "numeric":
            numbers, parse = parsed, cells.cast(pl.Float64, strict=False)
            values = log2_bucket(numbers) if self.transform == "log2_bucket" else log1p(numbers)
            unreadable = (numbers.is_null() & cells.is_not_null()) | numbers.is_infinite()
            kind, wanted = "numeric column", "a finite number"
        elif self.transform == "raw":
            values, parse, kind, wanted = (
                parsed,
                _int64(cells, dtype),
                "column",
                "a 64-bit integer (a hash takes any text)",
            )
            unreadable = values.is_null() & cells.is_not_null()
        else:
            return Reading([cells.cast(pl.String).alias(self.name)])
        return Reading(
            [values.alias(self.name)],
            [parse.alias(f"\0{self.name}")],
            unreadable,
            lambda row: f"{kind} {self.name!r} holds {row[self.name]!r}, not {wanted}",
        )

    def _sequence(self, types: pl.Schema) -> Reading:
        elements, parse = pl.col(f"\0{self.name}"), _elements(pl.col(self.name), types[self.name], self.separator)
        if self.weights is None:
            parse = parse.list.drop_nulls()  # where there are weights, one of them belongs to an empty element
        parsed = [parse.alias(f"\0{self.name}")]
        ids, bad_id = elements, None
        if self.transform == "raw":
            ids = elements.list.eval(_int64(pl.element(), pl.String()))
            bad_id = ids.list.eval(pl.element().is_null()).list.any()
        if self.weights is None:
            return Reading(
                [ids.alias(self.name)],
                parsed,
                bad_id,
                lambda row: (
                    f"column {self.name!r} holds {row[self.name]!r}, not 64-bit integers (a hash takes any text)"
                ),
            )
        numbers = _elements(pl.col(self.weights), types[self.weights], self.separator).list.eval(
            pl.element().cast(pl.Float32, strict=False)
        )
        is_finite = numbers.list.eval(pl.element().is_finite().fill_null(False)).list.all()
        bad_weight = ~is_finite | (numbers.list.len() != elements.list.len())
        return Reading(
            [ids.alias(self.name), numbers.alias(self.weights)],
            parsed,
            bad_weight if bad_id is None else bad_id | bad_weight,
            lambda row: (
                f"column {self.weights!r} holds {row[str(self.weights)]!r}, not one finite number for each element "
                f"of {self.name!r}, {row[self.name]!r}"
            ),
        )


def numeric_transform(numeric_as: str) -> Transform:
    """The transform of numeric columns: of `log2_bucket`, or of `dense` inputs.

    Raises:
        UserError: It is something else.
    """
    if numeric_as not in ("log2_bucket", "dense"):
        raise UserError(f"numeric-as {numeric_as!r}: must be log2_bucket or dense")
    return "log1p" if numeric_as == "dense" else "log2_bucket"


def log2_bucket(numbers: pl.Expr) -> pl.Expr:
    """floor(log(x)²) for x > 2, the integer part of x for the others (the paper, 4.1.1: the Criteo winner's transform).

    >>> pl.select(log2_bucket(pl.lit(pl.Series([-3.0, 1.9, 2.0, 3.0, 1000.0, None])))).to_series().to_list()
    [-3, 1, 2, 1, 47, None]
    """
    rest = numbers.clip(lower_bound=-(2.0**62))  # what an int64 holds
    bucket = pl.when(numbers > 2).then(numbers.log().pow(2).floor()).otherwise(rest)
    return bucket.cast(pl.Int64, strict=False)  # null where not a number


def log1p(numbers: pl.Expr) -> pl.Expr:
    """sign(x)·log(1+|x|) as float32, 0 where empty: heavy tails tamed, order and sign kept."""
    x = numbers.fill_nan(None)
    return (x.sign() * x.abs().log1p()).fill_null(0.0).cast(pl.Float32)


def _int64(cells: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    """Integers as they are, those above 2^63 by their 64 bits; null for anything else."""
    if dtype == pl.String:
        return pl.coalesce(
            cells.cast(pl.Int64, strict=False), cells.cast(pl.UInt64, strict=False).reinterpret(signed=True)
        )
    return cells.reinterpret(signed=True) if dtype == pl.UInt64 else cells.cast(pl.Int64, strict=False)


def _elements(cells: pl.Expr, dtype: pl.DataType, separator: str) -> pl.Expr:
    """Lists of texts, null where an element is empty; no list where the cell is empty."""
    lists = cells.cast(pl.List(pl.String)) if isinstance(dtype, pl.List) else cells.cast(pl.String).str.split(separator)
    stripped = pl.element().str.strip_chars()
    return lists.list.eval(pl.when(stripped != "").then(stripped)).fill_null(pl.lit([], pl.List(pl.String)))
