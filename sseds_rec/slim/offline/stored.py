"""Tensors as they lie in files: which bytes of which file are which rows and columns.

Rows are read straight from their bytes, some megabytes at a time. `torch.load` would read the whole of what was stored at once,
and with table-wise sharding that is a whole table.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from sseds_rec.errors import UserError
from sseds_rec.slim.columns import RowConversion
from sseds_rec.slim.offline.reading import Window, opened
from sseds_rec.slim.offline.records import FileSlice, joined, record_checksums

#: Bytes read at once: they stay in the processor's cache until their columns are gathered.
_READ_BYTES = 4 << 20


@dataclass(frozen=True)
class StoredChunk:
    """Some rows and columns of a tensor, row by row in a file.

    Attributes:
        path: the file.
        position: where in it the first number is, in bytes.
        row_bytes: from one row to the next.
        first_row, rows, first_column, columns: what part of the tensor this is.
        dtype: of the numbers.
        checksum: CRC-32 of all its bytes, if it was stored with one.
    """

    path: Path
    position: int
    row_bytes: int
    first_row: int
    rows: int
    first_column: int
    columns: int
    dtype: torch.dtype
    checksum: int | None = None

    def read(self, handle: int, start: int, stop: int, window: Window) -> tuple[Tensor, memoryview]:
        """Rows [start, stop) of the tensor as values [stop - start, columns], and as bytes, until the window's next use.

        Raises:
            UserError: the file ends before them.
        """
        size = (stop - start) * self.row_bytes
        memory = window.read(handle, self.position + (start - self.first_row) * self.row_bytes, size)
        if len(memory) < size:
            raise damaged(self.path, "it ends early")
        content = torch.frombuffer(memory, dtype=torch.uint8)
        if content.data_ptr() % self.dtype.itemsize:
            content = content.clone()  # records begin at any byte
        return content.view(self.dtype).view(stop - start, -1)[:, : self.columns], memory


@dataclass(frozen=True)
class Checksum:
    """CRC-32 of rows [start, stop) of one chunk, as they were read."""

    chunk: int
    start: int
    stop: int
    value: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor [rows, columns] in one or more chunks; one of fewer dimensions has one column.

    Attributes:
        name: its entry in the checkpoint.
        rows, columns: of all of it.
        dtype: of its numbers.
        chunks: without gaps or overlaps.
    """

    name: str
    rows: int
    columns: int
    dtype: torch.dtype
    chunks: tuple[StoredChunk, ...]

    def __post_init__(self) -> None:
        if sum(chunk.rows * chunk.columns for chunk in self.chunks) != self.rows * self.columns:
            where = self.chunks[0].path.parent if self.chunks else "the checkpoint"
            raise UserError(f"{where}: parts of {self.name} are missing; restore the checkpoint")

    def row_ranges(self, longest: int) -> Iterator[tuple[int, int]]:
        """The rows in ranges of at most that many, such that none goes beyond a chunk."""
        edges = {0, self.rows, *(c.first_row for c in self.chunks), *(c.first_row + c.rows for c in self.chunks)}
        cuts = sorted(edges)
        for begin, end in pairwise(cuts):
            for start in range(begin, end, longest):
                yield start, min(start + longest, end)

    def convert(self, conversion: RowConversion, start: int, stop: int) -> tuple[Tensor, list[Checksum]]:
        """Rows [start, stop), within one of `row_ranges`, as rows [stop - start, width], and checksums of what was read."""
        found = {
            index: chunk
            for index, chunk in enumerate(self.chunks)
            if chunk.first_row <= start
            and stop <= chunk.first_row + chunk.rows
            and conversion.reads(chunk.first_column, chunk.first_column + chunk.columns)
        }
        widest = max((chunk.row_bytes for chunk in found.values()), default=1)
        rows = max(1, _READ_BYTES // widest)
        blocks = [(begin, min(begin + rows, stop)) for begin in range(start, stop, rows)]
        checksums = dict.fromkeys(found, 0)
        target = torch.empty(stop - start, conversion.width, dtype=self.dtype)
        with _one_thread(), contextlib.ExitStack() as held:
            handles = {index: held.enter_context(opened(chunk.path)) for index, chunk in found.items()}
            # Two windows a chunk: while one is converted, the other is filled.
            windows = {index: [Window(rows * c.row_bytes) for _ in blocks[:2]] for index, c in found.items()}

            def read(block: int) -> dict[int, tuple[Tensor, memoryview]]:
                return {
                    index: chunk.read(handles[index], *blocks[block], windows[index][block % 2])
                    for index, chunk in found.items()
                }

            reader = held.enter_context(ThreadPoolExecutor(1))
            coming = reader.submit(read, 0)
            for block, (begin, end) in enumerate(blocks):
                content = coming.result()
                if block + 1 < len(blocks):
                    coming = reader.submit(read, block + 1)
                parts = []
                for index, (values, memory) in content.items():
                    if found[index].checksum is not None:
                        checksums[index] = zlib.crc32(memory, checksums[index])
                    parts.append((found[index].first_column, values))
                conversion.convert(parts, target[begin - start : end - start])
        return target, [Checksum(index, start, stop, value) for index, value in checksums.items()]

    def check(self, checksums: list[Checksum]) -> None:
        """Compares checksums of all that was read with those that were stored.

        Raises:
            UserError: the bytes of a chunk are not those that were saved.
        """
        per_chunk: dict[int, list[Checksum]] = {}
        for checksum in checksums:
            per_chunk.setdefault(checksum.chunk, []).append(checksum)
        for index, parts in per_chunk.items():
            chunk, total = self.chunks[index], 0
            for part in sorted(parts, key=lambda part: part.start):
                total = joined(total, part.value, (part.stop - part.start) * chunk.row_bytes)
            if chunk.checksum is not None and total != chunk.checksum:
                raise damaged(chunk.path, f"the bytes of {self.name} are not those that were saved")


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Has torch compute on one core: blocks are small, and the other cores have a reader or another process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Content:
    """A tensor in a file of tensors.

    Attributes:
        position, length: of its bytes; of a view, those of its whole storage.
        shape: of the tensor.
        dtype: of its numbers; None of some that are copied only.
        by_rows: whether the bytes are the tensor, row by row, and nothing else.
        checksum: CRC-32 of the bytes, if it was stored.
    """

    position: int
    length: int
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    by_rows: bool = True
    checksum: int | None = None

    def stored(self, path: Path, name: str) -> StoredTensor:
        """Its rows.

        Raises:
            UserError: they do not lie one behind the other, or torch does not know their numbers.
        """
        if self.dtype is None or not self.by_rows:
            raise UserError(
                f"{path}: {name} does not lie row by row in numbers that torch knows; save a copy that does"
            )
        rows, columns = self.shape
        row_bytes = columns * self.dtype.itemsize
        chunk = StoredChunk(path, self.position, row_bytes, 0, rows, 0, columns, self.dtype, self.checksum)
        return StoredTensor(name, rows, columns, self.dtype, (chunk,))


def damaged(path: Path, how: str) -> UserError:
    """The error about a file of a checkpoint."""
    return UserError(f"{path}: {how}; the checkpoint is damaged, restore it")


def locate(path: Path, offset: int, length: int) -> tuple[Tensor, int, int | None]:
    """Where the numbers of a tensor are that `torch.save` wrote at `offset` of a file.

    Returns:
        The tensor on the meta device; the position of its first number in the file; the CRC-32 of its bytes, if it was stored
        and is that of this tensor alone.

    Raises:
        UserError: there is no tensor that torch can read.
    """
    try:
        with open(path, "rb") as file:
            view = FileSlice(file, offset, length)
            tensor = torch.load(view, map_location="meta", weights_only=True)  # type: ignore[arg-type]
            record = tensor.untyped_storage()
            begin = record._checkpoint_offset  # of the record, in the view
            checksum = record_checksums(view).get(begin)
    except FileNotFoundError:
        raise damaged(path, "no such file") from None
    except Exception as error:  # a damaged file can fail in any way
        raise damaged(path, f"no tensor can be read at byte {offset} ({type(error).__name__})") from None
    alone = tensor.is_contiguous() and record.nbytes() == tensor.numel() * tensor.element_size()
    position = offset + begin + tensor.storage_offset() * tensor.element_size()
    return tensor, position, checksum if alone else None


def read_bytes(path: Path, offset: int, length: int) -> Iterator[memoryview]:
    """Bytes of a file, in pieces, each until the next."""
    window = Window(min(length, _READ_BYTES))
    with opened(path) as handle:
        while length:
            piece = window.read(handle, offset, min(length, _READ_BYTES))
            if not piece:
                raise damaged(path, "it ends early")
            offset, length = offset + len(piece), length - len(piece)
            yield piece


def check_room(folder: Path, needed: int, what: str) -> None:
    """Refuses to write what a disk has too little room for.

    Raises:
        UserError: names the folder and both sizes.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: the slim {what} needs {needed:,} bytes, and {free:,} are free; choose another place or free some"
        )


def sync(path: Path) -> None:
    """Waits until what a file or folder holds is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
