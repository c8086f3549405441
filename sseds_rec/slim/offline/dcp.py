"""Distributed checkpoints (DCP folders), converted part by part.

A part is one file of the new checkpoint. It holds whole entries, or ranges of their rows: what it holds follows from the old
checkpoint and the plan alone, so that any process can make any part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import IO

import torch
from pydantic import BaseModel
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from sseds_rec.distributed.checkpoint import read_checkpoint_metadata
from sseds_rec.search.plan import DimensionPlan
from sseds_rec.slim.columns import Product, RowConversion
from sseds_rec.slim.offline.entries import conversions
from sseds_rec.slim.offline.layout import check_files, column_shards, stored_tensor
from sseds_rec.slim.offline.records import is_whole
from sseds_rec.slim.offline.stored import Checksum, StoredTensor, damaged, read_bytes

#: Largest chunk that is written: loading reads chunks whole, whatever part of them a rank needs.
_CHUNK_BYTES = 64 << 20
#: Most that is read for one chunk, and for one part (and written, for a part).
_SOURCE_BYTES, _PART_BYTES = 512 << 20, 1 << 30
#: What a record takes besides its numbers, at most.
_OVERHEAD = 4096
#: What parts consist of follows from these.
CUTS = (_CHUNK_BYTES, _SOURCE_BYTES, _PART_BYTES)


@dataclass(frozen=True)
class Item:
    """One record of the new checkpoint.

    Attributes:
        index: what it is in the new one.
        source: what it is copied from, as it is; None if rows are converted.
        rows: of the entry, if they are converted.
        cost: bytes to read and write, about.
        size: bytes to write, at most.
    """

    index: MetadataIndex
    source: MetadataIndex | None
    rows: tuple[int, int]
    cost: int
    size: int


class WrittenItem(BaseModel):
    """Where a record is, and what was read for it."""

    name: str
    offset: list[int] | None
    position: int
    length: int
    transforms: list[str] | None = None
    checksums: list[tuple[int, int, int, int]] = []


class DcpConversion:
    """A checkpoint and what becomes of it.

    Args:
        src: folder of the checkpoint.
        plan: which columns stay.

    Raises:
        UserError: there is no whole checkpoint, or the plan is of another model.
    """

    def __init__(self, src: Path, plan: DimensionPlan) -> None:
        self.src = src
        self.metadata = read_checkpoint_metadata(src)
        check_files(src, self.metadata)
        self.tensors = {
            name: entry
            for name, entry in self.metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        shapes = {name: entry.size for name, entry in self.tensors.items()}
        shards = {name: column_shards(entry) for name, entry in self.tensors.items() if len(entry.size) == 2}
        self.conversions = conversions(src, shapes, plan, shards)

    @cached_property
    def stored(self) -> dict[str, StoredTensor]:
        """The tensors that are converted, as they lie in files."""
        return {
            name: stored_tensor(self.src, self.metadata, name, self._shards(name))
            for name, conversion in self.conversions.items()
            if conversion is not None
        }

    @cached_property
    def parts(self) -> list[list[Item]]:
        """Every record of the new checkpoint, in files of about the same work."""
        parts: list[list[Item]] = []
        work = _PART_BYTES
        for item in self._items():
            if work + item.cost > _PART_BYTES:
                parts.append([])
                work = 0
            parts[-1].append(item)
            work += item.cost
        return parts

    def write(self, items: list[Item], path: Path) -> list[WrittenItem]:
        """Makes one part.

        Raises:
            UserError: what it is made from is damaged.
        """
        written: list[Future[WrittenItem]] = []
        # One record is written while the rows of the next are converted.
        with open(path, "wb") as file, ThreadPoolExecutor(1) as writer:
            for item in items:
                converted = self._converted(item.index.fqn, *item.rows) if item.source is None else None
                for before in written[-1:]:
                    before.result()
                written.append(writer.submit(self._write_item, item, converted, file, path))
        return [own.result() for own in written]

    def _write_item(
        self, item: Item, converted: tuple[Tensor, list[Checksum]] | None, file: IO[bytes], path: Path
    ) -> WrittenItem:
        position, name = file.tell(), item.index.fqn
        rows, checksums = converted if converted is not None else (None, [])
        info = None
        if rows is not None:
            torch.save(rows, file)
        else:
            info = self.metadata.storage_data[item.source]
            self._copy_record(info, name, file, path)
        return WrittenItem(
            name=name,
            offset=None if item.index.offset is None else list(item.index.offset),
            position=position,
            length=file.tell() - position,
            transforms=None if info is None else info.transform_descriptors,
            checksums=[(c.chunk, c.start, c.stop, c.value) for c in checksums],
        )

    def _copy_record(self, info: _StorageInfo, name: str, file: IO[bytes], path: Path) -> None:
        position = file.tell()
        for piece in read_bytes(self.src / info.relative_path, info.offset, info.length):
            file.write(piece)
        file.flush()
        if not info.transform_descriptors and not is_whole(path, position, info.length, name in self.tensors):
            raise damaged(self.src / info.relative_path, f"the bytes of {name} are not those that were saved")

    def finish(self, folder: Path, files: Mapping[str, list[WrittenItem]]) -> None:
        """Writes the metadata of the new checkpoint, when all its files are there.

        Raises:
            UserError: the bytes that were read are not those that were saved.
        """
        checksums: dict[str, list[Checksum]] = {}
        results = []
        for file, items in files.items():
            for item in items:
                checksums.setdefault(item.name, []).extend(Checksum(*parts) for parts in item.checksums)
                info = _StorageInfo(file, item.position, item.length, item.transforms)
                results.append(WriteResult(MetadataIndex(item.name, item.offset), item.length, info))
        for name, own in checksums.items():
            if own:
                self.stored[name].check(own)
        paths = self.metadata.planner_data
        entries = self._target_entries()
        kept = {name: paths[name] for name in entries if name in paths} if isinstance(paths, dict) else paths
        FileSystemWriter(folder).finish(Metadata(entries, planner_data=kept), [results])

    def bytes_read(self, item: WrittenItem) -> int:
        """What was read for a record."""
        if item.name not in self.conversions:
            return item.length
        chunks = self.stored[item.name].chunks
        return sum((stop - start) * chunks[chunk].row_bytes for chunk, start, stop, _ in item.checksums)

    def _shards(self, name: str) -> int:
        """How many column-wise shards row-wise state is of."""
        conversion = self.conversions[name]
        return len(conversion.matrix) if isinstance(conversion, Product) and len(self.tensors[name].size) == 1 else 1

    def _converted(self, name: str, start: int, stop: int) -> tuple[Tensor, list[Checksum]]:
        conversion = self.conversions[name]
        assert conversion is not None
        rows, checksums = self.stored[name].convert(conversion, start, stop)
        return (rows if len(self.tensors[name].size) == 2 else rows.view(-1)), checksums

    def _items(self) -> Iterator[Item]:
        for name, entry in self.metadata.state_dict_metadata.items():
            if name in self.conversions:
                conversion = self.conversions[name]
                if conversion is not None:
                    yield from self._converted_items(name, conversion)
            elif isinstance(entry, TensorStorageMetadata):
                for chunk in entry.chunks:
                    yield self._copy(MetadataIndex(name, chunk.offsets))
            else:
                yield self._copy(MetadataIndex(name))

    def _copy(self, index: MetadataIndex) -> Item:
        length = self.metadata.storage_data[index].length
        return Item(index, index, (0, 0), 2 * length, length)

    def _converted_items(self, name: str, conversion: RowConversion) -> Iterator[Item]:
        stored = self.stored[name]
        width = stored.dtype.itemsize
        read, write = stored.columns * width, conversion.width * width
        longest = max(1, min(_CHUNK_BYTES // write, _SOURCE_BYTES // read))
        two = len(self.tensors[name].size) == 2
        for start, stop in stored.row_ranges(longest):
            size = (stop - start) * write + _OVERHEAD
            index = MetadataIndex(name, [start, 0] if two else [start])
            yield Item(index, None, (start, stop), (stop - start) * read + size, size)

    def _target_entries(self) -> dict[str, TensorStorageMetadata | BytesStorageMetadata]:
        """Entry -> its metadata in the new checkpoint."""
        chunks: dict[str, list[ChunkStorageMetadata]] = {}
        for items in self.parts:
            for item in items:
                if item.source is None:
                    assert item.index.offset is not None
                    conversion = self.conversions[item.index.fqn]
                    assert conversion is not None
                    sizes = [item.rows[1] - item.rows[0], conversion.width][: len(item.index.offset)]
                    chunk = ChunkStorageMetadata(item.index.offset, torch.Size(sizes))
                    chunks.setdefault(item.index.fqn, []).append(chunk)
        target: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        for name, entry in self.metadata.state_dict_metadata.items():
            if name in chunks:
                sizes = [self.stored[name].rows, chunks[name][0].sizes[-1]][: len(self.tensors[name].size)]
                target[name] = replace(self.tensors[name], size=torch.Size(sizes), chunks=chunks[name])
            elif name not in self.conversions:
                target[name] = entry
        return target
