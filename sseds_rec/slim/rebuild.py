"""TorchRec's embedding modules once more, over other tables: plain, and with what processes or remaps their ids first."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.fp_embeddingbag import ShardedFeatureProcessedEmbeddingBagCollection
from torchrec.distributed.mc_embedding_modules import BaseShardedManagedCollisionEmbeddingCollection
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection
from torchrec.modules.itep_embedding_modules import ITEPEmbeddingBagCollection, ITEPEmbeddingCollection
from torchrec.modules.mc_embedding_modules import (
    BaseManagedCollisionEmbeddingCollection,
    ManagedCollisionEmbeddingBagCollection,
    ManagedCollisionEmbeddingCollection,
)
from torchrec.modules.mc_modules import ManagedCollisionCollection, ManagedCollisionModule

from sseds_rec.distributed.tables import collection_of, is_sequence

PROCESSED = (FeatureProcessedEmbeddingBagCollection, ShardedFeatureProcessedEmbeddingBagCollection)
MANAGED = (BaseManagedCollisionEmbeddingCollection, BaseShardedManagedCollisionEmbeddingCollection)
ROW_PRUNED = (ITEPEmbeddingBagCollection, ITEPEmbeddingCollection)


def rebuild(module: nn.Module, tables: Sequence[EmbeddingBagConfig], device: torch.device) -> nn.Module:
    """An unsharded module like `module`, with tables of its own, and copies of what processes or remaps ids.

    Args:
        module: one of `embedding_modules`, plain or sharded.
        tables: some of the module's, of other widths.
        device: of the new tables.
    """
    sequence = is_sequence(module)
    collection = _collection(collection_of(module), list(tables), device)
    if isinstance(module, PROCESSED):
        return FeatureProcessedEmbeddingBagCollection(collection, _processors(module, tables))
    if isinstance(module, MANAGED):
        maps: Any = module._managed_collision_collection
        own = {table.name: _id_map(maps._managed_collision_modules[table.name], table, device) for table in tables}
        kind: Any = ManagedCollisionEmbeddingCollection if sequence else ManagedCollisionEmbeddingBagCollection
        together = ManagedCollisionCollection(own, list(tables), maps.need_preprocess)
        return kind(collection, together, module._return_remapped_features)
    if isinstance(module, ROW_PRUNED):
        kind = ITEPEmbeddingCollection if sequence else ITEPEmbeddingBagCollection
        pruned = kind(collection, copy.deepcopy(module._itep_module))
        pruned._iter.copy_(module._iter)
        return pruned
    return collection


def _collection(like: Any, tables: list[EmbeddingBagConfig], device: torch.device) -> Any:
    optimizers = _optimizers(like)
    if is_sequence(like):
        collection: Any = EmbeddingCollection(tables, device, need_indices=like._need_indices)
        weights = {name: table.weight for name, table in collection.embeddings.items()}
    else:
        collection = EmbeddingBagCollection(tables, like._is_weighted, device)
        weights = {name: table.weight for name, table in collection.embedding_bags.items()}
    for name, weight in weights.items():
        for kind, options in optimizers.get(name, ()):
            apply_optimizer_in_backward(kind, [weight], options)
    return collection


def _optimizers(collection: Any) -> dict[str, list[tuple[Any, Any]]]:
    """Table -> the fused optimizers it was given before it was sharded. (A sharded EmbeddingCollection does not keep them.)"""
    if isinstance(collection, ShardedEmbeddingBagCollection):
        infos = [info for group in collection.sharding_type_to_sharding_infos.values() for info in group]
        weights = {info.embedding_config.name: info.param for info in infos}
    else:
        tables = getattr(collection, "embedding_bags", None) or getattr(collection, "embeddings", {})
        weights = {name: table.weight for name, table in tables.items()}
    return {
        name: list(zip(weight._optimizer_classes, weight._optimizer_kwargs, strict=True))
        for name, weight in weights.items()
        if hasattr(weight, "_optimizer_classes")
    }


def _processors(module: Any, tables: Sequence[EmbeddingBagConfig]) -> Any:
    """Copies of the feature processors, those of dropped features left out."""
    processors = module._feature_processors
    if not isinstance(processors, nn.ModuleDict):
        return copy.deepcopy(processors)
    features = [feature for table in tables for feature in table.feature_names]
    return {feature: copy.deepcopy(processors[feature]) for feature in features}


def _id_map(module: ManagedCollisionModule, table: EmbeddingBagConfig, device: torch.device) -> ManagedCollisionModule:
    """A copy of an unsharded map from ids to rows; of one rank's part, the empty map of all ranks."""
    if module.output_size() == table.num_embeddings and module.device == device:
        return copy.deepcopy(module)
    whole = (0, table.num_embeddings)
    return module.rebuild_with_output_id_range(whole, list(whole), device)
