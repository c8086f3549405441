"""CSV and TSV files, plain or gzip: chunks of text cells, every row of which has its number."""

import csv
import gzip
import io
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO

import polars as pl
import pyarrow as pa
import pyarrow.csv

from sseds_rec.data import chunk
from sseds_rec.data.ahead import read_ahead
from sseds_rec.data.chunk import Chunk, Malformed
from sseds_rec.errors import UserError

BLOCK_BYTES = 1 << 22  # what is parsed at a time
_LOOK = 20  # records that tell how many cells a row has


@dataclass(frozen=True)
class Delimited:
    """One file.

    Attributes:
        file: Path, for people.
        is_gzip: Whether it is compressed.
        delimiter: Between cells.
        quoted: Whether a cell may be put in double quotes; even so it must not go on over several lines, since one
            quote that is not closed would swallow rows.
        names: Of the columns.
        skipped: Lines above the first row: the header, and blank lines.
        header: 1 if the header counts as a row, otherwise 0.
    """

    file: str
    is_gzip: bool
    delimiter: str
    quoted: bool
    names: list[str]
    skipped: int
    header: int

    @classmethod
    def open(cls, file: str, raw: IO[bytes], delimiter: str, quoted: bool, header: Sequence[str]) -> "Delimited":
        """Looks at the first rows.

        Args:
            file: Path, for people.
            raw: Its bytes.
            delimiter: Between cells.
            quoted: See the attribute.
            header: Names of the columns, if the file has no header line.

        Raises:
            UserError: It is empty, or its rows do not have as many cells as names are given.
        """
        is_gzip = file.lower().endswith(".gz")
        plain = gzip.GzipFile(fileobj=raw) if is_gzip else raw
        with io.TextIOWrapper(plain, encoding="utf-8-sig", errors="replace", newline="") as lines:
            reader = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE)
            records = [(record, reader.line_num) for record in itertools.islice(reader, _LOOK)]
        filled = [(record, line) for record, line in records if record]
        if not filled:
            raise UserError(f"{file}: is empty")
        first, line = filled[0]
        if header and not any(len(record) == len(header) for record, _ in filled):
            raise UserError(f"{file}, row 1: has {len(first)} cells, but {len(header)} column names were given")
        names = [name.strip() for name in header or first]
        return cls(file, is_gzip, delimiter, quoted, names, 0 if header else line, int(not header))

    def chunks(self, raw: IO[bytes], wanted: Sequence[str]) -> Iterator[Chunk]:
        """Reads the named columns as text; a column that is not all UTF-8 stays binary in its chunk."""
        malformed: list[Malformed] = []
        first = 1 + self.header
        # Parsing has a thread of its own: together with what follows it would be slower than the use of the chunks.
        for batches in read_ahead(lambda: self._gathered(raw, wanted, malformed), depth=1):
            padded = {name for name in wanted if any(_has(batch.column(name), b" \t") for batch in batches)}
            frame = _text_frame(batches)
            broken = [name for name in wanted if self.quoted and any(_has(b.column(name), b"\n\r") for b in batches)]
            for piece in frame.iter_slices(chunk.CHUNK_ROWS):
                # The parser is ahead of what it has handed out, so that it may know of malformed rows further on.
                last, mine = first + piece.height - 1, 0
                while mine < len(malformed) and malformed[mine].row <= last:
                    last, mine = last + 1, mine + 1
                read = Chunk(piece, self.file, first, malformed[:mine], padded=padded)
                self._refuse_broken(read, broken)
                yield read
                first = last + 1
                del malformed[:mine]
        if malformed:
            yield Chunk(pl.DataFrame(schema=dict.fromkeys(wanted, pl.String)), self.file, first, malformed)

    def _gathered(
        self, raw: IO[bytes], wanted: Sequence[str], malformed: list[Malformed]
    ) -> Iterator[list[pa.RecordBatch]]:
        """Lists of batches with about as many rows as a chunk, good and malformed ones together."""
        held: list[pa.RecordBatch] = []
        for batch in self._parse(raw, wanted, malformed):
            held.append(batch)
            if sum(map(len, held)) + len(malformed) >= chunk.CHUNK_ROWS:
                yield held
                held = []
        if held:
            yield held

    def _parse(self, raw: IO[bytes], wanted: Sequence[str], malformed: list[Malformed]) -> Iterator[pa.RecordBatch]:
        """Batches of the columns' bytes; rows that have other than the expected cells end up in `malformed`."""

        def note(row: pa.csv.InvalidRow) -> str:
            reason = f"has {row.actual_columns} cells instead of {row.expected_columns}"
            malformed.append(Malformed(row.number - self.skipped + self.header, reason))
            return "skip" if len(malformed) <= 2 * chunk.CHUNK_ROWS else "error"  # it is another kind of file

        yield from pa.csv.open_csv(
            pa.CompressedInputStream(raw, "gzip") if self.is_gzip else raw,
            # with threads, rows would have no numbers
            read_options=pa.csv.ReadOptions(
                use_threads=False, block_size=BLOCK_BYTES, column_names=self.names, skip_rows=self.skipped
            ),
            parse_options=pa.csv.ParseOptions(
                delimiter=self.delimiter,
                quote_char='"' if self.quoted else False,
                newlines_in_values=self.quoted,
                invalid_row_handler=note,
                ignore_empty_lines=len(self.names) > 1,
            ),
            convert_options=pa.csv.ConvertOptions(
                include_columns=list(wanted),
                column_types=dict.fromkeys(self.names, pa.binary()),  # not string: one bad byte would refuse the block
                strings_can_be_null=True,
                null_values=[""],
            ),
        )

    def _refuse_broken(self, read: Chunk, columns: Sequence[str]) -> None:
        for name in columns:
            cells = read.frame[name].cast(pl.Binary)
            is_broken = cells.bin.contains(b"\n") | cells.bin.contains(b"\r")
            if is_broken.any():
                (row,) = read.numbers([is_broken.arg_max() or 0])
                raise UserError(
                    f"{self.file}, row {row}: column {name!r} goes on over several lines; close the quote, or take the line "
                    "breaks out of the cells"
                )


def _has(column: pa.Array, signs: bytes) -> bool:
    data = column.buffers()[2]
    if data is None:
        return False
    content = memoryview(data).tobytes()
    return any(content.find(sign) >= 0 for sign in signs)


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
