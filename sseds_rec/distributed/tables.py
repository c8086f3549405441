"""The embedding tables of a model, plain or sharded, and what the kernels ask of their width."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from fbgemm_gpu.tbe.ssd import SSDTableBatchedEmbeddingBags
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.batched_embedding_kernel import BatchedDenseEmbedding
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embedding_tower_sharding import ShardedEmbeddingTower, ShardedEmbeddingTowerCollection
from torchrec.distributed.embedding_types import ShardedEmbeddingModule
from torchrec.distributed.embeddingbag import ShardedEmbeddingBag, ShardedEmbeddingBagCollection
from torchrec.distributed.fp_embeddingbag import ShardedFeatureProcessedEmbeddingBagCollection
from torchrec.distributed.itep_embeddingbag import ShardedITEPEmbeddingBagCollection, ShardedITEPEmbeddingCollection
from torchrec.distributed.mc_embedding_modules import BaseShardedManagedCollisionEmbeddingCollection
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.quant_state import ShardedQuantEmbeddingModuleState
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollection,
    EmbeddingBagCollectionInterface,
    EmbeddingCollection,
    EmbeddingCollectionInterface,
)
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection, FusedEmbeddingCollection
from torchrec.modules.itep_embedding_modules import ITEPEmbeddingBagCollection, ITEPEmbeddingCollection
from torchrec.modules.mc_embedding_modules import BaseManagedCollisionEmbeddingCollection
from torchrec.modules.pec_embedding_modules import PECEmbeddingCollection
from torchrec.quant import embedding_modules as quantized

from sseds_rec.errors import UserError

SEARCHABLE = (
    EmbeddingBagCollection,
    EmbeddingCollection,
    FeatureProcessedEmbeddingBagCollection,
    BaseManagedCollisionEmbeddingCollection,
    ShardedEmbeddingBagCollection,
    ShardedEmbeddingCollection,
    ShardedFeatureProcessedEmbeddingBagCollection,
    BaseShardedManagedCollisionEmbeddingCollection,
)

#: What TorchRec has besides, and what to do instead of searching or slimming it. The first that fits counts.
_REFUSED: dict[tuple[type, ...], str] = {
    (ShardedQuantEmbeddingModuleState, quantized.EmbeddingBagCollection, quantized.EmbeddingCollection): (
        "it is quantized, for inference; take the model it was made from"
    ),
    (ITEPEmbeddingBagCollection, ITEPEmbeddingCollection): (
        "it prunes rows by the forward passes it counts; take the model without it"
    ),
    (ShardedITEPEmbeddingBagCollection, ShardedITEPEmbeddingCollection): (
        "it prunes rows by the forward passes it counts; search the model without it; to slim it, convert its checkpoint"
    ),
    (ShardedEmbeddingTower, ShardedEmbeddingTowerCollection): (
        "its embeddings never leave the tower's ranks; take the model before sharding"
    ),
    (FusedEmbeddingBagCollection, FusedEmbeddingCollection): (
        "unsharded, its kernels count steps that cannot be undone; shard it, or use a plain collection"
    ),
    (PECEmbeddingCollection,): "it compares consecutive batches; take the model with its EmbeddingCollection alone",
    (ShardedEmbeddingBag,): "only the tables of collections are; use an EmbeddingBagCollection",
    (EmbeddingBagCollectionInterface, EmbeddingCollectionInterface, ShardedEmbeddingModule): (
        "only EmbeddingBagCollection, EmbeddingCollection and TorchRec's modules around them can be"
    ),
}


def embedding_modules(
    model: nn.Module, also: tuple[type[nn.Module], ...] = (), purpose: str = "searched"
) -> dict[str, nn.Module]:
    """Path without wrappers -> every embedding collection of a model that can be searched, plain or sharded, or is in `also`.

    These are `EmbeddingBagCollection` and `EmbeddingCollection`. One that belongs to a module which processes or remaps its
    ids first (`FeatureProcessedEmbeddingBagCollection`, managed collision) is not named beside that module.

    Args:
        model: any module tree.
        also: other kinds of modules to find.
        purpose: what is to be done to them, for errors.

    Raises:
        UserError: the model has none, or has an embedding module that cannot be searched (named).
    """
    kinds: tuple[type[nn.Module], ...] = (*SEARCHABLE, *also)
    found: dict[str, nn.Module] = {}
    at: dict[str, nn.Module] = {}
    plain_paths: dict[str, str] = {}
    covered: set[str] = set()  # paths of what is found, and of everything inside
    for path, module in model.named_modules():
        parent, _, attribute = path.rpartition(".")
        above = plain_paths.get(parent, "")
        wrapped = path and isinstance(at.get(parent), (DistributedModelParallel, DistributedDataParallel))
        plain = above if wrapped or not path else f"{above}.{attribute}".removeprefix(".")
        at[path], plain_paths[path] = module, plain
        if path and parent in covered:
            covered.add(path)
        elif isinstance(module, kinds):
            _check_kernels(plain, module, purpose)
            covered.add(path)
            found[plain] = module
        else:
            _check_searchable(plain, module, purpose)
    if not found:
        raise UserError(f"{type(model).__name__} holds no EmbeddingBagCollection: there is nothing to be {purpose}")
    return found


def _check_searchable(path: str, module: nn.Module, purpose: str) -> None:
    for kinds, what_to_do in _REFUSED.items():
        if isinstance(module, kinds):
            name = type(module).__name__
            raise UserError(f"{path or 'the model'}: {name} cannot be {purpose}: {what_to_do}")


def _check_kernels(path: str, module: nn.Module, purpose: str) -> None:
    """Refuses what holds the shards of a module, if its forward cannot be undone or is wrong."""
    for inner in lookup_modules(module):
        if isinstance(inner, SSDTableBatchedEmbeddingBags):
            raise UserError(
                f"{path or 'the model'}: tables on SSD or in a key-value store cannot be {purpose}: "
                "each look-up moves their rows; take the model with its tables in memory"
            )
        if isinstance(inner, BatchedDenseEmbedding) and inner.emb_module.use_cpu:
            raise UserError(
                f"{path or 'the model'}: data-parallel tables of an EmbeddingCollection cannot be {purpose} on a CPU: "
                "FBGEMM's kernel mixes up their sequences (pytorch/FBGEMM#4586), in training too; shard them otherwise"
            )


def table_configs(module: nn.Module) -> list[EmbeddingBagConfig]:
    """The tables of one of `embedding_modules`; an EmbeddingCollection's are `EmbeddingConfig`s, which have no pooling."""
    collection = collection_of(module)
    configs = collection._embedding_configs if is_sequence(module) else collection._embedding_bag_configs
    return configs  # type: ignore[return-value]


