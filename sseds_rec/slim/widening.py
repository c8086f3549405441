"""After the lookup: kept columns -> what the original collection returned.

These are modules of their own since TorchRec's pipelines trace everything else around sharded tables.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed.types import Awaitable
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor
from torchrec.sparse.tensor_dict import maybe_td_to_kjt

from sseds_rec.distributed.tables import collection_of, is_sequence
from sseds_rec.search.plan import TablePlan
from sseds_rec.search.rotation import Rotation
from sseds_rec.slim.alignment import Alignment, Init
from sseds_rec.slim.mass import MassColumns


@dataclass(frozen=True)
class Tables:
    """The tables of one collection, and what the plan makes of them.

    Attributes:
        configs: the original tables.
        plans: original table name -> its plan.
        rotations: original table name -> its rotation, of those that are rotated.
        order: keys in the order in which the original returns them, if it is not that of its tables: a sharded
            EmbeddingBagCollection orders them by its sharding plan.
    """

    configs: list[EmbeddingBagConfig]
    plans: Mapping[str, TablePlan]
    rotations: Mapping[str, Rotation]
    order: Sequence[str] = ()

    def outputs(self) -> dict[str, tuple[EmbeddingBagConfig, str]]:
        """Key -> table and feature, of everything that the original returns, in its order."""
        names = get_embedding_names_by_table(self.configs)
        found = {
            key: (config, feature)
            for config, keys in zip(self.configs, names, strict=True)
            for key, feature in zip(keys, config.feature_names, strict=True)
        }
        return {key: found[key] for key in self.order} if self.order else found

    def renamed(self, tables: Collection[str]) -> dict[str, str]:
        """Key in a collection of some of the tables -> key here.

        A feature's key names its table where several tables have it, and only one of those may be left.
        """
        own = get_embedding_names_by_table([config for config in self.configs if config.name in tables])
        here = zip(self.configs, get_embedding_names_by_table(self.configs), strict=True)
        names = [keys for config, keys in here if config.name in tables]
        return {key: name for keys, same in zip(own, names, strict=True) for key, name in zip(keys, same, strict=True)}


@dataclass(frozen=True)
class Output:
    """What a slim collection returns.

    Attributes:
        init: how transform matrices begin, see `Alignment.start`.
        aligned_dim: width of every key; None for the original ones.
        raw: return the kept columns as they are, and dropped keys not at all.
    """

    init: Init = "select"
    aligned_dim: int | None = None
    raw: bool = False


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Table -> weight, of an unsharded embedding module."""
    collection: Any = collection_of(module)
    found = collection.embeddings if is_sequence(module) else collection.embedding_bags
    return {name: table.weight for name, table in found.items()}


