"""Criteo as TorchRec's own scripts preprocess it: three NumPy files a day, read as they are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from iopath.common.file_io import g_pathmgr

from sseds_rec.data.checks import Array, Place, check_finite, check_labels, id_type, modulo
from sseds_rec.data.config import NUM_DENSE, NUM_SPARSE, TorchRecNpyConfig
from sseds_rec.data.rows import Rows
from sseds_rec.data.schema import SPLITS, Field, Schema, Split, SplitName
from sseds_rec.errors import UserError
from sseds_rec.files import exists, is_local, join, open_file

BLOCK_ROWS = 1 << 16
_ADVICE = "preprocess the day again"


@dataclass(frozen=True)
class _Span:
    """Rows of one day."""

    day: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def blocks(self) -> Iterator[_Span]:
        for start in range(self.start, self.stop, BLOCK_ROWS):
            yield _Span(self.day, start, min(start + BLOCK_ROWS, self.stop))


class TorchRecNpy:
    """`day_N_dense.npy` [R, 13], `day_N_sparse.npy` [R, 26] and `day_N_labels.npy` [R, 1] or [R] of some days.

    Local files are mapped into memory; of remote ones the rows wanted are read. Opening passes over the labels, to count
    them, and without `cardinality` over the ids, to find the largest.

    Fields have TorchRec's names, int_0 to int_12 and cat_0 to cat_25. Dense values are used as stored: the scripts have
    taken their logarithm.

    Args:
        config: See there for how days become splits.

    Raises:
        UserError: A file is missing or of another shape or type, a label is neither 0 nor 1, or ids are not contiguous.
    """

    def __init__(self, config: TorchRecNpyConfig) -> None:
        self.path = config.path
        self._spans = _split(config)
        transform: Literal["modulo", "stored"] = "modulo" if config.cardinality else "stored"
        tables = config.cardinality or _count_ids(
            config.path, [span for split in SPLITS for span in self._spans[split]]
        )
        dense = [Field(name=f"int_{i}", kind="numeric", transform="stored") for i in range(NUM_DENSE)]
        sparse = [
            Field(name=f"cat_{i}", kind="categorical", transform=transform, cardinality=rows)
            for i, rows in enumerate(tables)
        ]
        self.schema = Schema(
            label="label",
            fields=[*dense, *sparse],
            seed=0,
            source={"format": config.format, "path": config.path},
            splits={split: _count_labels(config.path, self._spans[split]) for split in SPLITS},
        )

    def blocks(self, split: SplitName) -> NpyBlocks:
        return NpyBlocks(self.path, self._spans[split], self.schema.sparse_fields)


class NpyBlocks:
    """`BLOCK_ROWS` rows at a time of some days.

    Attributes:
        sizes: Rows of each block.
    """

    def __init__(self, path: str, spans: list[_Span], fields: list[Field]) -> None:
        self._days = {span.day: _Day(path, span.day) for span in spans}
        self._blocks = [block for span in spans for block in span.blocks()]
        self._fields, self._ids = fields, id_type(fields)
        self.sizes = [len(block) for block in self._blocks]

    def read(self, index: int) -> Rows:
        """Reads one block; any number of threads may at once.

        Raises:
            UserError: A label other than 0 and 1, a dense value that is not finite; names file, row and field.
        """
        block = self._blocks[index]
        day = self._days[block.day]
        labels, dense, sparse = day.labels.read(block)[:, 0], day.dense.read(block), day.sparse.read(block)
        check_labels(labels, day.labels.place(block))
        if not np.isfinite(dense).all():
            for column in range(NUM_DENSE):
                check_finite(dense[:, column], f"int_{column}", day.dense.place(block))
        ids = np.empty((NUM_SPARSE, len(block)), self._ids)
        for column, field in enumerate(self._fields):
            assert field.cardinality is not None, "sparse fields have a cardinality"
            stored = sparse[:, column]
            ids[column] = modulo(stored, field.cardinality) if field.transform == "modulo" else stored
        return Rows(torch.from_numpy(labels.astype(np.int8)), torch.from_numpy(np.array(dense)), torch.from_numpy(ids))


class _Day:
    """The three files of a day."""

    def __init__(self, path: str, number: int) -> None:
        self.dense = _NpyFile(join(path, f"day_{number}_dense.npy"), ("float32",), NUM_DENSE)
        self.sparse = _NpyFile(join(path, f"day_{number}_sparse.npy"), ("int32", "int64"), NUM_SPARSE)
        self.labels = _NpyFile(join(path, f"day_{number}_labels.npy"), ("int32", "int64", "int8"), 1)
        self.rows = self.dense.rows
        for file in (self.sparse, self.labels):
            if file.rows != self.rows:
                raise UserError(f"{file.path}: has {file.rows} rows, {self.dense.path} has {self.rows}; {_ADVICE}")


class _NpyFile:
    """An array [rows, columns] on disk; [rows] is taken for one column."""

    def __init__(self, path: str, types: tuple[str, ...], columns: int) -> None:
        self.path, self._columns = path, columns
        if not exists(path):
            raise UserError(f"{path}: no such file")
        try:
            with open_file(path) as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, by_column, self._type = read(file)
                self._begin = file.tell()
                held = file.seek(0, 2) - self._begin
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not a NumPy file ({error}); {_ADVICE}") from None
        if self._type.name not in types:
            raise UserError(f"{path}: holds {self._type.name}, not {' or '.join(types)}; {_ADVICE}")
        if shape[1:] != (columns,) and not (columns == len(shape) == 1):
            raise UserError(f"{path}: is an array {list(shape)}, not [rows, {columns}]; {_ADVICE}")
        if by_column and columns > 1:
            raise UserError(f"{path}: is stored column by column; write np.ascontiguousarray of the array")
        self.rows = shape[0]
        if held < self.rows * self._row_bytes:
            raise UserError(f"{path}: is cut short, it ends before row {held // self._row_bytes + 1}; {_ADVICE}")
        self._mapped = np.load(path, mmap_mode="r").reshape(-1, columns) if is_local(path) and self.rows else None

    @property
    def _row_bytes(self) -> int:
        return self._columns * self._type.itemsize

    def read(self, span: _Span) -> Array:
        """Rows [R, columns], not to be written to."""
        if self._mapped is not None:
            return self._mapped[span.start : span.stop]
        try:
            with open_file(self.path) as file:
                file.seek(self._begin + span.start * self._row_bytes)
                return np.frombuffer(file.read(len(span) * self._row_bytes), self._type).reshape(-1, self._columns)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path}: cannot be read ({error})") from None

    def place(self, span: _Span) -> Place:
        return Place(self.path, span.start, _ADVICE)


def _split(config: TorchRecNpyConfig) -> dict[SplitName, list[_Span]]:
    found = _days(config.path)

    def whole(days: list[int]) -> list[_Span]:
        return [_Span(day, 0, _Day(config.path, day).rows) for day in days]

    if config.validation is not None and config.test is not None:
        rest = [day for day in found if day not in {*config.validation, *config.test}]
        if not (days := config.train or rest):
            raise UserError(f"{config.path}: data.validation and data.test name all days; leave some to train on")
        return {"train": whole(days), "validation": whole(config.validation), "test": whole(config.test)}
    last, rows = found[-1], _Day(config.path, found[-1]).rows
    if len(found) == 1:
        first, second = rows * 8 // 10, rows * 9 // 10
        train = [_Span(last, 0, first)]
    else:
        first, second = 0, -(-rows // 2)
        train = whole(config.train or found[:-1])
    if config.train is not None and last in config.train:
        raise UserError(
            f"data.train names day {last}, the last, which is held out; name the days of validation and test"
        )
    return {"train": train, "validation": [_Span(last, first, second)], "test": [_Span(last, second, rows)]}


def _days(path: str) -> list[int]:
    names = g_pathmgr.ls(path) if g_pathmgr.isdir(path) else []
    found = sorted(int(match[1]) for match in (re.fullmatch(r"day_(\d+)_dense\.npy", name) for name in names) if match)
    if not found:
        raise UserError(f"{path}: holds no day_N_dense.npy; data.path is the folder of TorchRec's preprocessed Criteo")
    return found


def _count_labels(path: str, spans: list[_Span]) -> Split:
    positives = 0
    for span in spans:
        file = _Day(path, span.day).labels
        for block in span.blocks():
            labels = file.read(block)[:, 0]
            check_labels(labels, file.place(block))
            positives += int(labels.sum())
    return Split(rows=sum(map(len, spans)), positives=positives, files=[f"day_{span.day}_labels.npy" for span in spans])


def _count_ids(path: str, spans: list[_Span]) -> list[int]:
    """Rows of the tables: the largest id of each column, plus one."""
    largest = np.zeros(NUM_SPARSE, np.int64)
    for span in spans:
        file = _Day(path, span.day).sparse
        for block in span.blocks():
            ids = file.read(block)
            if ids.min() < 0:
                row, column = np.argwhere(ids < 0)[0]
                raise file.place(block).refuse(int(row), f"cat_{column}: id {ids[row, column]} is negative")
            largest = np.maximum(largest, ids.max(axis=0))
    # Contiguous ids number the values, of which there are no more than rows; TorchRec begins at 2.
    most = sum(map(len, spans)) + 2
    if (largest >= most).any():
        column = int(largest.argmax())
        what = f"cat_{column} has an id {largest[column]} in {most - 2} rows, so its ids are not contiguous"
        raise UserError(f"{path}: {what}; set data.cardinality, modulo which ids are taken")
    return (largest + 1).tolist()
