"""The `sharding` section of a config: what a user asks of the placement of tables."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torchrec.distributed.types import KeyValueParams

from sseds_rec.constants import KERNEL_MULTIPLE
from sseds_rec.errors import UserError

ShardingKind = Literal[
    "table_wise",
    "row_wise",
    "column_wise",
    "table_row_wise",
    "table_column_wise",
    "grid_shard",
    "data_parallel",
]
Placement = Literal[ShardingKind, "auto"]
Kernel = Literal[
    "fused",
    "fused_uvm",
    "fused_uvm_caching",
    "key_value",
    "ssd_virtual_table",
    "dram_virtual_table",
]
CommPrecision = Literal["fp32", "fp16", "bf16"]

#: Kernels whose rows are made as ids are seen, in a store of keys and values.
VIRTUAL: tuple[Kernel, ...] = ("ssd_virtual_table", "dram_virtual_table")


class TableSharding(BaseModel):
    """What the planner may do with one table.

    Attributes:
        types: sharding types to choose from; null for `sharding.type`. "data_parallel" stands alone.
        kernels: FBGEMM's kernels to choose from. "fused" keeps the table in the memory of its device; the others, on CUDA only,
            in host memory ("fused_uvm"; "fused_uvm_caching" with a cache in HBM), on SSD ("key_value") or in a store that makes
            rows as ids are seen ("ssd_virtual_table", "dram_virtual_table").
        min_partition: columns of a column-wise shard, at least; null for TorchRec's, or the width over the ranks if
            "column_wise" alone is asked for.
        pooling_factor: ids a row on average, for the planner's estimates.
        cache_load_factor: of "fused_uvm_caching", the share of rows that the cache in HBM holds; null for FBGEMM's 0.2.
        key_value: fields of TorchRec's `KeyValueParams`, of kernels on SSD or in a store, e.g. {ssd_storage_directory: /ssd}.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    types: list[ShardingKind] | None = Field(None, min_length=1)
    kernels: list[Kernel] = Field(["fused"], min_length=1)
    min_partition: int | None = Field(None, ge=KERNEL_MULTIPLE, multiple_of=KERNEL_MULTIPLE)
    pooling_factor: float = Field(1.0, gt=0)
    cache_load_factor: float | None = Field(None, gt=0, le=1)
    key_value: dict[str, Any] = {}

    @field_validator("key_value")
    @classmethod
    def _torchrecs(cls, options: dict[str, Any]) -> dict[str, Any]:
        known = [field.name for field in dataclasses.fields(KeyValueParams)]
        for name in options:
            if name not in known:
                raise ValueError(f"TorchRec's KeyValueParams has no {name}; it has {', '.join(known)}")
        return options

    @model_validator(mode="after")
    def _no_contradiction(self) -> TableSharding:
        if self.is_data_parallel and (len(self.types or ()) > 1 or self.kernels != ["fused"]):
            raise ValueError("data_parallel goes with no other type and no kernel: its optimizer is not fused")
        if self.cache_load_factor is not None and "fused_uvm_caching" not in self.kernels:
            raise ValueError("cache_load_factor is of the kernel fused_uvm_caching; add it to kernels")
        if self.key_value and not {"key_value", *VIRTUAL} & {*self.kernels}:
            raise ValueError(f"key_value goes with the kernels key_value, {', '.join(VIRTUAL)}; add one to kernels")
        return self

    @property
    def is_data_parallel(self) -> bool:
        """Whether every rank is to hold the table whole."""
        return "data_parallel" in (self.types or ())


class ShardingConfig(BaseModel):
    """The `sharding` section of a config.

    Attributes:
        type: one sharding type for all tables, or "auto": table-wise on CPU (the planner's mix is no faster there), the
            planner's choice of all but data-parallel on CUDA. Tables that Adam trains on a CPU are data-parallel, since FBGEMM
            has no fused Adam there. Tables of raw ids are row-wise always.
        comm_precision: in which pooled embeddings, their gradients and the dense gradients go from rank to rank; "bf16" on
            CUDA only. The gradients of data-parallel tables stay float32: TorchRec averages them in a DDP of its own, which
            takes no hook. Gradients of a mean loss shrink with the batch: at tens of thousands of rows a rank, fp16 loses
            the small ones, and bf16, which has float32's range, is the better choice.
        tables: table -> what differs for it. Slim tables have the names of their originals.
        device: what the planner is to think of each rank's device, e.g. "H100-80GB"; null for what this machine has.
        base_plan, slim_plan: a `sharding_plan.json` for the full or the slim model, instead of the planner's.
    """

    model_config = ConfigDict(extra="forbid")

    type: Placement = "auto"
    comm_precision: CommPrecision = "fp32"
    tables: dict[str, TableSharding] = {}
    device: str | None = None
    base_plan: str | None = None
    slim_plan: str | None = None

    def of(self, table: str) -> TableSharding:
        """What is asked of a table."""
        return self.tables.get(table, TableSharding())

    @property
    def data_parallel_tables(self) -> list[str]:
        """Those that are asked to be on every rank, whatever the others are."""
        return [name for name, own in self.tables.items() if own.is_data_parallel]

    def check_tables(self, known: Collection[str]) -> None:
        """Refuses a name that no table of the full model has.

        Raises:
            UserError: names the nearest one.
        """
        for name in self.tables:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
                hint = f"did you mean {near[0]}?" if near else f"the tables are {', '.join(known)}"
                raise UserError(f"sharding.tables.{name}: there is no such table; {hint}")
