"""Values to ids and back: the rows of one embedding table."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import polars as pl
import xxhash

from sseds_rec.data.schema import Counts, Magnitude
from sseds_rec.files import open_file

EMPTY = 0  # the cell was empty
RARE = 1  # seen less than min_count times in the train split, or never
RESERVED = 2  # ids from here on: frequent values by descending count, ties by value

_FEW = 1 << 18
_INDEXED_CELLS = 1 << 20  # cells looked up before the index forgets the unknown values that it has met


class Vocabulary:
    """The values of one field with their counts in the train split and their ids.

    Attributes:
        table: Columns value, count, id; row i has id i. The values of rows 0 (`EMPTY`) and 1 (`RARE`) are null, their
            counts those of all empty cells and of all rare ones, so that the counts add up to the values seen.
    """

    def __init__(self, table: pl.DataFrame) -> None:
        self.table = table
        self._index: pl.Series | None = None  # the frequent values as categories, which live as long as this does
        self._cells = 0

    @classmethod
    def build(
        cls, counts: Iterable[pl.DataFrame], min_count: int, known: "Vocabulary | None" = None
    ) -> "tuple[Vocabulary, Counts]":
        """Gives an id to every value counted at least `min_count` times.

        Args:
            counts: At least one frame with columns value (null for empty cells) and count; each value is in one of them,
                once.
            min_count: At least 1.
            known: An earlier vocabulary: its values keep their ids, new ones come after them, and counts add up. (A value
                that was rare in it must become frequent in the new rows alone.)

        Returns:
            The vocabulary, and what was counted, in short.
        """
        empty = rare = 0
        frequent, magnitudes = [], []
        is_kept = (pl.col("count") >= min_count) | pl.col("id").is_not_null()
        for frame in counts:  # which may be all that fits in memory
            seen = _with_ids(frame.drop_nulls("value"), known)
            frequent.append(seen.filter(is_kept))
            empty += _sum(frame.filter(pl.col("value").is_null()))
            rare += _sum(seen) - _sum(frequent[-1])
            magnitudes.append(_magnitudes(seen))
        kept = pl.concat(frequent)

        before = known.table if known else pl.DataFrame({"value": [None, None], "count": [0, 0]})
        again = pl.DataFrame({"id": [EMPTY, RARE], "more": [empty, rare]}).vstack(
            kept.drop_nulls("id").select(pl.col("id").cast(pl.Int64), pl.col("count").alias("more"))
        )
        so_far = before.select(pl.col("value").cast(kept.schema["value"]), "count", id=pl.int_range(pl.len()))
        so_far = so_far.join(again, on="id", how="left", maintain_order="left")
        new = kept.filter(pl.col("id").is_null()).sort("count", "value", descending=[True, False])
        table = pl.concat(
            [so_far.select("value", pl.col("count") + pl.col("more").fill_null(0)), new.select("value", "count")]
        )
        table = table.with_columns(pl.int_range(pl.len(), dtype=pl.Int32).alias("id"))
        return cls(table), Counts(empty=empty, rare=rare, magnitudes=_together(magnitudes))

    @classmethod
    def load(cls, path: str | Path) -> "Vocabulary":
        """Reads what `save` wrote."""
        with open_file(path) as file:
            return cls(pl.read_parquet(file))

    def save(self, path: str | Path) -> None:
        """Writes the table as Parquet."""
        self.table.write_parquet(path)

    @property
    def cardinality(self) -> int:
        """Rows of the embedding table, reserved ids included."""
        return self.table.height

    def encode(self, values: pl.Series) -> pl.Series:
        """Ids (int32) of values; for a sequence field, lists of ids of lists of values."""
        return encode(values.to_frame(), {values.name: self})[values.name]

    def decode(self, ids: pl.Series) -> pl.Series:
        """Values of ids, null for the reserved ones; for a sequence field, lists."""
        to_value = _each(ids.dtype, lambda cells: cells.replace_strict(self.table["id"], self.table["value"]))
        return _select(ids, to_value)

    def _look_up(self, cells: int) -> Callable[[pl.Expr], pl.Expr]:
        """What finds the codes of values: the place among the frequent values, or beyond them; null where empty.

        Up to `_FEW` values are hashed in every call. More are kept in an index for text, a set of categories in which the
        frequent values have the first codes. Unknown values get codes after them, and memory; so it is made anew from time
        to time.
        """
        frequent = self.table["value"][RESERVED:]
        beyond = len(frequent)
        if frequent.dtype != pl.String:
            codes = pl.int_range(beyond, dtype=pl.UInt32, eager=True)
            return lambda values: pl.when(values.is_not_null()).then(
                values.replace_strict(frequent, codes, default=beyond, return_dtype=pl.UInt32)
            )
        if beyond <= _FEW:
            enumeration = pl.Enum(frequent)
            return lambda values: pl.when(values.is_not_null()).then(
                values.cast(enumeration, strict=False).to_physical().cast(pl.UInt32).fill_null(beyond)
            )
        self._cells += cells
        if self._index is None or self._cells > max(_INDEXED_CELLS, beyond):
            self._index, self._cells = frequent.cast(pl.Categorical(pl.Categories.random())), cells
        categories = self._index.dtype
        return lambda values: values.cast(categories).to_physical()

    def _id(self, code: pl.Expr) -> pl.Expr:
        known = pl.when(code < self.cardinality - RESERVED).then(code.cast(pl.Int32) + RESERVED)
        return known.when(code.is_null()).then(EMPTY).otherwise(RARE).cast(pl.Int32)


def encode(rows: pl.DataFrame, vocabularies: Mapping[str, Vocabulary]) -> pl.DataFrame:
    """The columns that have a vocabulary as ids, the others as they are; see `Vocabulary.encode`."""
    codes, ids = [], []
    for name, vocabulary in vocabularies.items():
        dtype = rows.schema[name]
        cells = int(rows[name].list.len().sum()) if isinstance(dtype, pl.List) else rows.height
        codes.append(_each(dtype, vocabulary._look_up(cells))(pl.col(name)).alias(name))
        ids.append(_each(dtype, vocabulary._id)(pl.col(name)).alias(name))
    return rows.with_columns(codes).with_columns(ids)  # not in one: an expression used twice is computed twice


def hash_ids(values: pl.Series, rows: int) -> pl.Series:
    """Text to 1 + xxh3(text) % (rows - 1), empty to 0; the same on every machine and in every release.

    Returns:
        int32, or int64 from 2^31 rows on; for a sequence, lists.
    """
    is_list = isinstance(values.dtype, pl.List)
    cells = values.explode() if is_list else values
    distinct = cells.drop_nulls().unique()
    hashed = pl.Series(
        [1 + xxhash.xxh3_64_intdigest(value.encode()) % (rows - 1) for value in distinct], dtype=pl.Int64
    )
    dtype = pl.Int32() if rows <= 2**31 else pl.Int64()
    to_id = _each(values.dtype, lambda cells: cells.replace_strict(distinct, hashed, default=EMPTY, return_dtype=dtype))
    return _select(values, to_id)


def _with_ids(counts: pl.DataFrame, known: Vocabulary | None) -> pl.DataFrame:
    if known is None:
        return counts.with_columns(pl.lit(None, pl.Int32).alias("id"))
    ids = known.table[RESERVED:].select(pl.col("value").cast(counts.schema["value"]), "id")
    return counts.join(ids, on="value", how="left")


def _sum(counts: pl.DataFrame) -> int:
    return int(counts["count"].sum())


def _magnitudes(seen: pl.DataFrame) -> pl.DataFrame:
    least = (10 ** pl.col("count").log10().floor()).cast(pl.Int64).alias("least")
    return seen.group_by(least).agg(pl.len().cast(pl.Int64).alias("values"), pl.col("count").sum())


def _together(found: list[pl.DataFrame]) -> list[Magnitude]:
    summed = pl.concat(found).group_by("least").agg(pl.all().sum()).sort("least")
    return [Magnitude(**row) for row in summed.iter_rows(named=True)]


def _each(dtype: pl.DataType, function: Callable[[pl.Expr], pl.Expr]) -> Callable[[pl.Expr], pl.Expr]:
    """Applies a function to cells, or to the elements of lists."""
    if isinstance(dtype, pl.List):
        return lambda column: column.list.eval(function(pl.element()))
    return function


def _select(column: pl.Series, function: Callable[[pl.Expr], pl.Expr]) -> pl.Series:
    return column.to_frame().select(function(pl.all()).alias(column.name)).to_series()
