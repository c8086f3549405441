"""Drop-in collections: fewer columns inside, and from outside what they replace."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from torchrec.distributed.types import Awaitable
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.optim.fused import FusedOptimizerModule
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from sseds_rec.slim.widening import Output, PooledWidening, SequenceWidening, Tables


class SlimModule(FusedOptimizerModule, nn.Module):
    """A module around rebuilt ones, whose tables have the names in state dicts and optimizers that the original's have.

    So what `slim_checkpoint` writes loads into it, and a job's own checkpoint code finds what it expects.

    Attributes:
        tables: those of the original.
        output: what is returned.
        widening: what makes it of kept columns.
    """

    widening: PooledWidening | SequenceWidening

    def __init__(self, tables: Tables, output: Output) -> None:
        super().__init__()
        self.tables, self.output = tables, output
        self.register_state_dict_post_hook(_hide)
        self.register_load_state_dict_pre_hook(_restore)

    @abstractmethod
    def parts(self) -> Mapping[str, tuple[nn.Module, set[str]]]:
        """Path within this module -> what is rebuilt there, and the tables it has."""

    def configs_returned(self) -> list[EmbeddingBagConfig]:
        """The original tables, as wide as what is returned; of raw output the kept ones."""
        plans, rotations = self.tables.plans, self.tables.rotations
        found = []
        for config in self.tables.configs:
            width = self.output.aligned_dim or config.embedding_dim
            if self.output.raw:
                width = plans[config.name].embedding_dim + (config.name in rotations)
            if width:
                found.append(replace(config, embedding_dim=width))
        return found

    @property
    def fused_optimizer(self) -> CombinedOptimizer:
        """Of what is rebuilt, once it is sharded."""
        found = [own for part, _ in self.parts().values() for own in _fused_optimizers(part, "")]
        return CombinedOptimizer(found)


def _fused_optimizers(module: nn.Module, path: str) -> list[tuple[str, KeyedOptimizer]]:
    if isinstance(module, FusedOptimizerModule):
        return [(path, module.fused_optimizer)]
    children = module.named_children()
    return [own for name, child in children for own in _fused_optimizers(child, f"{path}.{name}".removeprefix("."))]


def _hide(module: SlimModule, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for path in module.parts():
        for name in [name for name in state if name.startswith(f"{prefix}{path}.")]:
            state[prefix + name.removeprefix(f"{prefix}{path}.")] = state.pop(name)


def _restore(module: SlimModule, state: dict[str, Any], prefix: str, *others: Any) -> None:
    own = tuple(f"{prefix}{name}." for name, _ in module.named_children())
    parts = module.parts()
    for name in [name for name in state if name.startswith(prefix) and not name.startswith(own)]:
        inner = name.removeprefix(prefix)
        of_table = [path for path, (_, tables) in parts.items() if any(_is_of(inner, table) for table in tables)]
        value = state.pop(name)
        for path in of_table or parts:  # what is of no table, such as a count of passes, each part has
            state[f"{prefix}{path}.{inner}"] = value


def _is_of(name: str, table: str) -> bool:
    # The latter are buffers of modules that prune rows.
    return f".{table}." in f".{name}." or f".{table}_itp_" in f".{name}"


class SlimEmbeddingBagCollection(SlimModule):
    """In place of an EmbeddingBagCollection, or of a module that processes or remaps ids and looks them up in one.

    It returns the keys, order and widths of the original. Kept columns are aligned to the original width by a transform matrix
    per table (Eq. 13). Features of dropped tables are zeros, and of dropped rotated ones their mean.

    Args:
        collection: the rebuilt module, over the kept tables; None if there are none.
        tables: the original's.
        output: what to return.
        is_weighted: whether the original pools with per-id weights.
        remaps: whether it returns (embeddings, remapped ids), as managed collision collections do.
    """

    def __init__(
        self, collection: nn.Module | None, tables: Tables, output: Output, is_weighted: bool, remaps: bool
    ) -> None:
        super().__init__(tables, output)
        self.collection = collection
        self.widening = PooledWidening(tables, output, is_weighted)
        self._is_weighted = is_weighted
        self._remaps = remaps

    def parts(self) -> Mapping[str, tuple[nn.Module, set[str]]]:
        names = set(self.tables.plans)
        return {"collection": (self.collection, names)} if self.collection is not None else {}

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """Tables as they look from outside: models ask for the widths of what is returned."""
        return self.configs_returned()

    def is_weighted(self) -> bool:
        """Whether ids come with weights."""
        return self._is_weighted

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor | tuple[KeyedTensor, KeyedJaggedTensor | None]:
        """KJT over at least the kept and the rotated features -> KeyedTensor [B, Σ original D], keys in the original order."""
        found = self.collection(features) if self.collection is not None else None
        if not self._remaps:
            return self.widening(found, features)
        embeddings, remapped = (found[0], found[1]) if found is not None else (None, None)
        return self.widening(embeddings, features), remapped


class SlimEmbeddingCollection(SlimModule):
    """In place of an EmbeddingCollection, which has one width for all its tables: one of them for every width that is left.

    Args:
        collections: stored width -> the rebuilt module, over the kept tables of that width.
        tables: the original's.
        output: what to return.
        need_indices: whether the original returns ids beside embeddings.
        remaps: whether it returns (embeddings, remapped ids), as managed collision collections do.
    """

    def __init__(
        self, collections: Mapping[int, nn.Module], tables: Tables, output: Output, need_indices: bool, remaps: bool
    ) -> None:
        super().__init__(tables, output)
        self.collections = nn.ModuleDict({str(width): collection for width, collection in collections.items()})
        self.widening = SequenceWidening(tables, output, need_indices)
        self._need_indices = need_indices
        self._remaps = remaps
        self.joined = _Joined()

    def parts(self) -> Mapping[str, tuple[nn.Module, set[str]]]:
        plans = self.tables.plans.items()
        return {
            f"collections.{width}": (own, {name for name, plan in plans if plan.stored_dim == int(width)})
            for width, own in self.collections.items()
        }

    def embedding_configs(self) -> list[EmbeddingBagConfig]:
        """Tables as they look from outside."""
        return self.configs_returned()

    def embedding_dim(self) -> int:
        """Width of what is returned; if it is raw, of the original."""
        return self.output.aligned_dim or self.tables.configs[0].embedding_dim

    def need_indices(self) -> bool:
        """Whether ids are returned beside embeddings."""
        return self._need_indices

    def forward(
        self, features: KeyedJaggedTensor
    ) -> dict[str, JaggedTensor] | tuple[dict[str, JaggedTensor], KeyedJaggedTensor | None]:
        """KJT over at least the features of all tables -> key -> JaggedTensor [ids, original D]."""
        found = {width: collection(features) for width, collection in self.collections.items()}
        if not self._remaps:
            return self.widening(found, features)
        embeddings = {width: one[0] for width, one in found.items()}
        return self.widening(embeddings, features), self.joined([one[1] for one in found.values()])


class _Joined(nn.Module):
    """Remapped ids of several collections -> of all; a module since TorchRec's pipelines cannot trace it."""

    def forward(self, remapped: list[Any]) -> KeyedJaggedTensor | None:
        parts = [part.wait() if isinstance(part, Awaitable) else part for part in remapped]
        return KeyedJaggedTensor.concat(parts) if parts and parts[0] is not None else None
