"""Where raw rows come from: files or a frame, read in chunks as often as needed."""

import csv
import difflib
import gzip
import io
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Protocol

import polars as pl
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from sseds_rec.errors import UserError
from sseds_rec.files import exists, open_file

CHUNK_ROWS = 1 << 17
BLOCK_BYTES = 1 << 22  # what the CSV reader parses at a time
_DELIMITERS = {".csv": ",", ".tsv": "\t", ".txt": "\t"}
_PARQUET = (".parquet", ".pq")


@dataclass(frozen=True)
class Malformed:
    """A row of a text file that has too many or too few cells.

    Attributes:
        row: Its number as people count them: from 1, the header included.
        reason: What is wrong with it.
    """

    row: int
    reason: str


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of one file.

    Attributes:
        frame: The columns asked for, without the malformed rows; may be empty.
        file: Path, or another name for people.
        first_row: Number of the first row, malformed or not: from 1, the header included.
        malformed: The rows in between that could not be read, in order.
        done: Share of the source that has been read, up to and including this chunk; None if that is unknown.
        padded: Text columns in which a cell may begin or end with a blank; None if that is unknown.
    """

    frame: pl.DataFrame
    file: str
    first_row: int
    malformed: Sequence[Malformed] = ()
    done: float | None = None
    padded: Collection[str] | None = None

    def number(self, index: int) -> int:
        """The row number of an index into the frame."""
        number = self.first_row + index
        for other in self.malformed:
            number += other.row <= number
        return number


class Source(Protocol):
    """Rows that can be read more than once, always in the same order.

    Attributes:
        name: For people: the first file, say.
        columns: Names of the columns.
    """

    name: str
    columns: list[str]

    def chunks(self, columns: Iterable[str]) -> Iterator[Chunk]:
        """Reads the named columns in bounded memory."""


class Frame:
    """Rows in memory."""

    def __init__(self, frame: pl.DataFrame, name: str) -> None:
        self.frame, self.name, self.columns = frame, name, frame.columns

    def chunks(self, columns: Iterable[str]) -> Iterator[Chunk]:
        first = 1
        for rows in self.frame.select(columns).iter_slices(CHUNK_ROWS):
            yield Chunk(rows, self.name, first, done=(first + rows.height - 1) / self.frame.height)
            first += rows.height


class Files:
    """CSV, TSV (plain or gzip, cells as text) or Parquet files, one after the other.

    Args:
        paths: At least one, of this machine or of a store registered with iopath; the suffix says the format
            (.csv, .tsv or .txt, each also with .gz, .parquet or .pq).
        header: Names of the columns of CSV and TSV files that have no header line.
        missing: Cells to read as empty, for example `NA`.
        quoted: Whether a cell of a CSV or TSV file may be put in double quotes.
        delimiter: All files are text with this between the cells, whatever their suffix.

    Raises:
        UserError: No file, a missing, empty or unreadable one, an unknown suffix, or files with different columns.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        header: Sequence[str] = (),
        missing: Sequence[str] = (),
        quoted: bool = True,
        delimiter: str | None = None,
    ) -> None:
        if not paths:
            raise UserError("no input file is named")
        files = [str(path) for path in paths]
        self.name = files[0]
        self.has_header, self.missing, self.quoted = not header, list(missing), quoted
        self._delimiter = delimiter
        self._names = {file: self._read_names(file, list(header)) for file in files}
        self._bytes = {file: _size(file) for file in files}
        self.columns = self._names[self.name]
        for file, names in self._names.items():
            if odd := sorted(set(names) ^ set(self.columns)):
                raise UserError(f"{file}: column {odd[0]!r} is not in both this file and {self.name}")

    def chunks(self, columns: Iterable[str]) -> Iterator[Chunk]:
        wanted = list(columns)
        before, total = 0, max(sum(self._bytes.values()), 1)
        for file in self._names:
            try:
                with open_file(file) as raw:
                    for chunk in self._read(file, raw, wanted):
                        done = (before + (self._bytes[file] if raw.closed else raw.tell())) / total
                        yield replace(chunk, frame=self._blanked(chunk.frame), done=done)
            except (pa.ArrowException, OSError, EOFError) as error:
                raise UserError(f"{file}: cannot be read ({_first_line(error)})") from None
            before += self._bytes[file]

    def _read(self, file: str, raw: IO[bytes], wanted: list[str]) -> Iterator[Chunk]:
        if self._is_parquet(file):
            stored = dict(zip(self._names[file], pq.read_schema(raw).names, strict=True))
            first = 1
            for batch in pq.ParquetFile(raw).iter_batches(CHUNK_ROWS, columns=[stored[name] for name in wanted]):
                frame = _frame([batch]).select(pl.col(stored[name]).alias(name) for name in wanted)
                yield Chunk(frame, file, first)
                first += frame.height
            return
        malformed: list[Malformed] = []
        first = 2 if self.has_header else 1
        for batches in _gathered(self._parse(file, raw, wanted, malformed)):
            padded = {name for name in wanted if any(_has_blank(batch.column(name)) for batch in batches)}
            for frame in _text_frame(batches).iter_slices(CHUNK_ROWS):
                # The parser is ahead of what it has handed out, so that it may know of malformed rows further on.
                last, mine = first + frame.height - 1, 0
                while mine < len(malformed) and malformed[mine].row <= last:
                    last, mine = last + 1, mine + 1
                yield Chunk(frame, file, first, malformed[:mine], padded=padded)
                first = last + 1
                del malformed[:mine]
        if malformed:
            yield Chunk(pl.DataFrame(schema=dict.fromkeys(wanted, pl.String)), file, first, malformed)

    def _parse(
        self, file: str, raw: IO[bytes], wanted: list[str], malformed: list[Malformed]
    ) -> Iterator[pa.RecordBatch]:
        """Batches of the columns' bytes; rows that have other than the expected cells end up in `malformed`."""

        def note(row: pa.csv.InvalidRow) -> str:
            malformed.append(Malformed(row.number, f"has {row.actual_columns} cells instead of {row.expected_columns}"))
            return "skip"

        names = self._names[file]
        yield from pa.csv.open_csv(
            pa.CompressedInputStream(raw, "gzip") if _is_gzip(file) else raw,
            # with threads, rows would have no numbers
            read_options=pa.csv.ReadOptions(
                use_threads=False, block_size=BLOCK_BYTES, column_names=names, skip_rows=int(self.has_header)
            ),
            parse_options=pa.csv.ParseOptions(
                delimiter=self._delimiter_of(file),
                quote_char='"' if self.quoted else False,
                newlines_in_values=self.quoted,
                invalid_row_handler=note,
                ignore_empty_lines=len(names) > 1,
            ),
            convert_options=pa.csv.ConvertOptions(
                include_columns=wanted,
                column_types=dict.fromkeys(names, pa.binary()),  # not string: one bad byte would refuse the block
                strings_can_be_null=True,
                null_values=[""],
            ),
        )

    def _blanked(self, frame: pl.DataFrame) -> pl.DataFrame:
        if not self.missing:
            return frame
        cells = pl.col(pl.String)
        return frame.with_columns(pl.when(~cells.str.strip_chars().is_in(self.missing)).then(cells))

    def _read_names(self, file: str, header: list[str]) -> list[str]:
        if not exists(file):
            raise UserError(f"{file}: no such file")
        if os.path.isdir(file):
            raise UserError(f"{file}: is a folder; name the files in it")
        if not self._delimiter and _suffix(file) not in (*_DELIMITERS, *_PARQUET):
            raise UserError(f"{file}: unknown format; the name must end in .csv, .tsv, .txt (tabs) or .parquet")
        try:
            with open_file(file) as raw:
                if self._is_parquet(file):
                    header = first = pq.read_schema(raw).names
                else:
                    first = _first_record(raw, _is_gzip(file), self._delimiter_of(file))
        except (pa.ArrowException, OSError, EOFError, ValueError, csv.Error) as error:
            raise UserError(f"{file}: cannot be read ({_first_line(error)})") from None
        if not first:
            raise UserError(f"{file}: is empty")
        names = [name.strip() for name in header or first]
        if len(names) != len(first):
            raise UserError(f"{file}, row 1: has {len(first)} cells, but {len(names)} column names were given")
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"{file}: two columns are called {twice[0]!r}")
        return names

    def _is_parquet(self, file: str) -> bool:
        return not self._delimiter and _suffix(file) in _PARQUET

    def _delimiter_of(self, file: str) -> str:
        return self._delimiter or _DELIMITERS[_suffix(file)]


