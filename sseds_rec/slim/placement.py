"""Where the tables of a slim model go if its job does not say: each is split as its original is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    EnumerableShardingSpec,
    ParameterSharding,
    ShardingPlan,
)
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from sseds_rec.constants import KERNEL_MULTIPLE
from sseds_rec.distributed.machine import job_cluster
from sseds_rec.distributed.runtime import Runtime
from sseds_rec.distributed.tables import table_configs
from sseds_rec.errors import UserError

Shard = Callable[[nn.Module], nn.Module]


def check_shard(model: nn.Module, sharded: bool, shard: Shard | None, verb: str) -> None:
    """Refuses sharded tables without their `DistributedModelParallel`, and a way to shard what is not sharded.

    Raises:
        UserError: see above.
    """
    if sharded and not isinstance(model, DistributedModelParallel):
        raise UserError(
            f"{type(model).__name__} holds sharded tables; give {verb}() the DistributedModelParallel around it"
        )
    if shard is not None and not sharded:
        raise UserError(f"shard= is for a model that is sharded; shard what {verb}() returns")


def shard_alike(model: DistributedModelParallel, tree: nn.Module) -> DistributedModelParallel:
    """Shards a model as another is sharded; all ranks call it.

    Every table has the sharding type and the kernel that it has there, on ranks that TorchRec's planner chooses. The planner
    alone would make small tables data-parallel, and these have no fused optimizer.

    Args:
        model: the other, with tables of the same names.
        tree: unsharded, tables on the meta device.

    Raises:
        UserError: no such plan fits.
    """
    env = model._env
    constraints = _constraints(model.plan, tree)
    planner = EmbeddingShardingPlanner(
        topology=job_cluster(Runtime(env.rank, env.world_size, model.device)).topology(), constraints=constraints
    )
    sharded = DistributedModelParallel(
        tree,
        env=env,
        device=model.device,
        plan=_plan(planner, model, tree) if constraints else ShardingPlan(plan={}),
        sharders=model.sharders,
        init_data_parallel=model._ddp_wrapped,
        data_parallel_wrapper=model._data_parallel_wrapper,
    )
    sharded.module.to(model.device)  # what DDP does, if there is one
    return sharded


def _constraints(plan: ShardingPlan, tree: nn.Module) -> dict[str, ParameterConstraints]:
    """Table -> what the planner may do. It knows tables by name only: those of one name may be split as any of them is."""
    widths: dict[str, int] = {}
    for module in tree.modules():
        for config in (
            table_configs(module) if isinstance(module, (EmbeddingBagCollection, EmbeddingCollection)) else ()
        ):
            widths[config.name] = min(config.embedding_dim, widths.get(config.name, config.embedding_dim))
    found: dict[str, ParameterConstraints] = {}
    for own in plan.plan.values():
        for name, placed in own.items() if isinstance(own, EmbeddingModuleShardingPlan) else ():
            if name not in widths:
                continue
            before = found.get(name, ParameterConstraints(sharding_types=[], compute_kernels=[]))
            found[name] = ParameterConstraints(
                sharding_types=sorted({*(before.sharding_types or []), placed.sharding_type}),
                compute_kernels=sorted({*(before.compute_kernels or []), placed.compute_kernel}),
                min_partition=_narrowest(widths[name], placed),
                cache_params=placed.cache_params,
                enforce_hbm=placed.enforce_hbm,
                stochastic_rounding=placed.stochastic_rounding,
                bounds_check_mode=placed.bounds_check_mode,
                output_dtype=placed.output_dtype,
                key_value_params=placed.key_value_params,
            )
    return found


def _narrowest(width: int, placed: ParameterSharding) -> int:
    """Columns of a shard: as many shards as there were, if the kernels can."""
    spec = placed.sharding_spec
    firsts = {part.shard_offsets[1] for part in spec.shards} if isinstance(spec, EnumerableShardingSpec) else {0}
    return -(-width // (len(firsts) * KERNEL_MULTIPLE)) * KERNEL_MULTIPLE


def _plan(planner: EmbeddingShardingPlanner, model: DistributedModelParallel, tree: nn.Module) -> ShardingPlan:
    """The first rank's plan, or its error on all of them: TorchRec's `collective_plan` would leave the others waiting."""
    group = model._env.process_group
    answer: list[Any] = [None, None]  # plan, why there is none
    if group is None or dist.get_rank(group) == 0:
        try:
            answer[0] = planner.plan(tree, model.sharders)
        except (PlannerError, RuntimeError, ValueError) as error:
            answer[1] = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if group is not None:
        dist.broadcast_object_list(answer, group=group, group_src=0)
    plan, failure = answer
    if failure is not None:
        raise UserError(f"no plan splits the slim tables as those of the model are; give slim() shard= ({failure})")
    return plan
