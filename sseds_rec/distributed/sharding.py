"""Which rank holds what: constraints, the planner, and the wrapped model."""

from __future__ import annotations

import torch
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper, DistributedModelParallel
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError
from torchrec.distributed.types import (
    CacheParams,
    KeyValueParams,
    ModuleSharder,
    QuantizedCommCodecs,
    ShardingPlan,
    ShardingType,
)
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from sseds_rec.constants import KERNEL_MULTIPLE
from sseds_rec.distributed.hardware import show_size
from sseds_rec.distributed.machine import job_cluster
from sseds_rec.distributed.managed import ManagedSharder, is_managed
from sseds_rec.distributed.plan_file import load_plan
from sseds_rec.distributed.planner import table_planner
from sseds_rec.distributed.runtime import Runtime
from sseds_rec.distributed.sharders import BagSharder
from sseds_rec.distributed.sharding_config import VIRTUAL, CommPrecision, Placement, ShardingConfig, TableSharding
from sseds_rec.distributed.tables import embedding_modules, table_configs
from sseds_rec.errors import UserError

#: Buckets of a table whose rows are made as ids are seen: by them its shards can be divided anew.
_VIRTUAL_BUCKETS = 1024


def shard(
    model: nn.Module,
    config: ShardingConfig,
    runtime: Runtime,
    batch_size: int,
    plan: str | None = None,
    dense_bytes: int | None = None,
) -> DistributedModelParallel:
    """Plans a model whose tables are on the meta device and wraps it; each rank makes only its own shards.

    Args:
        model: any module tree with EmbeddingBagCollections or EmbeddingCollections.
        config: constraints.
        runtime: of this process.
        batch_size: rows per rank and step, for the planner's estimates.
        plan: file of a plan, by `save_plan`, to be taken instead of the planner's.
        dense_bytes: of each rank, for all but sharded tables; None for what the dense parameters take with Adam.

    Raises:
        UserError: the tables do not fit this topology under the constraints, a precision is not one that it sends, or the
            file's plan is of other tables or another job.
    """
    sharders = sharders_for(config, runtime.device)
    where = job_cluster(runtime, config.device).topology()
    constraints = table_constraints(model, config, where)
    _mark_virtual(model, constraints)

    def place() -> ShardingPlan:
        if plan is not None:
            return load_plan(plan, model, where, constraints)
        return plan_sharding(model, config, where, batch_size, sharders, dense_bytes)

    alone = runtime.world_size == 1
    sharded = DistributedModelParallel(
        model,
        device=runtime.device,
        plan=runtime.from_main(place),
        sharders=sharders,
        init_data_parallel=not alone,
        data_parallel_wrapper=DefaultDataParallelWrapper(allreduce_comm_precision=config.comm_precision),
    )
    if alone:
        # No DDP over the dense part: it copies every gradient to average it with nothing. But it also moves that part.
        sharded.module.to(runtime.device)
    return sharded


def sharders_for(config: ShardingConfig, device: torch.device) -> list[ModuleSharder[nn.Module]]:
    """What splits all collections that can be trained, on this kind of device.

    Raises:
        UserError: the processes of such devices do not send embeddings in the precision that is asked for.
    """
    codecs = _codecs(config.comm_precision, device)
    bags = BagSharder(qcomm_codecs_registry=codecs)
    return [bags, EmbeddingCollectionSharder(qcomm_codecs_registry=codecs), ManagedSharder(bags)]


def plan_sharding(
    model: nn.Module,
    config: ShardingConfig,
    where: Topology,
    batch_size: int,
    sharders: list[ModuleSharder[nn.Module]],
    dense_bytes: int | None = None,
) -> ShardingPlan:
    """The planner's placement of every table; needs no process group. Arguments as of `shard`.

    Raises:
        UserError: no plan fits, or a table cannot be split as is asked (names it).
    """
    constraints = table_constraints(model, config, where)
    try:
        return table_planner(where, constraints, batch_size, dense_bytes).plan(model, sharders)
    except PlannerError as error:
        each = where.devices[0].storage
        memory = each.hbm if where.compute_device == "cuda" else each.ddr
        raise UserError(
            f"sharding.type={config.type}: no plan fits {where.world_size} x {where.compute_device} with "
            f"{show_size(memory)} each: {_first_line(error)}; `sseds forecast` tells what would"
        ) from None


def table_constraints(model: nn.Module, config: ShardingConfig, where: Topology) -> dict[str, ParameterConstraints]:
    """Table -> what the planner may do with it.

    Raises:
        UserError: a table is asked to be split in a way that it, or this topology, does not allow (names it).
    """
    constraints: dict[str, ParameterConstraints] = {}
    for module in embedding_modules(model).values():
        for table in table_configs(module):
            own = config.of(table.name)
            if is_managed(module):
                own = own.model_copy(update={"types": [_row_wise(table, own, config.type, where)]})
            constraints[table.name] = _constraint(table, own, config.type, where)
    return constraints


def _constraint(
    table: EmbeddingBagConfig, own: TableSharding, default: Placement, where: Topology
) -> ParameterConstraints:
    types = own.types or _allowed(default, where.compute_device)
    if default == "data_parallel" and types != ["data_parallel"]:
        raise UserError(
            f"sharding.tables.{table.name}.types={types}: its optimizer here is not fused, so it is data_parallel; "
            "leave it out, or choose another train.table_optimizer"
        )
    if own.kernels != ["fused"] and where.compute_device == "cpu":
        raise UserError(
            f"sharding.tables.{table.name}.kernels={own.kernels}: a CPU job keeps tables in its memory, with kernel fused; "
            "the others are for device=cuda"
        )
    dense = types == ["data_parallel"]
    # Slim tables are narrower than the planner's default smallest column shard.
    narrowest = own.min_partition
    if types == ["column_wise"] and narrowest is None:
        share = table.embedding_dim // where.world_size // KERNEL_MULTIPLE * KERNEL_MULTIPLE
        narrowest = max(KERNEL_MULTIPLE, share)
    return ParameterConstraints(
        sharding_types=list(types),
        compute_kernels=[EmbeddingComputeKernel.DENSE.value] if dense else list(own.kernels),
        min_partition=narrowest and min(narrowest, table.embedding_dim),
        pooling_factors=[own.pooling_factor] * len(table.feature_names),
        cache_params=None if own.cache_load_factor is None else CacheParams(load_factor=own.cache_load_factor),
        key_value_params=KeyValueParams(**own.key_value) if own.key_value else None,
        use_virtual_table=not {*VIRTUAL}.isdisjoint(own.kernels),
    )


def _mark_virtual(model: nn.Module, constraints: dict[str, ParameterConstraints]) -> None:
    """Tells TorchRec, which reads it from the tables, which of them have no rows beforehand."""
    for module in embedding_modules(model).values():
        for table in table_configs(module):
            if constraints[table.name].use_virtual_table:
                table.use_virtual_table = True
                table.total_num_buckets = _VIRTUAL_BUCKETS


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


def _row_wise(table: EmbeddingBagConfig, own: TableSharding, asked: Placement, where: Topology) -> Placement:
    """The sharding type of a table of raw ids."""
    if asked == "data_parallel" or own.is_data_parallel:
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
    return [kind.value for kind in ShardingType if kind != ShardingType.DATA_PARALLEL]


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
