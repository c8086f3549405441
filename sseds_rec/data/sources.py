"""Where raw rows come from: files or a frame, read in chunks as often as needed."""

import csv
import difflib
import gzip
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TextIO, cast

import polars as pl

from sseds_rec.errors import UserError

CHUNK_ROWS = 1 << 18
_DELIMITERS = {".csv": ",", ".tsv": "\t", ".txt": "\t"}
_PARQUET = (".parquet", ".pq")


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of one file.

    Attributes:
        frame: The columns asked for.
        file: Path, or another name for people.
        first_row: Number of the first row as people count them: from 1, the header included.
    """

    frame: pl.DataFrame
    file: str
    first_row: int

    def where(self, index: int) -> str:
        """Names the file and row of an index into the frame."""
        return f"{self.file}, row {self.first_row + index}"


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
            yield Chunk(rows, self.name, first)
            first += rows.height


class Files:
    """CSV, TSV (plain or gzip, cells as text) or Parquet files, one after the other.

    Args:
        paths: At least one; the suffix says the format (.csv, .tsv or .txt, each also with .gz, .parquet or .pq).
        header: Names of the columns of CSV and TSV files that have no header line.
        missing: Cells to read as empty, for example `NA`.

    Raises:
        UserError: No file, a missing, empty or unreadable one, an unknown suffix, or files with different columns.
    """

    def __init__(self, paths: Sequence[str | Path], header: Sequence[str] = (), missing: Sequence[str] = ()) -> None:
        if not paths:
            raise UserError("no input file is named")
        files = [Path(path) for path in paths]
        self.name = str(files[0])
        self.has_header = not header
        self.missing = list(missing)
        self._names = {file: self._read_names(file, list(header)) for file in files}
        self.columns = self._names[files[0]]
        for file, names in self._names.items():
            if odd := sorted(set(names) ^ set(self.columns)):
                raise UserError(f"{file}: column {odd[0]!r} is not in both this file and {self.name}")

    def chunks(self, columns: Iterable[str]) -> Iterator[Chunk]:
        wanted = list(columns)
        for file, names in self._names.items():
            row = 2 if self.has_header and _suffix(file) in _DELIMITERS else 1
            try:
                rows = self._scan(file)
                if (
                    _suffix(file) in _PARQUET
                ):  # of text, all cells are read: a row with too many goes unnoticed otherwise
                    rows = rows.select(wanted)
                for frame in rows.collect_batches(chunk_size=CHUNK_ROWS):
                    yield Chunk(frame.select(wanted), str(file), row)
                    row += frame.height
            except (pl.exceptions.PolarsError, OSError) as error:
                raise UserError(_ragged_row(file, len(names)) or f"{file}: {_first_line(error)}") from None

    def _scan(self, file: Path) -> pl.LazyFrame:
        names = self._names[file]
        if _suffix(file) in _PARQUET:
            rows = pl.scan_parquet(file, glob=False)
            rows = rows.rename(dict(zip(rows.collect_schema().names(), names, strict=True)))
        else:  # skip the header instead of parsing it: the names are known, and without their spaces
            schema = {name: pl.String for name in names}
            delimiter = _DELIMITERS[_suffix(file)]
            skip = int(self.has_header)
            rows = pl.scan_csv(file, separator=delimiter, has_header=False, skip_rows=skip, schema=schema, glob=False)
        if not self.missing:
            return rows
        cells = pl.col(pl.String)
        return rows.with_columns(pl.when(~cells.str.strip_chars().is_in(self.missing)).then(cells))

    def _read_names(self, file: Path, header: list[str]) -> list[str]:
        if not file.exists():
            raise UserError(f"{file}: no such file")
        if file.is_dir():
            raise UserError(f"{file}: is a folder; name the files in it")
        if _suffix(file) not in (*_DELIMITERS, *_PARQUET):
            raise UserError(f"{file}: unknown format; the name must end in .csv, .tsv, .txt (tabs) or .parquet")
        try:
            if _suffix(file) in _PARQUET:
                first = list(pl.read_parquet_schema(file))
                header = first
            else:
                first = next(_records(file), [])
        except (pl.exceptions.PolarsError, OSError, EOFError, ValueError, csv.Error) as error:
            raise UserError(f"{file}: cannot be read ({_first_line(error)})") from None
        if not first:
            raise UserError(f"{file}: is empty")
        names = [name.strip() for name in header or first]
        if len(names) != len(first):
            raise UserError(f"{file}, row 1: has {len(first)} cells, but {len(names)} column names were given")
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"{file}: two columns are called {twice[0]!r}")
        return names


def check_columns(source: Source, wanted: Iterable[str]) -> None:
    """Refuses columns that the source lacks, naming the nearest that it has."""
    for column in wanted:
        if column not in source.columns:
            near = difflib.get_close_matches(column, source.columns, n=1, cutoff=0.0)
            raise UserError(f"{source.name}: no column {column!r}; the nearest name is {near[0]!r}")


def _suffix(file: Path) -> str:
    return Path(file.stem if file.suffix.lower() == ".gz" else file.name).suffix.lower()


def _records(file: Path) -> Iterator[list[str]]:
    opener = gzip.open if file.suffix.lower() == ".gz" else open
    with cast(TextIO, opener(file, "rt", encoding="utf-8-sig", newline="")) as lines:
        yield from csv.reader(lines, delimiter=_DELIMITERS[_suffix(file)])


def _ragged_row(file: Path, cells: int) -> str | None:
    """Finds the row that a CSV reader in C refused without saying which."""
    try:
        for row, record in enumerate(_records(file), start=1):
            if len(record) > cells:
                return f"{file}, row {row}: has {len(record)} cells, the rows before have {cells}"
    except (OSError, EOFError, ValueError, KeyError, csv.Error):
        pass
    return None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
