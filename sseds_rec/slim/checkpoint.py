"""A checkpoint of the full model -> one of the slim model, column by column, on disk (DCP to DCP).

Tables, and their optimizer state of the same shape, lose the columns that the plan drops, and are rotated before if the plan
has a rotation for them; everything else is copied. No process group is needed, and memory holds one stored chunk and its slim
copy at a time: with table-wise sharding a chunk is a whole table. (The slim copy of a rotated one is in float64.)
"""

from __future__ import annotations

import io
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from sseds_rec.distributed.checkpoint import read_checkpoint_metadata
from sseds_rec.errors import UserError
from sseds_rec.search.plan import DimensionPlan, TablePlan
from sseds_rec.search.rotation import Rotation
from sseds_rec.slim.columns import keep_columns, rotate_columns


def slim_checkpoint(src: str | Path, dst: str | Path, plan: DimensionPlan) -> Path:
    """Converts a DCP checkpoint, saved by any number of ranks under any sharding, to the plan's widths.

    Entries `<path>.embedding_bags.<table>.weight`, and any state below that name, of shape [rows, original_dim] are
    gathered to [rows, stored_dim] (padding is zero); those of dropped tables are left out; all other entries are copied.
    `dst` appears complete or not at all.

    Rows v of a rotated table become Tᵀ(v - μ). Since gradients in the coordinates are Mᵀg, their running means are multiplied
    by Mᵀ too, which is exact, and their running squares by (M∘M)ᵀ, what E[(Mᵀg)²] is if the entries of g are independent.
    Row-wise state stays what it is.

    Args:
        src: checkpoint folder of the full model; only read.
        dst: folder to make; must not exist.
        plan: which columns stay.

    Returns:
        `dst`.

    Raises:
        UserError: `src` is no checkpoint, `dst` exists, the plan is of another model (names the table), or a rotated table has
            optimizer state of which it is not known how it turns (names it).
    """
    src, dst = Path(src), Path(dst)
    if dst.exists():
        raise UserError(f"{dst}: exists already; remove it or choose another folder")
    metadata = read_checkpoint_metadata(src)
    conversion = _Conversion(src, metadata, _entries_by_table(metadata, plan), plan)
    temporary = dst.with_name(f".{dst.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        planner = _StreamingSavePlanner(conversion)
        writer = FileSystemWriter(temporary, single_file_per_rank=False, thread_count=1)
        writer.set_up_storage_writer(is_coordinator=True)
        local, target = planner.plan()
        results = writer.write_data(writer.prepare_global_plan([writer.prepare_local_plan(local)])[0], planner)
        results.wait()
        writer.finish(target, [results.value()])
        os.replace(temporary, dst)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return dst


def _entries_by_table(metadata: Metadata, plan: DimensionPlan) -> dict[str, str]:
    """Entry name -> table of the plan, for every entry at or below a table's weight, and of its map of raw ids."""
    entries: dict[str, str] = {}
    for table, table_plan in plan.tables.items():
        module, _, own = table.rpartition(".")
        keys = [f".embedding_bags.{table}.weight.", f".{module}.embedding_bags.{own}.weight."]
        # of a managed collision collection: its tables, and its maps from ids to rows, which go with a dropped table
        keys += [f".{module}._embedding_module.embedding_bags.{own}.weight.", f"._managed_collision_modules.{table}."]
        keys += [f".{module}._managed_collision_collection._managed_collision_modules.{own}."]
        found = [name for name in metadata.state_dict_metadata if any(key in f".{name}." for key in keys)]
        expected = torch.Size([table_plan.rows, table_plan.original_dim])
        weights = [name for name in found if name.endswith(".weight")]
        if not weights:
            raise UserError(f"table {table} of the plan is not in the checkpoint; the plan is of another model")
        for name in weights:
            stored = metadata.state_dict_metadata[name]
            if not isinstance(stored, TensorStorageMetadata) or stored.size != expected:
                shape = list(stored.size) if isinstance(stored, TensorStorageMetadata) else "no tensor"
                raise UserError(
                    f"table {table}: the checkpoint holds {shape}, the plan expects {list(expected)}; "
                    "the plan is of another model"
                )
        entries |= dict.fromkeys(found, table)
    return entries


class _Conversion:
    """What becomes of each stored chunk: the target's metadata, and the target's content from the source's."""

    def __init__(self, src: Path, metadata: Metadata, entries: dict[str, str], plan: DimensionPlan) -> None:
        self.src = src
        self.metadata = metadata
        self.reader = FileSystemReader(src)
        self.reader.set_up_storage_reader(metadata, is_coordinator=True)
        self.gathered = {
            name: plan.tables[table]
            for name, table in entries.items()
            if _shape(metadata, name) == (plan.tables[table].rows, plan.tables[table].original_dim)
        }
        self.rotated = {
            name: _matrix_and_mean(src, name, metadata, plan.rotations[entries[name]])
            for name, table in self.gathered.items()
            if table.kept and entries[name] in plan.rotations
        }
        dropped = {name for name, table in entries.items() if not plan.tables[table].kept}
        self.names = [name for name in metadata.state_dict_metadata if name not in dropped]

    def target_metadata(self, name: str) -> TensorStorageMetadata | BytesStorageMetadata:
        """The entry as it will be stored: column shards of one row range become one chunk."""
        stored = self.metadata.state_dict_metadata[name]
        if name not in self.gathered or not isinstance(stored, TensorStorageMetadata):
            return stored
        table = self.gathered[name]
        row_ranges = sorted({(chunk.offsets[0], chunk.sizes[0]) for chunk in stored.chunks})
        chunks = [
            ChunkStorageMetadata(torch.Size([start, 0]), torch.Size([rows, table.stored_dim]))
            for start, rows in row_ranges
        ]
        return replace(stored, size=torch.Size([table.rows, table.stored_dim]), chunks=chunks)

    def content(self, name: str, offsets: torch.Size) -> Tensor:
        """The target chunk of a tensor entry that begins at `offsets`."""
        stored = self.metadata.state_dict_metadata[name]
        assert isinstance(stored, TensorStorageMetadata)
        if name not in self.gathered:
            return self._read(name, next(chunk for chunk in stored.chunks if chunk.offsets == offsets))
        table: TablePlan = self.gathered[name]
        sources = [chunk for chunk in stored.chunks if chunk.offsets[0] == offsets[0]]
        dtype = torch.float64 if name in self.rotated else stored.properties.dtype
        target = torch.zeros(sources[0].sizes[0], table.stored_dim, dtype=dtype)
        for chunk in sources:
            first, last = chunk.offsets[1], chunk.offsets[1] + chunk.sizes[1]
            if name in self.rotated:
                rotate_columns(self._read(name, chunk), *self.rotated[name], target, first)
            elif any(first <= column < last for column in table.kept):
                keep_columns(self._read(name, chunk), table.kept, target, first)
        return target.to(stored.properties.dtype)

    def raw(self, name: str) -> io.BytesIO:
        """An entry that is no tensor, as stored."""
        planner = _ReadOne(None)
        item = ReadItem(
            LoadItemType.BYTE_IO,
            MetadataIndex(name),
            torch.Size([0]),
            MetadataIndex(name),
            torch.Size([0]),
            torch.Size([0]),
        )
        self.reader.read_data(LoadPlan([item]), planner).wait()
        return planner.bytes

    def _read(self, name: str, chunk: ChunkStorageMetadata) -> Tensor:
        stored = self.metadata.state_dict_metadata[name]
        assert isinstance(stored, TensorStorageMetadata)
        planner = _ReadOne(torch.empty(chunk.sizes, dtype=stored.properties.dtype))
        index, origin = MetadataIndex(name, chunk.offsets), torch.Size([0] * len(chunk.sizes))
        item = ReadItem(LoadItemType.TENSOR, index, origin, index, origin, chunk.sizes)
        try:
            self.reader.read_data(LoadPlan([item]), planner).wait()
        except Exception as error:  # a damaged file can fail in any way
            raise UserError(
                f"{self.src}: {name} cannot be read ({type(error).__name__}); the checkpoint is damaged"
            ) from error
        assert planner.tensor is not None
        return planner.tensor


#: What an optimizer keeps of each weight: running means of gradients, and sums or running means of their squares.
_MEANS = {"exp_avg", "momentum_buffer"}
_SQUARES = {"exp_avg_sq", "max_exp_avg_sq", "sum", "square_avg"}


def _matrix_and_mean(src: Path, name: str, metadata: Metadata, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """(A, b) such that an entry X [rows, D] of a rotated table becomes (X - b) A."""
    zeros = torch.zeros_like(rotation.mean)
    path, _, state = name.rpartition(".")
    if state == "momentum1":  # FBGEMM's first state, of any optimizer
        state = "exp_avg" if f"{path}.exp_avg_sq" in metadata.state_dict_metadata else "sum"
    if state == "weight":
        return rotation.forward, rotation.mean
    if state in _MEANS:
        return rotation.inverse, zeros
    if state in _SQUARES:
        return rotation.inverse.double().square(), zeros
    raise UserError(
        f"{src}: {name}: the plan rotates its table, and how {state} turns is not known; save the checkpoint without it"
    )


def _shape(metadata: Metadata, name: str) -> tuple[int, ...] | None:
    stored = metadata.state_dict_metadata[name]
    return tuple(stored.size) if isinstance(stored, TensorStorageMetadata) else None


class _ReadOne(LoadPlanner):
    """Receives the one item that was asked of the reader."""

    def __init__(self, tensor: Tensor | None) -> None:
        self.tensor = tensor
        self.bytes = io.BytesIO()

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        raise AssertionError("reads are planned by hand")

    def create_local_plan(self) -> LoadPlan:
        raise AssertionError("reads are planned by hand")

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        raise AssertionError("reads are planned by hand")

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.bytes = value

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        assert self.tensor is not None
        return self.tensor

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


class _StreamingSavePlanner(SavePlanner):
    """Hands the writer one converted chunk at a time, made when it is asked for."""

    def __init__(self, conversion: _Conversion) -> None:
        self.conversion = conversion

    def plan(self) -> tuple[SavePlan, Metadata]:
        """Every chunk to write, and the target's metadata."""
        items, target = [], {}
        for name in self.conversion.names:
            stored = target[name] = self.conversion.target_metadata(name)
            if isinstance(stored, BytesStorageMetadata):
                items.append(WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO))
                continue
            for index, chunk in enumerate(stored.chunks):
                data = TensorWriteData(chunk, stored.properties, stored.size)
                items.append(
                    WriteItem(MetadataIndex(name, chunk.offsets, index), WriteItemType.SHARD, tensor_data=data)
                )
        paths = self.conversion.metadata.planner_data
        kept = {name: paths[name] for name in target if name in paths} if isinstance(paths, dict) else paths
        return SavePlan(items), Metadata(target, planner_data=kept)

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        raise AssertionError("writes are planned by plan()")

    def create_local_plan(self) -> SavePlan:
        return self.plan()[0]

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return all_plans, self.plan()[1]

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return self.conversion.raw(write_item.index.fqn)
        assert write_item.index.offset is not None
        return self.conversion.content(write_item.index.fqn, write_item.index.offset)
