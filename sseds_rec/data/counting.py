"""How often each value of each field occurs, in bounded memory."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import polars as pl

#: Distinct values, over all fields, that are held before they are spilled to disk.
HELD_VALUES = 1 << 24
_COUNT = "\0count"  # as no column is called
_BUCKETS = 16  # of spilled values, by hash: one is held at a time in the end


class ValueCounts:
    """Counts the values of several fields, chunk by chunk.

    Chunks are counted alone. When their values are too many to hold, they are merged; when they still are, they go to disk.

    Args:
        fields: Names of the columns to count.
        folder: Where to spill; made when needed.
    """

    def __init__(self, fields: Sequence[str], folder: Path) -> None:
        self._fields, self._folder = list(fields), folder
        self._held: dict[str, list[pl.DataFrame]] = {name: [] for name in fields}
        self._count = self._spills = 0  # values held, with repetitions; files of each field

    def add(self, rows: pl.DataFrame) -> None:
        """Takes rows; null is an empty cell, and the elements of a list count one by one."""
        counted = rows.select(
            (pl.col(name).list.explode() if isinstance(rows.schema[name], pl.List) else pl.col(name))
            .value_counts(name=_COUNT)
            .implode()
            for name in self._fields
        )
        for name in self._fields:
            counts = counted[name].explode().struct.unnest()
            held = self._held[name]
            held.append(counts.select(pl.col(name).alias("value"), pl.col(_COUNT).cast(pl.Int64).alias("count")))
            self._count += counts.height
        if self._count > HELD_VALUES:
            self._held = {name: [_merged(held)] for name, held in self._held.items()}
            self._count = sum(frame.height for (frame,) in self._held.values())
            if self._count > HELD_VALUES // 2:
                self._spill()

    def merged(self, field: str) -> Iterator[pl.DataFrame]:
        """Frames with columns value and count; each value is in one of them, once."""
        held = self._held.pop(field)
        if not self._spills:
            yield _merged(held)
            return
        files = self._folder / f"{self._fields.index(field)}-*.parquet"
        for bucket in range(_BUCKETS):
            spilled = pl.scan_parquet(files).filter(pl.col("bucket") == bucket).select("value", "count").collect()
            yield _merged([spilled, *(frame.filter(_bucket() == bucket) for frame in held)])

    def _spill(self) -> None:
        self._folder.mkdir(exist_ok=True)
        for index, (counts,) in enumerate(self._held.values()):
            sorted_ = counts.with_columns(_bucket()).sort("bucket")  # so that reading one bucket skips the others
            sorted_.write_parquet(self._folder / f"{index}-{self._spills}.parquet", row_group_size=1 << 16)
        self._held = {name: [counts.clear()] for name, (counts,) in self._held.items()}
        self._count, self._spills = 0, self._spills + 1


def _merged(frames: list[pl.DataFrame]) -> pl.DataFrame:
    return pl.concat(frames).group_by("value").agg(pl.col("count").sum())


def _bucket() -> pl.Expr:
    return (pl.col("value").hash() % _BUCKETS).alias("bucket")
