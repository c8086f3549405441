"""Raw cells to values, chunk by chunk; rows with a cell that cannot be read are refused, or set aside and counted."""

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import polars as pl

from sseds_rec.data.ahead import read_ahead
from sseds_rec.data.chunk import Chunk
from sseds_rec.data.sources import Source
from sseds_rec.errors import UserError

OnError = Literal["refuse", "skip"]


@dataclass(frozen=True)
class Reading:
    """How the cleaned columns of a chunk become values. See `clean`.

    Attributes:
        values: Named as the columns to make; null where a cell is empty.
        parsed: Columns that `values` and `unreadable` are made of, so that they are computed once.
        unreadable: True in rows whose cells are not what they should be; None if any will do.
        complaint: Says what is wrong with such a row (its columns by name).
    """

    values: Sequence[pl.Expr]
    parsed: Sequence[pl.Expr] = ()
    unreadable: pl.Expr | None = None
    complaint: Callable[[dict[str, object]], str] = lambda row: "cannot be read"


class Reader(Protocol):
    """Reads some columns of a source: a field, the label, or what decides the split."""

    @property
    def columns(self) -> Sequence[str]:
        """The columns it needs."""

    def reading(self, types: pl.Schema) -> Reading:
        """How they are read, given the types of the columns.

        Raises:
            UserError: A column of this type cannot be read.
        """


class Rejects:
    """What happens to rows that cannot be read.

    Args:
        on_error: `refuse` raises at the first; `skip` counts them.
        file: With `skip`, a CSV file (file, row, reason) that lists them, made when there is one; None lists nothing.

    Attributes:
        count: Of rows so far.
        first: The first of them, and why.
    """

    def __init__(self, on_error: OnError, file: Path | None) -> None:
        self.on_error, self.file, self.count = on_error, file, 0
        self.first: str | None = None

    def again(self) -> "Rejects | None":
        """For another pass, in which the same rows are left out without a word; None if there are none."""
        return Rejects("skip", None) if self.count else None

    def add(self, faults: Sequence[tuple[str, int, str]]) -> None:
        """Takes (file, row, reason) of rows, in order.

        Raises:
            UserError: They are refused.
        """
        if not faults:
            return
        file, row, reason = faults[0]
        self.first = self.first or f"{file}, row {row}: {reason}"
        if self.on_error == "refuse":
            raise UserError(self.first)
        self.count += len(faults)
        if self.file is None:
            return
        is_new = not self.file.exists()
        with open(self.file, "a", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerows([("file", "row", "reason")] if is_new else [])
            writer.writerows(faults)


@dataclass(frozen=True)
class Read:
    """The readable rows of a chunk, and how far the source has been read (a share, None if unknown)."""

    rows: pl.DataFrame
    done: float | None


def read_rows(source: Source, readers: Sequence[Reader], rejects: Rejects | None = None) -> Iterator[Read]:
    """Reads a source once, a few chunks ahead.

    Args:
        source: The rows.
        readers: What to read; the columns of the result are theirs.
        rejects: Gets the rows that cannot be read; None if a pass before has found that there are none.

    Raises:
        UserError: A column or, unless they are skipped, a row cannot be read.
    """
    columns = list(dict.fromkeys(column for reader in readers for column in reader.columns))
    for chunk in read_ahead(lambda: source.chunks(columns), depth=2):
        rows, faults = _read_chunk(chunk, readers, is_checked=rejects is not None)
        if rejects is not None:
            rejects.add(faults)
        if rows.height:
            yield Read(rows, chunk.done)


def _read_chunk(
    chunk: Chunk, readers: Sequence[Reader], is_checked: bool
) -> tuple[pl.DataFrame, list[tuple[str, int, str]]]:
    frame, undecodable = clean(chunk)
    readings = [reader.reading(frame.schema) for reader in readers]
    checked = {
        f"\0bad {i}": reading for i, reading in enumerate(readings) if is_checked and reading.unreadable is not None
    }
    expressions = [value for reading in readings for value in reading.values]
    try:
        parsed = frame.with_columns(column for reading in readings for column in reading.parsed)
        bad = (reading.unreadable.alias(name) for name, reading in checked.items() if reading.unreadable is not None)
        rows = parsed.select(*expressions, *bad)
    except pl.exceptions.PolarsError as error:
        raise UserError(f"{chunk.file}: cannot be read ({str(error).splitlines()[0]})") from None
    faults = {index: f"column {column!r} is not UTF-8 text" for index, column in undecodable.items()}
    for name, reading in checked.items():
        if rows[name].any():
            for index in rows[name].arg_true():
                faults.setdefault(index, reading.complaint(frame.row(index, named=True)))
    listed = list(zip(chunk.numbers(list(faults)), faults.values(), strict=True))
    listed += [(malformed.row, malformed.reason) for malformed in chunk.malformed]
    rows = rows.drop(list(checked))
    if faults:
        good = pl.Series([True]).new_from_index(0, rows.height).scatter(list(faults), False)
        rows = rows.filter(good)
    return rows, [(chunk.file, row, reason) for row, reason in sorted(listed)]


def clean(chunk: Chunk) -> tuple[pl.DataFrame, dict[int, str]]:
    """Text without surrounding spaces and tabs, null where nothing is left or the text means an empty cell.

    Returns:
        The frame, and the first undecodable column of every row (by index) that is not UTF-8.
    """
    frame, bad = chunk.frame, dict[int, str]()
    frame = frame.with_columns(pl.col(pl.Categorical, pl.Enum).cast(pl.String))
    for name in [name for name, dtype in frame.schema.items() if dtype == pl.Binary]:
        cells, undecodable = _decoded(frame[name])
        bad = dict.fromkeys(undecodable, name) | bad
        frame = frame.with_columns(cells)
    text = [name for name, dtype in frame.schema.items() if dtype == pl.String]
    padded = text if chunk.padded is None or chunk.missing else [name for name in text if name in chunk.padded]
    stripped = pl.col(padded).str.strip_chars(" \t")
    frame = frame.with_columns(pl.when(~stripped.is_in(["", *chunk.missing])).then(stripped)) if padded else frame
    return frame, bad


def _decoded(cells: pl.Series) -> tuple[pl.Series, list[int]]:
    """Bytes as text, and the indices of those that are not UTF-8."""
    try:
        return cells.cast(pl.String), []
    except pl.exceptions.ComputeError:
        texts: list[str | None] = []
        bad = []
        for index, cell in enumerate(cells):
            try:
                texts.append(None if cell is None else cell.decode())
            except UnicodeDecodeError:
                texts.append(None)
                bad.append(index)
        return pl.Series(cells.name, texts, pl.String), bad