def check_columns(source: Source, wanted: Iterable[str]) -> None:
    """Refuses columns that the source lacks, naming the nearest that it has."""
    for column in wanted:
        if column not in source.columns:
            near = difflib.get_close_matches(column, source.columns, n=1, cutoff=0.0)
            raise UserError(f"{source.name}: no column {column!r}; the nearest name is {near[0]!r}")


def _gathered(batches: Iterable[pa.RecordBatch]) -> Iterator[list[pa.RecordBatch]]:
    """Lists of batches with `CHUNK_ROWS` rows or a few more."""
    held: list[pa.RecordBatch] = []
    for batch in batches:
        held.append(batch)
        if sum(len(batch) for batch in held) >= CHUNK_ROWS:
            yield held
            held = []
    if held:
        yield held


def _has_blank(column: pa.Array) -> bool:
    data = column.buffers()[2]
    return data is not None and any(blank in memoryview(data).tobytes() for blank in (b" ", b"\t"))


def _frame(batches: list[pa.RecordBatch]) -> pl.DataFrame:
    return pl.DataFrame(pl.from_arrow(pa.Table.from_batches(batches)))


def _text_frame(batches: list[pa.RecordBatch]) -> pl.DataFrame:
    table = pa.Table.from_batches(batches)
    columns = {name: _text(table.column(name)) for name in table.column_names}
    return pl.DataFrame(pl.from_arrow(pa.table(columns)))


def _text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The parser's bytes as text, which are not copied; binary still if they are not all UTF-8."""
    try:
        return column.cast(pa.string()).cast(pa.string_view())
    except pa.ArrowInvalid:
        return column


def _is_gzip(file: str) -> bool:
    return file.lower().endswith(".gz")


def _suffix(file: str) -> str:
    return Path(file[:-3] if _is_gzip(file) else file).suffix.lower()


def _size(file: str) -> int:
    with open_file(file) as raw:
        return raw.seek(0, io.SEEK_END) if raw.seekable() else 0


def _first_record(raw: IO[bytes], is_gzip: bool, delimiter: str) -> list[str]:
    plain = gzip.GzipFile(fileobj=raw) if is_gzip else raw
    with io.TextIOWrapper(plain, encoding="utf-8-sig", errors="replace", newline="") as lines:
        return next(csv.reader(lines, delimiter=delimiter), [])


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