def collection_of(module: nn.Module) -> nn.Module:
    """One of `embedding_modules`, or the collection inside, if it processes or remaps ids first."""
    for attribute in ("_embedding_module", "_embedding_bag_collection", "_embedding_collection"):
        inner = getattr(module, attribute, None)
        if inner is not None:
            return inner
    return module


def is_sequence(module: nn.Module) -> bool:
    """Whether this returns an embedding per id (EmbeddingCollection) and not one per bag of ids."""
    return isinstance(collection_of(module), (EmbeddingCollection, ShardedEmbeddingCollection))


def lookup_modules(model: nn.Module) -> list[nn.Module]:
    """What holds the shards of embedding modules, and everything inside it: it is in no module's children."""
    lookups = [lookup for module in model.modules() for lookup in getattr(module, "_lookups", [])]
    found = [inner for lookup in lookups for inner in lookup.modules()]
    return list(dict.fromkeys(found))  # a module around a collection lists its lookups as well


def training_kernels(model: nn.Module) -> list[SplitTableBatchedEmbeddingBagsCodegen]:
    """FBGEMM's kernels with fused optimizers."""
    return [inner for inner in lookup_modules(model) if isinstance(inner, SplitTableBatchedEmbeddingBagsCodegen)]


@contextmanager
def kernels_uncounted(model: nn.Module) -> Iterator[None]:
    """Undoes what forward passes in the block do to the fused optimizers: FBGEMM counts Adam's steps in *forward*."""
    kernels = training_kernels(model)
    # max_counter is of row-wise Adagrad that counts how often it saw each row.
    buffers = [value for kernel in kernels for name, value in kernel.named_buffers() if name in ("iter", "max_counter")]
    before = [value.clone() for value in buffers]
    steps = [(kernel.step, kernel.iter_cpu.clone()) for kernel in kernels]
    try:
        yield
    finally:
        for kernel, (step, iteration) in zip(kernels, steps, strict=True):
            kernel.step, kernel.iter_cpu = step, iteration
        for value, old in zip(buffers, before, strict=True):
            value.copy_(old)
