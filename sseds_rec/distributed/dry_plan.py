"""TorchRec's planner for a cluster that is not here, asked as training asks it."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.proposers import GreedyProposer, GridSearchProposer, UniformProposer
from torchrec.distributed.planner.types import (
    ParameterConstraints,
    PlannerError,
    Proposer,
    ShardingOption,
    Stats,
    StorageReservation,
    Topology,
)
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import DATA_TYPE_NUM_BITS

from sseds_rec.distributed.hardware import Cluster
from sseds_rec.distributed.managed import IdTable
from sseds_rec.distributed.planner import fused_optimizer, table_planner
from sseds_rec.distributed.sharding import sharders_for, table_constraints
from sseds_rec.distributed.tables import embedding_modules, table_configs
from sseds_rec.distributed.workload import Workload
from sseds_rec.footprint import state_bytes

#: What lies in a device's memory, from the bottom of a picture to its top.
PARTS = ("weights", "optimizer", "lookups", "dense", "margin")

_FUSED, _DENSE = EmbeddingComputeKernel.FUSED.value, EmbeddingComputeKernel.DENSE.value


@dataclass(frozen=True)
class Placement:
    """A plan, in what it takes.

    Attributes:
        cluster: where.
        memory: part (see `PARTS`) -> bytes in the device's memory, int64 [ranks]. Weights and optimizer states are
            exact; look-ups (ids, pooled embeddings, caches of tables in host memory) are the planner's estimate.
        ddr: bytes in host memory, of GPUs' tables that are there, int64 [ranks].
        step: fwd_compute, fwd_comms, bwd_compute, bwd_comms -> ms a step: the longest rank's in each, by the planner's model.
        sharding_types, kernels: -> number of tables.
        plan: as TorchRec takes it.
    """

    cluster: Cluster
    memory: dict[str, np.ndarray]
    ddr: np.ndarray
    step: dict[str, float]
    sharding_types: dict[str, int]
    kernels: dict[str, int]
    plan: ShardingPlan

    @property
    def used(self) -> np.ndarray:
        """Bytes of the device's memory, margin and all, int64 [ranks]."""
        return np.sum([self.memory[part] for part in PARTS], axis=0)


def place(workload: Workload, cluster: Cluster) -> Placement | None:
    """The plan that training would use there, or None if the planner finds none that fits.

    Raises:
        UserError: a table of raw ids cannot be split over so many ranks (names it).
    """
    attempt = _Attempt(workload, cluster)
    return attempt.placement() if attempt.run() else None


def fits(workload: Workload, cluster: Cluster) -> bool:
    """Whether `place` finds a plan. Faster: it ends with the first one."""
    return _Attempt(workload, cluster, first=True).run()


def need(workload: Workload, cluster: Cluster) -> int:
    """Bytes of all devices together without which no plan of tables in their memory can do."""
    beside = workload.beside_tables(cluster.world_size) * cluster.world_size
    return workload.weight_bytes + workload.optimizer_bytes + beside


class _Attempt:
    """One run of the planner.

    Args:
        first: end with the first plan that fits, which need not be the fastest.
    """

    def __init__(self, workload: Workload, cluster: Cluster, first: bool = False) -> None:
        self._workload, self._cluster = workload, cluster
        where, rows = cluster.topology(), workload.rows(cluster.world_size)
        constraints = table_constraints(workload.model, workload.sharding, where)
        self._least = _least(workload, cluster, constraints)
        self._chosen = _Chosen()
        beside, proposers = workload.beside_tables(cluster.world_size), _until_first() if first else None
        self._planner = table_planner(where, constraints, rows, beside, proposers, self._chosen)
        self._sharders = sharders_for(workload.sharding, torch.device(cluster.device.kind))

    def run(self) -> bool:
        """Whether there is a plan."""
        if self._least > self._cluster.usable:
            return False
        for module in self._workload.model.modules():
            if isinstance(module, IdTable):
                module.planned_ranks = self._cluster.world_size
        try:
            self._planner.plan(self._workload.model, self._sharders)
        except PlannerError:
            return False
        return True

    def placement(self) -> Placement:
        """Of the plan that was found."""
        device, ranks = self._cluster.device, self._cluster.world_size
        assert self._chosen.reserved is not None, "there is a plan"
        left = self._chosen.reserved.devices[0].storage
        memory = {part: np.zeros(ranks, np.int64) for part in PARTS}
        memory["margin"] += device.margin
        memory["dense"] += device.memory - (left.hbm if device.kind == "cuda" else left.ddr) - device.margin
        ddr = np.zeros(ranks, np.int64)
        for option in self._chosen.options:
            for shard in option.shards:
                in_memory = shard.storage.hbm if device.kind == "cuda" else shard.storage.ddr
                weights = math.prod(shard.size) * option.tensor.element_size()
                optimizer = fused_optimizer(option)
                held = {
                    "weights": weights if option.compute_kernel in (_FUSED, _DENSE) else 0,
                    "optimizer": state_bytes(shard.size[0], shard.size[1], optimizer) if optimizer else 0,
                }
                for part, size in {**held, "lookups": in_memory - sum(held.values())}.items():
                    memory[part][shard.rank] += size
                if device.kind == "cuda":
                    ddr[shard.rank] += shard.storage.ddr
        return Placement(
            cluster=self._cluster,
            memory=memory,
            ddr=ddr,
            step=_critical_path(self._chosen.options),
            sharding_types=dict(Counter(option.sharding_type for option in self._chosen.options).most_common()),
            kernels=dict(Counter(option.compute_kernel for option in self._chosen.options).most_common()),
            plan=self._chosen.plan,
        )


