"""TorchRec's embedding modules once more, over other tables: plain, and with what processes or remaps their ids first."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig
from torchrec.distributed.fp_embeddingbag import ShardedFeatureProcessedEmbeddingBagCollection
from torchrec.distributed.mc_embedding_modules import BaseShardedManagedCollisionEmbeddingCollection
from torchrec.distributed.types import ShardedModule
from torchrec.distributed.utils import emb_opt_type_to_optimizer_class
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

from sseds_rec.distributed.tables import collection_of, is_sequence, lookup_modules

PROCESSED = (FeatureProcessedEmbeddingBagCollection, ShardedFeatureProcessedEmbeddingBagCollection)
MANAGED = (BaseManagedCollisionEmbeddingCollection, BaseShardedManagedCollisionEmbeddingCollection)
ROW_PRUNED = (ITEPEmbeddingBagCollection, ITEPEmbeddingCollection)


def rebuild(
    module: nn.Module,
    tables: Sequence[EmbeddingBagConfig],
    device: torch.device,
    group: dist.ProcessGroup | None = None,
) -> nn.Module:
    """An unsharded module like `module`, with tables of its own, and copies of what processes or remaps ids.

    Args:
        module: one of `embedding_modules`, plain or sharded.
        tables: some of the module's, of other widths.
        device: of the new tables.
        group: of the ranks, if the module is sharded; all call it.
    """
    sequence = is_sequence(module)
    collection = _collection(collection_of(module), list(tables), device, group)
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


def _collection(
    like: Any, tables: list[EmbeddingBagConfig], device: torch.device, group: dist.ProcessGroup | None
) -> Any:
    if is_sequence(like):
        collection: Any = EmbeddingCollection(tables, device, need_indices=like._need_indices)
        weights = {name: table.weight for name, table in collection.embeddings.items()}
    else:
        collection = EmbeddingBagCollection(tables, like._is_weighted, device)
        weights = {name: table.weight for name, table in collection.embedding_bags.items()}
    _give_optimizers(like, weights, group)
    return collection


def _give_optimizers(like: Any, weights: Mapping[str, nn.Parameter], group: dist.ProcessGroup | None) -> None:
    """Gives the tables the fused optimizers that those of another collection were given, and freezes those that are frozen."""
    if isinstance(like, ShardedModule):
        for name, options in _fused_options(like, group).items():
            if name in weights and "optimizer" in options:
                # What TorchRec reads when it shards; the optimizer itself is in the kernel.
                weights[name]._optimizer_classes = [emb_opt_type_to_optimizer_class(options["optimizer"])]  # type: ignore[attr-defined]
                weights[name]._optimizer_kwargs = [options]  # type: ignore[attr-defined]
        return
    for name, table in (like.embeddings if is_sequence(like) else like.embedding_bags).items():
        kinds, given = (getattr(table.weight, key, ()) for key in ("_optimizer_classes", "_optimizer_kwargs"))
        for kind, options in zip(kinds, given, strict=True):
            if name in weights:
                apply_optimizer_in_backward(kind, [weights[name]], dict(options))
        if name in weights:
            weights[name].requires_grad_(table.weight.requires_grad)


#: What FBGEMM's kernels take for their optimizers; the rest of a kernel's options is the placement's.
_OPTIMIZER_OPTIONS = {
    *("optimizer", "learning_rate", "eps", "momentum", "eta", "beta1", "beta2", "weight_decay", "weight_decay_mode"),
    *("gradient_clipping", "max_gradient", "max_norm", "stochastic_rounding", "global_weight_decay"),
    *("counter_based_regularization", "cowclip_regularization", "ensemble_mode"),
}


def _fused_options(collection: nn.Module, group: dist.ProcessGroup | None) -> dict[str, dict[str, Any]]:
    """Table -> options of its fused optimizer, of all ranks' tables."""
    own: dict[str, dict[str, Any]] = {}
    for lookup in lookup_modules(collection):
        config = getattr(lookup, "_config", None)
        if isinstance(config, GroupedEmbeddingConfig):
            options = {key: value for key, value in (config.fused_params or {}).items() if key in _OPTIMIZER_OPTIONS}
            optimizer = getattr(lookup, "fused_optimizer", None)
            if optimizer is not None and "learning_rate" in options:
                options["learning_rate"] = optimizer.param_groups[0]["lr"]  # as a schedule has left it
            own |= {table.name: options for table in config.embedding_tables}
    everywhere = [own]
    if group is not None and dist.get_world_size(group) > 1:
        everywhere *= dist.get_world_size(group)
        dist.all_gather_object(everywhere, own, group=group)
    return {name: options for rank in everywhere for name, options in rank.items()}


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
    segments = [int(start) for start in module._output_segments_tensor if start >= 0]  # one a rank
    return module.rebuild_with_output_id_range((0, table.num_embeddings), segments, device)
