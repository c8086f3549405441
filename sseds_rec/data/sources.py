"""Where raw rows come from: files or a frame, read in chunks as often as needed."""

import csv
import difflib
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Protocol

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from sseds_rec.data import chunk
from sseds_rec.data.chunk import Chunk
from sseds_rec.data.delimited import Delimited
from sseds_rec.errors import UserError
from sseds_rec.files import exists, open_file

_DELIMITERS = {".csv": ",", ".tsv": "\t", ".txt": "\t"}
_PARQUET = (".parquet", ".pq")


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
        for rows in self.frame.select(columns).iter_slices(chunk.CHUNK_ROWS):
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
        if twice := [file for file in files if files.count(file) > 1]:
            raise UserError(f"{twice[0]}: is named twice")
        self.name = files[0]
        self._missing = list(missing)
        self._opened = {file: self._open(file, list(header), quoted, delimiter) for file in files}
        self._bytes = {file: _size(file) for file in files}
        self.columns = self._names(self.name)
        for file in files:
            names = self._names(file)
            if twice := [name for name in names if names.count(name) > 1]:
                raise UserError(f"{file}: two columns are called {twice[0]!r}")
            if odd := sorted(set(names) ^ set(self.columns)):
                raise UserError(f"{file}: column {odd[0]!r} is not in both this file and {self.name}")

    def chunks(self, columns: Iterable[str]) -> Iterator[Chunk]:
        wanted = list(columns)
        before, total = 0, max(sum(self._bytes.values()), 1)
        for file, opened in self._opened.items():
            try:
                with open_file(file) as raw:
                    for piece in opened.chunks(raw, wanted):
                        done = (before + (self._bytes[file] if raw.closed else raw.tell())) / total
                        yield replace(piece, done=done, missing=self._missing)
            except (pa.ArrowException, OSError, EOFError) as error:
                raise UserError(f"{file}: cannot be read ({_first_line(error)})") from None
            before += self._bytes[file]

    def _names(self, file: str) -> list[str]:
        return self._opened[file].names

    def _open(self, file: str, header: list[str], quoted: bool, delimiter: str | None) -> "Delimited | ParquetFile":
        if not exists(file):
            raise UserError(f"{file}: no such file")
        if os.path.isdir(file):
            raise UserError(f"{file}: is a folder; name the files in it")
        suffix = Path(file[:-3] if file.lower().endswith(".gz") else file).suffix.lower()
        if not delimiter and suffix not in (*_DELIMITERS, *_PARQUET):
            raise UserError(f"{file}: unknown format; the name must end in .csv, .tsv, .txt (tabs) or .parquet")
        try:
            with open_file(file) as raw:
                if not delimiter and suffix in _PARQUET:
                    return ParquetFile(file, raw)
                return Delimited.open(file, raw, delimiter or _DELIMITERS[suffix], quoted, header)
        except (pa.ArrowException, OSError, EOFError, ValueError, csv.Error) as error:
            raise UserError(f"{file}: cannot be read ({_first_line(error)})") from None


class ParquetFile:
    """One Parquet file.

    Attributes:
        names: Of the columns.
    """

    def __init__(self, file: str, raw: IO[bytes]) -> None:
        self._file, self._stored = file, pq.read_schema(raw).names
        self.names = [name.strip() for name in self._stored]

    def chunks(self, raw: IO[bytes], wanted: Sequence[str]) -> Iterator[Chunk]:
        """Reads the named columns."""
        stored = dict(zip(self.names, self._stored, strict=True))
        first = 1
        for batch in pq.ParquetFile(raw).iter_batches(chunk.CHUNK_ROWS, columns=[stored[name] for name in wanted]):
            table = pa.table({name: batch.column(stored[name]) for name in wanted})
            frame = pl.DataFrame(pl.from_arrow(table))
            yield Chunk(frame, self._file, first)
            first += frame.height


def check_columns(source: Source, wanted: Iterable[str]) -> None:
    """Refuses columns that the source lacks, naming the nearest that it has, and names that polars takes for patterns."""
    for column in wanted:
        if column not in source.columns:
            near = difflib.get_close_matches(column, source.columns, n=1, cutoff=0.0)
            raise UserError(f"{source.name}: no column {column!r}; the nearest name is {near[0]!r}")
        if column == "*" or (column.startswith("^") and column.endswith("$")):
            raise UserError(f"{source.name}: column {column!r} cannot be read under this name; rename it")


def _size(file: str) -> int:
    with open_file(file) as raw:
        return raw.seek(0, io.SEEK_END) if raw.seekable() else 0


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
