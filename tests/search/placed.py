"""Sharded models of the tests: every table where the test wants it, with the weights it wants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.fp_embeddingbag import FeatureProcessedEmbeddingBagCollectionSharder
from torchrec.distributed.itep_embeddingbag import ITEPEmbeddingBagCollectionSharder
from torchrec.distributed.mc_embedding import ManagedCollisionEmbeddingCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints

from sseds_rec.distributed.managed import ManagedSharder
from sseds_rec.distributed.sharding import BagSharder


class _Anywhere:
    """TorchRec's sharders leave out on CPU what its kernels and gloo can do."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return ["table_wise", "row_wise", "column_wise", "data_parallel", "table_row_wise", "table_column_wise"]


class Bags(_Anywhere, BagSharder):
    pass


class Sequences(_Anywhere, EmbeddingCollectionSharder):
    pass


class Processed(_Anywhere, FeatureProcessedEmbeddingBagCollectionSharder):
    pass


class Pruned(_Anywhere, ITEPEmbeddingBagCollectionSharder):
    pass


def shard(
    model: nn.Module,
    types: Mapping[str, str],
    local: int | None = None,
    fused_params: dict[str, Any] | None = None,
) -> DistributedModelParallel:
    """Splits the tables as `types` says, on CPU; `local` ranks are one machine, and `fused_params` go to all tables."""
    constraints = {
        table: ParameterConstraints(
            sharding_types=[kind], compute_kernels=["dense" if kind == "data_parallel" else "fused"], min_partition=4
        )
        for table, kind in types.items()
    }
    topology = Topology(world_size=dist.get_world_size(), local_world_size=local, compute_device="cpu")
    bags, sequences = Bags(fused_params=fused_params), Sequences(fused_params=fused_params)
    sharders: Any = [
        bags,
        sequences,
        Processed(bags),
        Pruned(bags),
        ManagedSharder(bags),
        ManagedCollisionEmbeddingCollectionSharder(sequences),
    ]
    planner = EmbeddingShardingPlanner(topology=topology, constraints=constraints)
    plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
    return DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)


def load(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copies whole values into what this rank holds of them."""
    found = model.state_dict()
    for name, whole in weights.items():
        value = found[name]
        if not hasattr(value, "local_shards"):
            value.copy_(whole)
            continue
        for part in value.local_shards():
            row, column = part.metadata.shard_offsets
            rows, columns = part.metadata.shard_sizes
            part.tensor.copy_(whole[row : row + rows, column : column + columns])
