"""TorchRec's planner as both training and forecasts ask it: with the same estimates, and the same plan every time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torchrec.optim
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.estimator import EmbeddingPerfEstimatorFactory
from torchrec.distributed.planner.shard_estimators import EmbeddingStorageEstimator
from torchrec.distributed.planner.stats import NoopEmbeddingStats
from torchrec.distributed.planner.types import ParameterConstraints, Proposer, ShardingOption, Stats, Storage
from torchrec.distributed.types import ShardingType

from sseds_rec.distributed.reservation import storage_reservation
from sseds_rec.footprint import Optimizer, state_bytes

OPTIMIZERS: dict[Optimizer, type[torch.optim.Optimizer]] = {
    "sgd": torchrec.optim.SGD,
    "lars_sgd": torchrec.optim.LarsSGD,
    "adagrad": torchrec.optim.Adagrad,
    "rowwise_adagrad": torchrec.optim.RowWiseAdagrad,
    "adam": torchrec.optim.Adam,
    "partial_rowwise_adam": torchrec.optim.PartialRowWiseAdam,
    "lamb": torchrec.optim.LAMB,
    "partial_rowwise_lamb": torchrec.optim.PartialRowWiseLAMB,
}
_NAMES = {kind: name for name, kind in OPTIMIZERS.items()}

#: The name by which the planner's estimators of speed are made when nobody asks for one.
_ESTIMATOR = "default_estimator"


def table_planner(
    where: Topology,
    constraints: dict[str, ParameterConstraints],
    batch_size: int,
    dense_bytes: int | None = None,
    proposers: list[Proposer] | None = None,
    stats: Stats | None = None,
) -> EmbeddingShardingPlanner:
    """The planner of a job.

    Args:
        where: its devices.
        constraints: table -> what may be done with it.
        batch_size: rows a step and rank.
        dense_bytes: of each rank, for all but sharded tables; None for what the planned module's dense parameters take with Adam.
        proposers: TorchRec's if not given.
        stats: gets the plan that was chosen.
    """
    estimators = [
        EmbeddingPerfEstimatorFactory.create(_ESTIMATOR, topology=where, constraints=constraints),
        _StorageEstimator(topology=where, constraints=constraints),
    ]
    return EmbeddingShardingPlanner(
        topology=where,
        batch_size=batch_size,
        constraints=constraints,
        enumerator=_Enumerator(where, batch_size, constraints, estimators),
        storage_reservation=storage_reservation(dense_bytes),
        proposer=proposers,
        stats=stats or NoopEmbeddingStats(),
    )


class _Enumerator(EmbeddingEnumerator):
    """The planner's, in an order of its own: TorchRec's goes by a set of strings, and so do ties between plans."""

    def enumerate(self, *args: Any, **options: Any) -> list[ShardingOption]:
        found = super().enumerate(*args, **options)
        place = {option.fqn: place for place, option in enumerate(found)}
        simple = ShardingType.TABLE_WISE.value
        return sorted(found, key=lambda o: (place[o.fqn], o.sharding_type != simple, o.sharding_type, o.compute_kernel))


class _StorageEstimator(EmbeddingStorageEstimator):
    """The planner's, with optimizer states as FBGEMM keeps them: TorchRec 1.8 takes them to be as wide as the weights' numbers
    are, and as many for LAMB as for Adagrad; and of column-wise shards it divides what each has a number a row of."""

    def __init__(self, topology: Topology, constraints: dict[str, ParameterConstraints]) -> None:
        super().__init__(topology=topology, constraints=constraints)
        self._on_gpu = topology.compute_device == "cuda"

    def estimate(
        self, sharding_options: list[ShardingOption], sharder_data_map: Mapping[str, Any] | None = None
    ) -> None:
        super().estimate(sharding_options, sharder_data_map)
        for option in sharding_options:
            optimizer = fused_optimizer(option)
            if optimizer is None:
                continue
            counted = {"sgd": 0, "adam": 2, "rowwise_adagrad": 1 / option.tensor.shape[1]}.get(optimizer, 1)
            for shard in option.shards:
                weights = math.prod(shard.size) * option.tensor.element_size()
                missing = state_bytes(shard.size[0], shard.size[1], optimizer) - math.ceil(weights * counted)
                shard.storage += Storage(hbm=missing, ddr=0) if self._on_gpu else Storage(hbm=0, ddr=missing)


def fused_optimizer(option: ShardingOption) -> Optimizer | None:
    """What updates a table inside its backward, if it is in its device's memory."""
    if option.compute_kernel != EmbeddingComputeKernel.FUSED.value:
        return None
    (kind,) = getattr(option.tensor, "_optimizer_classes", [None])
    return _NAMES.get(kind) if kind is not None else None
