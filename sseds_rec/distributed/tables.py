"""The embedding tables of a model, plain or sharded, and what the kernels ask of their width."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from sseds_rec.distributed.managed import is_managed
from sseds_rec.errors import UserError

#: FBGEMM's table-batched kernels take widths that are multiples of this only, on CPU too.
KERNEL_MULTIPLE = 4


def stored_dim(embedding_dim: int) -> int:
    """The width in columns at which FBGEMM can store `embedding_dim` columns."""
    return -(-embedding_dim // KERNEL_MULTIPLE) * KERNEL_MULTIPLE


def embedding_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Path without wrappers -> every (sharded) EmbeddingBagCollection of a model, managed collision ones as a whole.

    Raises:
        UserError: the model has none, or has an embedding module that cannot be searched (named).
    """
    found: dict[str, nn.Module] = {}
    plain_paths: dict[str, str] = {}
    for path, module in model.named_modules():
        parent, _, attribute = path.rpartition(".")
        wrapped = isinstance(model.get_submodule(parent), (DistributedModelParallel, DistributedDataParallel)) and path
        above = plain_paths.get(parent, "")
        plain = above if wrapped or not path else f"{above}.{attribute}".removeprefix(".")
        plain_paths[path] = plain
        if is_managed(module):
            found[plain] = module
        elif isinstance(module, (EmbeddingBagCollection, ShardedEmbeddingBagCollection)):
            if not is_managed(model.get_submodule(parent)):
                found[plain] = module
        elif isinstance(module, (EmbeddingCollection, ShardedEmbeddingCollection)):
            raise UserError(
                f"{plain or type(module).__name__}: {type(module).__name__} (sequence embeddings) cannot be searched; "
                "only EmbeddingBagCollection can"
            )
    if not found:
        raise UserError(f"{type(model).__name__} holds no EmbeddingBagCollection: there is nothing to search")
    return found


def table_configs(module: nn.Module) -> list[EmbeddingBagConfig]:
    """The tables of a plain or sharded EmbeddingBagCollection, in a managed collision one or not."""
    if is_managed(module):
        return table_configs(module._embedding_module)  # type: ignore[arg-type]
    if isinstance(module, EmbeddingBagCollection):
        return module.embedding_bag_configs()
    return module._embedding_bag_configs  # type: ignore[return-value]


@contextmanager
def kernels_uncounted(model: nn.Module) -> Iterator[None]:
    """Undoes what forward passes in the block do to the fused optimizers: FBGEMM counts Adam's steps in *forward*."""
    lookups = [lookup for module in model.modules() for lookup in getattr(module, "_lookups", [])]
    kernels = [
        m for lookup in lookups for m in lookup.modules() if isinstance(m, SplitTableBatchedEmbeddingBagsCodegen)
    ]
    counters = [(kernel.step, kernel.iter.clone(), kernel.iter_cpu.clone()) for kernel in kernels]
    try:
        yield
    finally:
        for kernel, (step, iteration, iteration_cpu) in zip(kernels, counters, strict=True):
            kernel.step, kernel.iter_cpu = step, iteration_cpu
            kernel.iter.copy_(iteration)
