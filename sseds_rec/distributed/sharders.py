"""TorchRec's sharder of bags, with what it leaves out: all sharding types on a CPU, and kernels of tables of like widths."""

from __future__ import annotations

from typing import Any

from torch import nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.types import EnumerableShardingSpec, ParameterSharding, ShardingEnv, ShardingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

#: FBGEMM's CUDA kernels are compiled for rows of up to 32 columns, 64, 128, ...
_NARROWEST_KERNEL = 32

#: By this key TorchRec keeps tables apart that one kernel could hold. It is no option of the kernel.
_GROUP = "_batch_key"


class BagSharder(EmbeddingBagCollectionSharder):
    """For EmbeddingBagCollections, whose tables may differ in width."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """All: gloo and FBGEMM's CPU kernels can do those by rows as well, which the default list leaves out."""
        types = super().sharding_types(compute_device_type)
        by_rows = (ShardingType.ROW_WISE, ShardingType.TABLE_ROW_WISE, ShardingType.GRID_SHARD)
        return [*types, *(kind.value for kind in by_rows if kind.value not in types)]

    def shard(
        self,
        module: EmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        *args: Any,
        **options: Any,
    ) -> nn.Module:
        """Splits one collection."""
        if _on_cuda(params):  # a CPU's kernel takes each table at its own width
            group_by_width(module, params)
        return super().shard(module, params, env, *args, **options)


def group_by_width(module: EmbeddingBagCollection, params: dict[str, ParameterSharding]) -> None:
    """Has tables share a kernel only if the same compiled one fits them.

    TorchRec puts all tables of a rank into one kernel, which then has threads and registers for the widest of them, and whose
    cache in HBM, if they are in host memory, has slots of the widest.

    Args:
        module: not yet sharded; its parameters get a mark that TorchRec groups by.
        params: table -> its place.
    """
    for name, weight in module.named_parameters():
        placed = params[name.split(".")[-2]]
        spec = placed.sharding_spec
        if not isinstance(spec, EnumerableShardingSpec) or placed.sharding_type == ShardingType.DATA_PARALLEL.value:
            continue
        columns = max(shard.shard_sizes[1] for shard in spec.shards)
        group = columns if "uvm" in placed.compute_kernel else kernel_width(columns)
        options = getattr(weight, "_optimizer_kwargs", [{}])[0]  # one dictionary of all tables
        weight._optimizer_kwargs = [{**options, _GROUP: group}]


def kernel_width(columns: int) -> int:
    """The columns for which the narrowest of FBGEMM's kernels is compiled that takes so many."""
    return max(_NARROWEST_KERNEL, 1 << (columns - 1).bit_length())


def _on_cuda(params: dict[str, ParameterSharding]) -> bool:
    specs = [placed.sharding_spec for placed in params.values()]
    shards = [shard for spec in specs if isinstance(spec, EnumerableShardingSpec) for shard in spec.shards]
    return any(shard.placement.device().type == "cuda" for shard in shards)
