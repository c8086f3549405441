"""Sharding plans as JSON: to look at, to compare, and to be placed so again.

An entry has the names that TorchRec's own plans have. What is no place (options of kernels) is in the config, not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn
from torch.distributed._shard.metadata import ShardMetadata
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.planner.utils import placement
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    EnumerableShardingSpec,
    ModuleShardingPlan,
    ParameterSharding,
    ShardingPlan,
    ShardingType,
)
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from sseds_rec.constants import KERNEL_MULTIPLE
from sseds_rec.distributed.sharding_config import Kernel, ShardingKind
from sseds_rec.distributed.tables import embedding_modules, table_configs
from sseds_rec.errors import UserError
from sseds_rec.files import read_json, write_json

Offset = Annotated[int, Field(ge=0)]

#: Sharding types whose shards have all columns, or all rows.
_ALL_COLUMNS = {"table_wise", "row_wise", "table_row_wise"}
_ALL_ROWS = {"table_wise", "column_wise", "table_column_wise"}


class Shard(BaseModel):
    """A block of a table: its first row and column, its rows (none on a rank that is left over) and columns, and its rank."""

    model_config = ConfigDict(extra="forbid")

    shard_offsets: tuple[Offset, Offset]
    shard_sizes: tuple[Offset, Annotated[int, Field(ge=1)]]
    rank: int = Field(ge=0)


class PlacedTable(BaseModel):
    """One table: its size, how it is split, and where the parts are. A data-parallel one has no shards: every rank has it all."""

    model_config = ConfigDict(extra="forbid")

    rows: int = Field(ge=1)
    embedding_dim: int = Field(ge=1)
    sharding_type: ShardingKind
    compute_kernel: Literal[Kernel, "dense"]
    ranks: list[Offset]
    shards: list[Shard] = []

    @property
    def size(self) -> tuple[int, int]:
        return self.rows, self.embedding_dim

    @property
    def blocks(self) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """(first row and column, rows and columns) of the shards."""
        return [(shard.shard_offsets, shard.shard_sizes) for shard in self.shards]


class PlanFile(BaseModel):
    """What `sharding_plan.json` holds.

    Attributes:
        world_size, local_world_size: ranks of the job, and of each of its nodes.
        modules: path of an embedding module -> its tables.
    """

    model_config = ConfigDict(extra="forbid")

    version: Literal[1] = 1
    world_size: int = Field(ge=1)
    local_world_size: int = Field(ge=1)
    modules: dict[str, dict[str, PlacedTable]]


def plan_file(plan: ShardingPlan, model: nn.Module, world_size: int, local_world_size: int) -> PlanFile:
    """A plan as it goes into a file.

    Args:
        plan: of the model.
        model: plain or sharded.
        world_size: ranks of the job.
        local_world_size: ranks of a node.
    """
    modules: dict[str, dict[str, PlacedTable]] = {}
    for path, module in embedding_modules(model).items():
        own = plan.plan[path]
        assert isinstance(own, EmbeddingModuleShardingPlan)
        modules[path] = {table.name: _placed(table, own[table.name]) for table in table_configs(module)}
    return PlanFile(world_size=world_size, local_world_size=local_world_size, modules=modules)


def save_plan(path: Path, plan: PlanFile) -> None:
    """Writes `sharding_plan.json`, atomically."""
    write_json(path, plan.model_dump())


def read_plan(path: str | Path) -> PlanFile:
    """Reads `sharding_plan.json`.

    Raises:
        UserError: it is missing or holds something else (names the first bad key).
    """
    try:
        return PlanFile.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "content"
        raise UserError(f"{path}: {where}: {first['msg']}; it is no sharding_plan.json of this version") from None


def load_plan(
    path: str | Path, model: nn.Module, where: Topology, constraints: Mapping[str, ParameterConstraints]
) -> ShardingPlan:
    """A saved plan, for TorchRec to place a model's tables by.

    Args:
        path: of the file.
        model: unsharded.
        where: this job.
        constraints: table -> options of its kernel; what they say of its place does not count.

    Raises:
        UserError: the file is none, or its plan is of another job or of other tables (names the first).
    """
    saved = read_plan(path)
    if (saved.world_size, saved.local_world_size) != (where.world_size, where.local_world_size):
        raise UserError(
            f"{path}: its plan is for {saved.world_size} ranks, {saved.local_world_size} a node; this job has "
            f"{where.world_size}, {where.local_world_size} a node: make another, or leave the planning to the job"
        )
    plan: dict[str, ModuleShardingPlan] = {}
    found = embedding_modules(model)
    for module_path in [*found, *saved.modules]:
        if module_path not in found or module_path not in saved.modules:
            raise _other(path, f"module {module_path}", "plan" if module_path in saved.modules else "model")
        tables = {table.name: table for table in table_configs(found[module_path])}
        own = saved.modules[module_path]
        for name in [*tables, *own]:
            if name not in tables or name not in own:
                raise _other(path, f"table {name}", "plan" if name in own else "model")
            table, placed = tables[name], own[name]
            if (placed.rows, placed.embedding_dim) != (table.num_embeddings, table.embedding_dim):
                raise UserError(
                    f"{path}: table {name} is {placed.rows:,} x {placed.embedding_dim} in the plan, and "
                    f"{table.num_embeddings:,} x {table.embedding_dim} in the model; make the plan of this model"
                )
            if wrong := _wrong(placed, where, constraints[name]):
                raise UserError(f"{path}: table {name}: {wrong}")
        plan[module_path] = EmbeddingModuleShardingPlan(
            {name: _sharding(placed, where, constraints[name]) for name, placed in own.items()}
        )
    return ShardingPlan(plan)


def _other(path: str | Path, what: str, where: str) -> UserError:
    return UserError(f"{path}: {what} is in the {where} only; make the plan of this model")


def _wrong(placed: PlacedTable, where: Topology, constraint: ParameterConstraints) -> str | None:
    """Why TorchRec could not place a table so, if it could not."""
    kind, kernel, shards = placed.sharding_type, placed.compute_kernel, placed.shards
    is_replicated = kind == ShardingType.DATA_PARALLEL.value
    if is_replicated != (constraint.sharding_types == [ShardingType.DATA_PARALLEL.value]):
        return f"{kind} goes with {'no' if is_replicated else 'a'} fused optimizer, the config says otherwise: sharding.tables"
    if is_replicated != (kernel == "dense") or (where.compute_device == "cpu" and kernel not in ("dense", "fused")):
        return f"kernel {kernel} is none for {kind} on {where.compute_device}"
    if any(rank >= where.world_size for rank in [*placed.ranks, *(shard.rank for shard in shards)]):
        return f"it is on a rank that {where.world_size} ranks do not have"
    if is_replicated:
        return "shards, though every rank has it whole" if shards else None
    if placed.ranks != [shard.rank for shard in shards]:
        return "its ranks are not those of its shards"
    if kind == ShardingType.TABLE_WISE.value and len(shards) != 1:
        return f"table_wise is one shard, not {len(shards)}"
    if kind in _ALL_COLUMNS and any(shard.shard_sizes[1] != placed.embedding_dim for shard in shards):
        return f"a shard of {kind} has all {placed.embedding_dim} columns"
    if kind in _ALL_ROWS and any(shard.shard_sizes[0] != placed.rows for shard in shards):
        return f"a shard of {kind} has all {placed.rows} rows"
    if any(shard.shard_sizes[1] % KERNEL_MULTIPLE for shard in shards):
        return f"a shard's columns are no multiple of {KERNEL_MULTIPLE}"
    return _uncovered(placed) or _uneven(placed, where)


def _uncovered(placed: PlacedTable) -> str | None:
    """Whether a part of the table is in no shard or in two."""
    area = 0
    for i, (first, size) in enumerate(placed.blocks):
        area += size[0] * size[1]
        over = any(begin + length > end for begin, length, end in zip(first, size, placed.size, strict=True))
        twice = any(
            all(a < b + m and b < a + n for a, n, b, m in zip(first, size, *other, strict=True))
            for other in placed.blocks[:i]
        )
        if over or twice:
            return f"shard {i} overlaps another, or lies outside the table"
    return None if area == placed.rows * placed.embedding_dim else "its shards do not hold all of it"


def _uneven(placed: PlacedTable, where: Topology) -> str | None:
    """Whether rows are split otherwise than TorchRec, which sends ids by the size of a block, takes them to be."""
    if placed.sharding_type in _ALL_ROWS:
        return None
    parts = where.world_size if placed.sharding_type == ShardingType.ROW_WISE.value else where.local_world_size
    block = -(-placed.rows // parts)
    for i, shard in enumerate(placed.shards):
        part, begin = i % parts, min(i % parts * block, placed.rows)
        if (shard.shard_offsets[0], shard.shard_sizes[0]) != (begin, min(block, placed.rows - begin)):
            return (
                f"shard {i} of {placed.sharding_type} is not {block} rows from row {begin} on, or what is left of them"
            )
        if shard.rank % parts != part or shard.rank // parts != placed.shards[i - part].rank // parts:
            return (
                f"shard {i} of {placed.sharding_type} is not on rank {part} of {parts}: rows go to all ranks in order"
            )
    return None


def _placed(table: EmbeddingBagConfig, placed: ParameterSharding) -> PlacedTable:
    spec = placed.sharding_spec
    return PlacedTable(
        rows=table.num_embeddings,
        embedding_dim=table.embedding_dim,
        sharding_type=placed.sharding_type,
        compute_kernel=placed.compute_kernel,
        ranks=placed.ranks or [],
        shards=[
            Shard(shard_offsets=shard.shard_offsets, shard_sizes=shard.shard_sizes, rank=shard.placement.rank())
            for shard in (spec.shards if isinstance(spec, EnumerableShardingSpec) else [])
        ],
    )


def _sharding(placed: PlacedTable, where: Topology, options: ParameterConstraints) -> ParameterSharding:
    shards = [
        ShardMetadata(
            list(shard.shard_offsets),
            list(shard.shard_sizes),
            placement(where.compute_device, shard.rank, where.local_world_size),
        )
        for shard in placed.shards
    ]
    return ParameterSharding(
        sharding_type=placed.sharding_type,
        compute_kernel=placed.compute_kernel,
        ranks=placed.ranks,
        sharding_spec=EnumerableShardingSpec(shards) if shards else None,
        cache_params=options.cache_params,
        key_value_params=options.key_value_params,
    )
