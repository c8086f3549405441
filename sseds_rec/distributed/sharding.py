"""Which rank holds what: sharders, planner, and the wrapped model."""

from __future__ import annotations

import os
from typing import Literal

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper, DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError
from torchrec.distributed.types import ModuleSharder, QuantizedCommCodecs, ShardingPlan, ShardingType
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from sseds_rec.constants import KERNEL_MULTIPLE
from sseds_rec.distributed.managed import ManagedSharder, is_managed
from sseds_rec.distributed.runtime import Runtime
from sseds_rec.distributed.tables import embedding_modules, table_configs
from sseds_rec.errors import UserError

Placement = Literal["auto", "table_wise", "row_wise", "column_wise", "data_parallel"]
CommPrecision = Literal["fp32", "fp16", "bf16"]


class ShardingConfig(BaseModel):
    """The `sharding` section of a config.

    Attributes:
        type: one sharding type for all tables, or "auto": table-wise on CPU (the planner's mix is no faster there), the
            planner's choice of table-, row- and column-wise on CUDA. Tables that Adam trains on a CPU are data-parallel,
            since FBGEMM has no fused Adam there. Tables of raw ids are row-wise always.
        comm_precision: in which pooled embeddings, their gradients and the dense gradients go from rank to rank; "bf16" on
            CUDA only. The gradients of data-parallel tables stay float32: TorchRec averages them in a DDP of its own, which
            takes no hook. Gradients of a mean loss shrink with the batch: at tens of thousands of rows a rank, fp16 loses
            the small ones, and bf16, which has float32's range, is the better choice.
    """

    model_config = ConfigDict(extra="forbid")

    type: Placement = "auto"
    comm_precision: CommPrecision = "fp32"


class BagSharder(EmbeddingBagCollectionSharder):
    """TorchRec's sharder, with row-wise on CPU as well: its kernels and gloo can, only the default list leaves it out."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        types = super().sharding_types(compute_device_type)
        return types if ShardingType.ROW_WISE.value in types else [*types, ShardingType.ROW_WISE.value]


def shard(model: nn.Module, config: ShardingConfig, runtime: Runtime, batch_size: int) -> DistributedModelParallel:
    """Plans a model whose tables are on the meta device and wraps it; each rank makes only its own shards.

    Args:
        model: any module tree with EmbeddingBagCollections.
        config: constraints.
        runtime: of this process.
        batch_size: rows per rank and step, for the planner's estimates.

    Raises:
        UserError: the tables do not fit this topology under the constraints, or a precision is not one that it sends.
    """
    sharders = sharders_for(config, runtime.device)
    plan = plan_sharding(model, config, topology(runtime), batch_size, sharders)
    alone = runtime.world_size == 1
    sharded = DistributedModelParallel(
        model,
        device=runtime.device,
        plan=plan,
        sharders=sharders,
        init_data_parallel=not alone,
        data_parallel_wrapper=DefaultDataParallelWrapper(allreduce_comm_precision=config.comm_precision),
    )
    if alone:
        # No DDP over the dense part: it copies every gradient to average it with nothing. But it also moves that part.
        sharded.module.to(runtime.device)
    return sharded


def sharders_for(config: ShardingConfig, device: torch.device) -> list[ModuleSharder[nn.Module]]:
    """What splits our embedding modules on this kind of device."""
    bags = BagSharder(qcomm_codecs_registry=_codecs(config.comm_precision, device))
    return [bags, ManagedSharder(bags)]


def plan_sharding(
    model: nn.Module, config: ShardingConfig, where: Topology, batch_size: int, sharders: list[ModuleSharder[nn.Module]]
) -> ShardingPlan:
    """The planner's placement of every table, the same on all ranks.

    Raises:
        UserError: no plan fits, or a table of raw ids cannot be split so (names it).
    """
    constraints = table_constraints(model, config, where)
    planner = EmbeddingShardingPlanner(topology=where, constraints=constraints, batch_size=batch_size)
    try:
        if where.world_size == 1:
            return planner.plan(model, sharders)
        return planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
    except PlannerError as error:
        raise UserError(
            f"sharding.type={config.type}: no plan fits {where.world_size} x {where.compute_device}: {_first_line(error)}"
        ) from None


def table_constraints(model: nn.Module, config: ShardingConfig, where: Topology) -> dict[str, ParameterConstraints]:
    """What the planner may choose for each table.

    Raises:
        UserError: a table of raw ids cannot be split so (names it).
    """
    constraints: dict[str, ParameterConstraints] = {}
    for module in embedding_modules(model).values():
        for table in table_configs(module):
            placement: Placement = _row_wise(table, config.type, where) if is_managed(module) else config.type
            # Slim tables are narrower than the planner's default smallest column shard.
            narrowest = table.embedding_dim // where.world_size // KERNEL_MULTIPLE * KERNEL_MULTIPLE
            constraints[table.name] = ParameterConstraints(
                sharding_types=_allowed(placement, where.compute_device),
                compute_kernels=[_kernel(placement)],
                min_partition=max(KERNEL_MULTIPLE, narrowest) if placement == "column_wise" else None,
            )
    return constraints


def topology(runtime: Runtime) -> Topology:
    """This job's machines as the planner sees them: real memory sizes, not its 32 GB default."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", runtime.world_size))
    ddr = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local
    cuda = runtime.device.type == "cuda"
    hbm = torch.cuda.get_device_properties(runtime.device).total_memory if cuda else None
    return Topology(
        world_size=runtime.world_size,
        local_world_size=local,
        compute_device=runtime.device.type,
        hbm_cap=hbm,
        ddr_cap=ddr,
    )


def _codecs(precision: CommPrecision, device: torch.device) -> dict[str, QuantizedCommCodecs] | None:
    """TorchRec's codecs for what the embedding modules send."""
    if precision == "bf16" and device.type == "cpu":
        raise UserError("sharding.comm_precision=bf16: gloo, which connects CPU processes, does not send it; use fp16")
    both = CommType(precision)
    return get_qcomm_codecs_registry(QCommsConfig(forward_precision=both, backward_precision=both), device=device)


def raw_ids_refused(which: str) -> UserError:
    """The error about a table or field of raw ids that was to be data-parallel."""
    return UserError(
        f"{which}: TorchRec splits tables of raw ids by rows and trains them with fused optimizers, of which "
        "Adam is not on a CPU; set train.table_optimizer=rowwise_adagrad and sharding.type=auto"
    )


def _row_wise(table: EmbeddingBagConfig, asked: Placement, where: Topology) -> Placement:
    """The placement of a table of raw ids."""
    if asked == "data_parallel":
        raise raw_ids_refused(f"table {table.name}")
    if table.num_embeddings % where.world_size or table.num_embeddings < 2 * where.world_size:
        raise UserError(
            f"table {table.name}: its {table.num_embeddings:,} rows for raw ids do not divide by {where.world_size} ranks, "
            "two or more each; prepare the field with other rows, or start another number of processes"
        )
    return "row_wise"


def _allowed(placement: Placement, device: str) -> list[str]:
    if placement != "auto":
        return [placement]
    if device == "cpu":
        return [ShardingType.TABLE_WISE.value]
    return [ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value, ShardingType.COLUMN_WISE.value]


def _kernel(placement: Placement) -> str:
    dense = placement == "data_parallel"
    return EmbeddingComputeKernel.DENSE.value if dense else EmbeddingComputeKernel.FUSED.value


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