class PooledWidening(nn.Module):
    """Embeddings of bags: KeyedTensor of kept keys -> KeyedTensor of all keys [B, Σ D], or raw, of kept ones [B, Σ d_i].

    Features of dropped tables are zeros, and of dropped rotated ones their mean.
    """

    def __init__(self, tables: Tables, output: Output, is_weighted: bool) -> None:
        super().__init__()
        outputs, plans, rotations = tables.outputs(), tables.plans, tables.rotations
        self.names = tables.renamed([name for name, own in plans.items() if own.kept])
        self.original = {key: output.aligned_dim or config.embedding_dim for key, (config, _) in outputs.items()}
        # Aligned per original width, since tables of one collection may differ in it.
        order = list(outputs) if output.raw else sorted(outputs, key=self.original.__getitem__)
        rotated = {key: table for key, (table, _) in outputs.items() if table.name in rotations}
        self.masses = MassColumns(
            {key: plans[outputs[key][0].name].embedding_dim for key in order},
            {key: outputs[key][1] for key in rotated},
            {key: rotations[table.name].mean_length for key, table in rotated.items()},
            [key for key, (table, _) in outputs.items() if getattr(table, "pooling", None) == PoolingType.MEAN],
            is_weighted,
        )
        dims = self.masses.dims
        self.keys = {} if output.raw else {d: list(own) for d, own in groupby(dims, key=self.original.__getitem__)}
        self.sizes = [sum(dims[key] for key in keys) for keys in self.keys.values()]
        self.alignments = nn.ModuleDict()
        for width, keys in self.keys.items():
            alignment = Alignment({k: dims[k] for k in keys}, width, {k: outputs[k][0].name for k in keys})
            alignment.start(output.init, {name: own.kept for name, own in plans.items()}, rotations)
            self.alignments[str(width)] = alignment
        self.raw = output.raw

    def transforms(self) -> dict[str, Tensor]:
        """Table -> M [D, d_i], or [D, d_i + 1] of rotated ones, of the tables that have one."""
        found: dict[str, Tensor] = {}
        for alignment in self.alignments.values():
            assert isinstance(alignment, Alignment)
            found |= alignment.transforms.items()
        return found

    def forward(self, embeddings: KeyedTensor | None, features: KeyedJaggedTensor) -> KeyedTensor:
        """Embeddings over at least the kept tables, None if there are none; ids of at least the rotated ones."""
        if not self.masses.dims:
            ids = maybe_td_to_kjt(features, None)
            width = 0 if self.raw else sum(self.original.values())
            zeros = torch.zeros(ids.stride(), width, device=ids.lengths().device)
            keys = [] if self.raw else list(self.original)
            return KeyedTensor(keys, [self.original[key] for key in keys], zeros)
        if embeddings is not None:
            names = list(map(self.names.__getitem__, embeddings.keys()))
            embeddings = KeyedTensor(names, embeddings.length_per_key(), embeddings.values())
        kept = self.masses(embeddings, features)
        if self.raw:
            return kept
        columns = kept.values() if embeddings is None else kept.values().to(embeddings.values().dtype)
        aligned: dict[str, Tensor] = {}
        groups = zip(self.keys.values(), self.alignments.values(), kept.values().split(self.sizes, dim=1), strict=True)
        for keys, alignment, group in groups:
            own = alignment(group.to(alignment.dtype)).to(columns.dtype)  # kernels may give float16
            aligned |= zip(keys, own.unbind(1), strict=True)
        values = [
            aligned[key] if key in aligned else columns.new_zeros(columns.shape[0], d)
            for key, d in self.original.items()
        ]
        return KeyedTensor.from_tensor_list(list(self.original), values)


class SequenceWidening(nn.Module):
    """Embeddings per id: key -> JaggedTensor [ids, d_i] of kept keys -> [ids, D] of all keys, or raw, of kept ones.

    Features of dropped tables are zeros.
    """

    def __init__(self, tables: Tables, output: Output, need_indices: bool) -> None:
        super().__init__()
        outputs, plans = tables.outputs(), tables.plans
        widths = {own.stored_dim for own in plans.values() if own.kept}
        of_width = {width: [name for name, own in plans.items() if own.stored_dim == width] for width in widths}
        self.names = {str(width): tables.renamed(own) for width, own in of_width.items()}
        self.tables = {key: config.name for key, (config, _) in outputs.items()}
        self.features = {key: feature for key, (_, feature) in outputs.items()}
        self.dims = {key: plans[name].embedding_dim for key, name in self.tables.items()}
        self.width = output.aligned_dim or tables.configs[0].embedding_dim
        self.raw, self.need_indices = output.raw, need_indices
        kept = {key: d for key, d in self.dims.items() if d}
        self.alignment = None
        if kept and not output.raw:
            self.alignment = Alignment(kept, self.width, {key: self.tables[key] for key in kept})
            self.alignment.start(output.init, {name: own.kept for name, own in plans.items()}, {})

    def transforms(self) -> dict[str, Tensor]:
        """Table -> M [D, d_i], of the tables that have one."""
        return dict(self.alignment.transforms.items()) if self.alignment is not None else {}

    def forward(self, found: Mapping[str, Any], features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """Stored width -> what the collection of its tables returns, and the ids of at least the dropped tables."""
        embeddings: dict[str, JaggedTensor] = {}
        for width, own in found.items():
            looked_up = own.wait() if isinstance(own, Awaitable) else own
            embeddings |= {self.names[width][key]: value for key, value in looked_up.items()}
        features = maybe_td_to_kjt(features, None)
        result = {}
        for key, d in self.dims.items():
            if d:
                own = embeddings[key]
                values = own.values()[:, :d]
                if self.alignment is not None:
                    transform = self.alignment.transforms[self.tables[key]]
                    values = (values.to(transform.dtype) @ transform.T).to(values.dtype)  # kernels may give float16
            elif self.raw:
                continue
            else:
                own = features[self.features[key]]
                values = torch.zeros(len(own.values()), self.width, device=own.values().device)
            ids = own.weights_or_none() if d else own.values()
            result[key] = JaggedTensor(values, ids if self.need_indices else None, own.lengths(), own.offsets_or_none())
        return result