class _Chosen(Stats):
    """Keeps the plan that the planner chose, with its estimates."""

    def __init__(self) -> None:
        self.options: list[ShardingOption] = []
        self.plan = ShardingPlan({})
        self.reserved: Topology | None = None

    def log(
        self,
        *args: Any,
        sharding_plan: ShardingPlan,
        best_plan: list[ShardingOption],
        storage_reservation: StorageReservation,
        **facts: Any,
    ) -> None:
        self.options, self.plan, self.reserved = best_plan, sharding_plan, storage_reservation.last_reserved_topology


class _UntilFirst(Proposer):
    """One of the planner's proposers, silent once any of them has proposed what fits."""

    def __init__(self, proposer: Proposer, found: list[bool]) -> None:
        self._proposer, self._found = proposer, found

    def load(self, *args: Any, **options: Any) -> None:
        self._proposer.load(*args, **options)

    def propose(self) -> list[ShardingOption] | None:
        return None if self._found else self._proposer.propose()

    def feedback(self, partitionable: bool, *args: Any, **facts: Any) -> None:
        if partitionable:
            self._found.append(True)
        self._proposer.feedback(partitionable, *args, **facts)


def _until_first() -> list[Proposer]:
    """The planner's own proposers, the cheap ones first: what they find between them is the same."""
    proposers = [UniformProposer(), GreedyProposer(), GreedyProposer(use_depth=False), GridSearchProposer()]
    found: list[bool] = []
    return [_UntilFirst(proposer, found) for proposer in proposers]


def _least(workload: Workload, cluster: Cluster, constraints: dict[str, ParameterConstraints]) -> int:
    """Bytes of all devices together below which there is no plan: then the planner is not asked; 0 if that cannot be said.

    Each rank has ids of 8 bytes in twenty places, the size of TorchRec's reservation. Whatever the sharding type, each id is once
    on a rank that has the table, and each pooled row as well.
    """
    if not all({_FUSED, _DENSE}.issuperset(own.compute_kernels or ()) for own in constraints.values()):
        return 0
    numbers = 0.0
    for module in embedding_modules(workload.model).values():
        for table in table_configs(module):
            for factor in constraints[table.name].pooling_factors:
                numbers += (1 + 20) * 8 * factor
                numbers += min(1.0, factor) * table.embedding_dim * DATA_TYPE_NUM_BITS[table.data_type] / 8
    ranks = cluster.world_size
    return need(workload, cluster) + int(numbers * workload.rows(ranks) * ranks)


def _critical_path(options: list[ShardingOption]) -> dict[str, float]:
    """ms of each phase of a step, with ranks waiting for each other after it, as the planner's own statistics have it: the
    communication of the tables of one module and sharding type comes after that of the others."""
    phases: dict[str, Counter[tuple[Any, int]]] = {
        name: Counter() for name in ("fwd_compute", "fwd_comms", "bwd_compute", "bwd_comms")
    }
    for option in options:
        for shard in option.shards:
            for name, times in phases.items():
                group = (option.path, option.sharding_type) if name.endswith("comms") else None
                times[group, shard.rank] += getattr(shard.perf, name)
    step = {}
    for name, times in phases.items():
        longest: dict[Any, float] = {}
        for (group, _), time in times.items():
            longest[group] = max(longest.get(group, 0.0), time)
        step[name] = sum(longest.values())
    return step
