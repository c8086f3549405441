"""Values to ids and back: the rows of one embedding table."""

from collections.abc import Callable
from pathlib import Path

import polars as pl

EMPTY = 0  # the cell was empty
RARE = 1  # seen less than min_count times in the train split, or never
RESERVED = 2  # ids from here on: frequent values by descending count, ties by value


def count_values(values: pl.Series, so_far: pl.DataFrame | None = None) -> pl.DataFrame:
    """Adds the values of one chunk to the counts.

    Args:
        values: What a field's transform yields; null is an empty cell, a list is a sequence.
        so_far: Result of the chunks before.

    Returns:
        Columns value (null for empty cells) and count.
    """
    if isinstance(values.dtype, pl.List):
        values = values.explode().drop_nulls()
    counts = values.alias("value").to_frame().group_by("value").agg(pl.len().cast(pl.Int64).alias("count"))
    if so_far is None:
        return counts
    return pl.concat([so_far, counts]).group_by("value").agg(pl.col("count").sum())


class Vocabulary:
    """The values of one field with their counts in the train split and their ids.

    Attributes:
        table: Columns value, count, id; row i has id i. The values of rows 0 (`EMPTY`) and 1 (`RARE`) are null, their
            counts those of all empty cells and of all rare ones, so that the counts add up to the values seen.
    """

    def __init__(self, table: pl.DataFrame) -> None:
        self.table = table

    @classmethod
    def build(cls, counts: pl.DataFrame, min_count: int) -> "Vocabulary":
        """Gives an id to every value counted at least `min_count` times. `counts`: see `count_values`."""
        seen = counts.filter(pl.col("value").is_not_null())
        frequent = seen.filter(pl.col("count") >= min_count).sort("count", "value", descending=[True, False])
        total, not_empty, not_rare = (int(frame["count"].sum()) for frame in (counts, seen, frequent))
        reserved = {"value": [None, None], "count": [total - not_empty, not_empty - not_rare]}
        ids = pl.int_range(pl.len(), dtype=pl.Int32).alias("id")
        return cls(pl.concat([pl.DataFrame(reserved, frequent.schema), frequent]).with_columns(ids))

    @classmethod
    def load(cls, path: str | Path) -> "Vocabulary":
        """Reads what `save` wrote."""
        return cls(pl.read_parquet(path))

    def save(self, path: str | Path) -> None:
        """Writes the table as Parquet."""
        self.table.write_parquet(path)

    @property
    def cardinality(self) -> int:
        """Rows of the embedding table, reserved ids included."""
        return self.table.height

    def encode(self, values: pl.Series) -> pl.Series:
        """Ids (int32) of values; for a sequence field, lists of ids of lists of values."""
        return _map_cells(values, self._ids)

    def decode(self, ids: pl.Series) -> pl.Series:
        """Values of ids, null for the reserved ones; for a sequence field, lists."""
        return _map_cells(ids, lambda cells: cells.replace_strict(self.table["id"], self.table["value"]))

    def _ids(self, values: pl.Expr) -> pl.Expr:
        frequent = self.table[RESERVED:]
        known = values.replace_strict(frequent["value"], frequent["id"], default=RARE, return_dtype=pl.Int32)
        return pl.when(values.is_null()).then(pl.lit(EMPTY, pl.Int32)).otherwise(known)


def _map_cells(column: pl.Series, function: Callable[[pl.Expr], pl.Expr]) -> pl.Series:
    """Applies a function to the cells, or to the elements of lists."""
    is_list = isinstance(column.dtype, pl.List)
    mapped = pl.all().list.eval(function(pl.element())) if is_list else function(pl.all())
    return column.to_frame().select(mapped.alias(column.name)).to_series()
