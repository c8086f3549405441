"""Rows of Parquet files, read block by block."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sseds_rec.data.checks import Array, Place, check_finite, check_ids, check_labels, id_type, modulo
from sseds_rec.data.rows import Ragged, Rows
from sseds_rec.data.schema import Field
from sseds_rec.errors import UserError
from sseds_rec.files import exists, is_local, open_file

#: Row groups of more rows are read in pieces.
BLOCK_ROWS = 1 << 20
_BATCH_ROWS = 1 << 16


@dataclass(frozen=True)
class _Block:
    file: int
    group: int
    start: int  # first row in the row group
    rows: int
    before: int  # rows of the file before the block


class ParquetBlocks:
    """The rows of some files, each block readable alone and checked when read.

    A block is a row group. Of one with more than `BLOCK_ROWS` rows it is a piece; Parquet has to decode the pieces before
    it, so that memory stays bounded but time grows with the number of pieces.

    Args:
        files: Paths, or addresses that iopath knows.
        fields: What to read.
        label: The column with the label.
        advice: What to do about a bad file, for messages.

    Attributes:
        sizes: Rows of each block.

    Raises:
        UserError: A file is missing, unreadable, lacks a column or has one of another type.
    """

    def __init__(self, files: Sequence[str], fields: Sequence[Field], label: str, advice: str) -> None:
        self._files, self._label, self._advice = list(files), label, advice
        self._sparse = [field for field in fields if field.is_sparse]
        self._dense = [field for field in fields if not field.is_sparse]
        stored = [name for field in fields for name in (field.stored_in, field.weights) if name is not None]
        self._columns = list(dict.fromkeys([label, *stored]))
        self._ids = id_type([field for field in self._sparse if field.is_single])
        self._footers = [self._footer(file) for file in self._files]
        self._blocks = list(self._cut())
        self.sizes = [block.rows for block in self._blocks]

    def positives(self) -> int:
        """How many rows have label 1; a pass over the label column."""
        return sum(int(self._labels(self._table(b, [self._label]), self._place(b)).sum()) for b in self._blocks)

    def read(self, index: int) -> Rows:
        """Reads one block; any number of threads may at once.

        Raises:
            UserError: An id outside its table, a label other than 0 and 1, an empty cell; names file, row and field.
        """
        block = self._blocks[index]
        table, place = self._table(block, self._columns), self._place(block)
        labels = self._labels(table, place)
        dense = np.empty((len(labels), len(self._dense)), np.float32)
        for position, field in enumerate(self._dense):
            dense[:, position] = _floats(table[field.stored_in], field, place)
        single = [field for field in self._sparse if field.is_single]
        ids = np.empty((len(single), len(labels)), self._ids)
        for position, field in enumerate(single):
            ids[position] = _ids(_filled(table[field.stored_in], field.name, place), field, place)
        ragged = [_ragged(table, field, place) for field in self._sparse if not field.is_single]
        return Rows(torch.from_numpy(labels), torch.from_numpy(dense), torch.from_numpy(ids), tuple(ragged))

    def _place(self, block: _Block) -> Place:
        return Place(self._files[block.file], block.before, self._advice)

    def _cut(self) -> Iterator[_Block]:
        for file, footer in enumerate(self._footers):
            before = 0
            for group in range(footer.num_row_groups):
                rows = footer.row_group(group).num_rows
                pieces = -(-rows // BLOCK_ROWS)
                for piece in range(pieces):
                    start, stop = piece * rows // pieces, (piece + 1) * rows // pieces
                    yield _Block(file, group, start, stop - start, before + start)
                before += rows

    def _labels(self, table: dict[str, pa.Array], place: Place) -> Array:
        labels = _filled(table[self._label], self._label, place).to_numpy(zero_copy_only=False)
        check_labels(labels, place)
        return labels.astype(np.int8)

    def _table(self, block: _Block, columns: list[str]) -> dict[str, pa.Array]:
        file, footer = self._files[block.file], self._footers[block.file]
        whole = block.rows == footer.row_group(block.group).num_rows
        try:
            # opened anew: the footer is known already, and threads share nothing
            with _opened(file, footer, streamed=not whole) as opened:
                if whole:
                    table = opened.read_row_group(block.group, columns, use_threads=False)
                else:
                    table = _piece(opened, block, columns)
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(file, error) from None
        return {name: _whole(table.column(name)) for name in columns}

    def _footer(self, file: str) -> pq.FileMetaData:
        if not exists(file):
            raise UserError(f"{file}: no such file; {self._advice}")
        try:
            with _opened(file) as opened:
                footer = opened.metadata
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(file, error) from None
        types = {column.name: column.type for column in footer.schema.to_arrow_schema()}
        for name in self._columns:
            if name not in types:
                near = difflib.get_close_matches(name, types, n=1, cutoff=0.0)
                nearest = f" (the nearest name is {near[0]!r})" if near else ""
                raise UserError(f"{file}: no column {name!r}{nearest}; {self._advice}")
        self._check_type(file, self._label, types, "numbers")
        for field in self._dense:
            self._check_type(file, field.stored_in, types, "numbers")
        for field in self._sparse:
            lists = "lists of " if field.kind == "sequence" else ""
            self._check_type(file, field.stored_in, types, f"{lists}integers")
            if field.weights is not None:
                self._check_type(file, field.weights, types, "lists of numbers")
        return footer

    def _check_type(self, file: str, name: str, types: dict[str, pa.DataType], wanted: str) -> None:
        stored = element = types[name]
        if is_list := any(test(stored) for test in _LISTS):
            element = stored.value_type
        tests = (pa.types.is_integer,) if wanted.endswith("integers") else _NUMBERS
        if is_list != wanted.startswith("lists") or not any(test(element) for test in tests):
            raise UserError(f"{file}: column {name!r} holds {stored}, not {wanted}; {self._advice}")

    def _unreadable(self, file: str, error: Exception) -> UserError:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return UserError(f"{file}: cannot be read ({reason}); {self._advice}")


_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
_NUMBERS = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)


@contextmanager
def _opened(file: str, footer: pq.FileMetaData | None = None, streamed: bool = False) -> Iterator[pq.ParquetFile]:
    """The file, by Arrow's own reader where it is local; `streamed` keeps no whole column of a row group in memory."""
    options = {"metadata": footer, "pre_buffer": not streamed, "buffer_size": 1 << 20 if streamed else 0}
    if is_local(file):
        with pq.ParquetFile(file, **options) as opened:
            yield opened
    else:
        with open_file(file) as handle, pq.ParquetFile(handle, **options) as opened:
            yield opened


