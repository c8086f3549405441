"""Which rows are train, validation and test, and what their labels are."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import polars as pl

from sseds_rec.data.cells import OnError, Read, Reader, Reading, Rejects, read_rows
from sseds_rec.data.schema import LABEL, SPLITS
from sseds_rec.data.sources import Source
from sseds_rec.errors import UserError

SPLIT_KEY = "\0split"  # the column of a read chunk that decides the split
_LABELS = {"0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}
_SPLIT_NAMES = {"train": 0, "validation": 1, "valid": 1, "val": 1, "test": 2}
_ISO_DATE = r"^\d{4}-\d{2}-\d{2}([T ].*)?$"  # sorts as text
_BLOCK = 100  # consecutive rows that a random split divides exactly

#: Takes the rows of the next chunk; gives the index into `SPLITS` of each.
Divide = Callable[[pl.DataFrame], npt.NDArray[np.int8]]


@dataclass(frozen=True)
class LabelSpec:
    """The label: 0/1, true/false, or a column in which `positive` counts as 1 and all else as 0."""

    name: str
    positive: str | None = None

    @property
    def columns(self) -> Sequence[str]:
        """See `cells.Reader`."""
        return [self.name]

    def reading(self, types: pl.Schema) -> Reading:
        """The label as Int8, in the column `label`. See `cells.Reader`."""
        cells = pl.col(self.name).cast(pl.String)
        if self.positive is None:
            labels = cells.str.to_lowercase().replace_strict(_LABELS, default=None, return_dtype=pl.Int8)
        else:
            labels = (cells == self.positive.strip()).cast(pl.Int8)
        return Reading([pl.col(LABEL)], [labels.alias(LABEL)], pl.col(LABEL).is_null(), self._complaint)

    def _complaint(self, row: dict[str, object]) -> str:
        cell = row[self.name]
        if cell is None:
            return f"the label {self.name!r} is empty"
        hint = "it must be 0 or 1, or the value that counts as 1 must be given as positive"
        return f"the label {self.name!r} is {str(cell)!r}; {hint}"


@dataclass(frozen=True)
class SplitSpec:
    """How rows are divided.

    Attributes:
        by: `random`; `order` (the first rows train, the last test); `time:COLUMN` (earliest rows train, latest test; equal
            times stay together); `column:COLUMN` (its values name the split).
        fractions: Of train, validation and test; `column:` needs none.
        seed: Of the random division.
    """

    by: str = "random"
    fractions: Sequence[float] = (0.8, 0.1, 0.1)
    seed: int = 0

    def __post_init__(self) -> None:
        shown = ",".join(f"{fraction:g}" for fraction in self.fractions)
        if len(self.fractions) != len(SPLITS) or not all(fraction >= 0 for fraction in self.fractions):
            raise UserError(f"split {shown}: give three fractions, for train, validation and test")
        if not math.isclose(sum(self.fractions), 1, abs_tol=1e-6):
            raise UserError(f"split {shown}: sums to {sum(self.fractions):g}, not to 1")
        if self.by not in ("random", "order") and not (self.kind in ("time", "column") and self.column):
            raise UserError(f"split-by {self.by!r}: must be random, order, time:COLUMN or column:COLUMN")

    @property
    def kind(self) -> str:
        """`random`, `order`, `time` or `column`."""
        return self.by.partition(":")[0]

    @property
    def column(self) -> str | None:
        """The column that decides, if one does."""
        return self.by.partition(":")[2].strip() or None


def random_or_time(split_by: str, by_time: str, fractions: Sequence[float], seed: int, data: str) -> SplitSpec:
    """The split of a recipe that knows what time is in its data.

    Args:
        split_by: `random`, or `time`, which is `SplitSpec.by` = `by_time`.
        by_time: `order` or `time:COLUMN`.
        fractions: See `SplitSpec`.
        seed: See `SplitSpec`.
        data: What is divided, for people.

    Raises:
        UserError: `split_by` is something else, or the fractions are bad.
    """
    if split_by not in ("random", "time"):
        raise UserError(f"split-by {split_by!r}: must be random or time for {data}")
    return SplitSpec(by_time if split_by == "time" else split_by, fractions, seed)


@dataclass(frozen=True)
class NamedSplit:
    """Reads a column whose values name the split."""

    name: str

    @property
    def columns(self) -> Sequence[str]:
        """See `cells.Reader`."""
        return [self.name]

    def reading(self, types: pl.Schema) -> Reading:
        """Indices into `SPLITS`, in the column `SPLIT_KEY`. See `cells.Reader`."""
        cells = pl.col(self.name).cast(pl.String).str.to_lowercase()
        split = cells.replace_strict(_SPLIT_NAMES, default=None, return_dtype=pl.Int8)
        return Reading([pl.col(SPLIT_KEY)], [split.alias(SPLIT_KEY)], pl.col(SPLIT_KEY).is_null(), self._complaint)

    def _complaint(self, row: dict[str, object]) -> str:
        return f"split column {self.name!r} {_found(row[self.name])}; it must be train, validation or test"


@dataclass
class Time:
    """Reads a column of times: all numbers, all dates, or all ISO texts; the first cell of a text column decides."""

    name: str
    is_number: bool | None = field(default=None, init=False)

    @property
    def columns(self) -> Sequence[str]:
        """See `cells.Reader`."""
        return [self.name]

    def decide(self, source: Source) -> None:
        """Looks at the first cell of a text column."""
        for chunk in source.chunks([self.name]):
            cells = chunk.frame[self.name].cast(pl.String).str.strip_chars()
            if (filled := cells.filter(cells.fill_null("") != "")).len():
                self.is_number = bool(filled.head(1).cast(pl.Float64, strict=False).is_finite().fill_null(False).item())
                return

    def reading(self, types: pl.Schema) -> Reading:
        """Times that can be compared, in the column `SPLIT_KEY`. See `cells.Reader`."""
        cells, dtype = pl.col(self.name), types[self.name]
        if dtype == pl.String and not self.is_number:
            is_date = cells.str.contains(_ISO_DATE).fill_null(False)
            return Reading([cells.alias(SPLIT_KEY)], (), ~is_date, self._complaint)
        if not (dtype == pl.String or dtype.is_numeric() or dtype.is_temporal()):
            raise UserError(f"time column {self.name!r} holds {dtype}, not times")
        if isinstance(dtype, pl.Date | pl.Datetime):  # of another file they may be in other units
            cells = cells.cast(pl.Datetime("us", getattr(dtype, "time_zone", None)))
        numbers = (cells.to_physical() if dtype.is_temporal() else cells).cast(pl.Float64, strict=False)
        times = pl.col(SPLIT_KEY)
        return Reading([times], [numbers.alias(SPLIT_KEY)], ~times.is_finite().fill_null(False), self._complaint)

    def _complaint(self, row: dict[str, object]) -> str:
        return f"time column {self.name!r} {_found(row[self.name])}; all must be numbers, or all ISO dates"


def plan_split(
    source: Source, spec: SplitSpec, readers: Sequence[Reader], on_error: OnError
) -> tuple[NamedSplit | Time | None, Callable[[], Divide]]:
    """Prepares to divide a source; by time or order this takes a pass over one column.

    Args:
        source: The rows.
        spec: How to divide them.
        readers: Of the label and the fields; a row that one of them cannot read is in no split.
        on_error: What happens to such rows.

    Returns:
        What reads the column that decides (None if none does), and a function that starts a pass. All passes divide
        alike, however the rows are cut into chunks.

    Raises:
        UserError: A cell of a time column is no time, and such rows are refused; or none is.
    """
    if spec.kind == "random":
        return None, lambda: _Random(spec).divide
    if spec.kind == "order":
        rows = sum(read.rows.height for read in _readable(source, readers[:1], readers, on_error))
        return None, lambda: _Order(rows, spec).divide
    assert spec.column is not None
    if spec.kind == "column":
        return NamedSplit(spec.column), lambda: lambda rows: rows[SPLIT_KEY].to_numpy()
    reader = Time(spec.column)
    reader.decide(source)
    validation, test = _first_times(source, reader, spec, readers, on_error)

    def divide(rows: pl.DataFrame) -> npt.NDArray[np.int8]:
        times = rows[SPLIT_KEY]
        return ((times >= validation).cast(pl.Int8) + (times >= test).cast(pl.Int8)).to_numpy()

    return reader, lambda: divide


def _first_times(
    source: Source, reader: Time, spec: SplitSpec, readers: Sequence[Reader], on_error: OnError
) -> tuple[object, object]:
    """The times at which validation and test begin; the memory is that of the distinct times."""
    counts: pl.DataFrame | None = None
    for read in _readable(source, [reader], [reader, *readers], on_error):
        chunk = read.rows.group_by(SPLIT_KEY).agg(pl.len())
        both = chunk if counts is None else pl.concat([counts, chunk]).group_by(SPLIT_KEY).agg(pl.col("len").sum())
        counts = both
    if counts is None:
        raise UserError(f"{source.name}: no row has a time in {reader.name!r}")
    counts = counts.sort(SPLIT_KEY).with_columns(pl.col("len").cum_sum())
    rows = int(counts["len"][-1])
    first, second = (
        counts[SPLIT_KEY][int((counts["len"] <= cut).sum())] if cut < rows else None for cut in _cuts(rows, spec)
    )
    never = "\U0010ffff" if counts.schema[SPLIT_KEY] == pl.String else math.inf
    return (never if first is None else first), (never if second is None else second)


def _readable(source: Source, needed: Sequence[Reader], readers: Sequence[Reader], on_error: OnError) -> Iterator[Read]:
    """The rows that will be divided: where rows may be skipped, only all readers together know which."""
    return read_rows(source, readers if on_error == "skip" else needed, Rejects(on_error, None))


class _Order:
    def __init__(self, rows: int, spec: SplitSpec) -> None:
        self._cuts, self._row = _cuts(rows, spec), 0

    def divide(self, rows: pl.DataFrame) -> npt.NDArray[np.int8]:
        numbers = np.arange(self._row, self._row + rows.height)
        self._row += rows.height
        return np.searchsorted(self._cuts, numbers, side="right").astype(np.int8)


class _Random:
    """Divides every hundred consecutive rows as the fractions say, at random."""

    def __init__(self, spec: SplitSpec) -> None:
        self._spec = spec
        self._generator = np.random.default_rng(spec.seed)
        self._ready = np.empty(0, np.int8)
        self._blocks = 0

    def divide(self, rows: pl.DataFrame) -> npt.NDArray[np.int8]:
        lacking = rows.height - len(self._ready)
        if lacking > 0:
            blocks = -(-lacking // _BLOCK)
            self._ready = np.concatenate([self._ready, self._draw(blocks)])
        split_of, self._ready = self._ready[: rows.height], self._ready[rows.height :]
        return split_of

    def _draw(self, blocks: int) -> npt.NDArray[np.int8]:
        ends = (self._blocks + np.arange(blocks + 1)) * _BLOCK
        self._blocks += blocks
        # How many of the rows up to the end of each block are train, and train or validation.
        cuts = np.stack([np.round(ends * share) for share in np.cumsum(self._spec.fractions)[:2]])
        in_block = np.diff(cuts, axis=1)[:, :, None]
        rank = self._generator.random((blocks, _BLOCK)).argsort(axis=1)
        split_of = (rank >= in_block[0]).astype(np.int8) + (rank >= in_block[1])
        return split_of.reshape(-1)


def _cuts(rows: int, spec: SplitSpec) -> tuple[int, int]:
    train, validation, _ = spec.fractions
    return round(rows * train), round(rows * (train + validation))


def _found(cell: object) -> str:
    return "is empty" if cell is None else f"holds {cell!r}"