def _piece(opened: pq.ParquetFile, block: _Block, columns: list[str]) -> pa.Table:
    batches, position = [], 0
    for batch in opened.iter_batches(_BATCH_ROWS, [block.group], columns, use_threads=False):
        low, high = max(block.start - position, 0), min(block.start + block.rows - position, len(batch))
        if low < high:
            batches.append(batch.slice(low, high - low))
        position += len(batch)
        if position >= block.start + block.rows:
            break
    return pa.Table.from_batches(batches)


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _filled(column: pa.Array, name: str, place: Place) -> pa.Array:
    """The column, which must have no empty cell."""
    if column.null_count:
        raise place.refuse(int(np.argmax(column.is_null().to_numpy(zero_copy_only=False))), f"{name!r} is empty")
    return column


def _floats(column: pa.Array, field: Field, place: Place) -> Array:
    if field.transform == "stored" and column.null_count:
        column = column.fill_null(0)
    values = _filled(column, field.name, place).to_numpy(zero_copy_only=False)
    with np.errstate(over="ignore"):
        values = values.astype(np.float32, copy=False)
    check_finite(values, field.name, place)
    return values


def _ids(column: pa.Array, field: Field, place: Place, offsets: Array | None = None) -> Array:
    ids = column.to_numpy(zero_copy_only=False)
    assert field.cardinality is not None, "sparse fields have a cardinality"
    if field.transform == "modulo":
        return modulo(ids, field.cardinality)
    if field.transform != "raw":
        check_ids(ids, field, place, offsets)
    return ids


def _ragged(table: dict[str, pa.Array], field: Field, place: Place) -> Ragged:
    column = table[field.stored_in]
    if field.kind != "sequence":  # a raw id, or none
        lengths = column.is_valid().to_numpy(zero_copy_only=False)
        values = column.drop_null()
    else:
        lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        values = column.flatten()
    offsets = np.concatenate([[0], lengths.cumsum(dtype=np.int64)])
    _refuse_holes(values, offsets, field.name, place)
    ids = _ids(values, field, place, offsets)
    width = np.int64 if field.transform == "raw" else id_type([field])
    weights = None
    if field.weights is not None:
        weights = torch.from_numpy(_weights(table[field.weights], offsets, field, place))
    return Ragged(torch.from_numpy(ids.astype(width)), torch.from_numpy(offsets), weights)


def _weights(column: pa.Array, offsets: Array, field: Field, place: Place) -> Array:
    assert field.weights is not None
    lengths, ids = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False), np.diff(offsets)
    if (wrong := lengths != ids).any():
        row = int(wrong.argmax())
        what = f"{field.weights!r} has {lengths[row]} weights for the {ids[row]} ids of {field.name!r}"
        raise place.refuse(row, what)
    values = column.flatten()
    _refuse_holes(values, offsets, field.weights, place)
    weights = values.to_numpy(zero_copy_only=False).astype(np.float32)
    check_finite(weights, field.weights, place, offsets)
    return weights


def _refuse_holes(values: pa.Array, offsets: Array, name: str, place: Place) -> None:
    if values.null_count:
        at = int(np.argmax(values.is_null().to_numpy(zero_copy_only=False)))
        raise place.refuse(int(np.searchsorted(offsets, at, side="right")) - 1, f"{name!r} has an empty element")
