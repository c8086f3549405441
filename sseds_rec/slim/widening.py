"""After the lookup: kept columns -> what the original collection returned.

These are modules of their own since TorchRec's pipelines trace everything else around sharded tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed.types import Awaitable
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

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
    """

    configs: list[EmbeddingBagConfig]
    plans: Mapping[str, TablePlan]
    rotations: Mapping[str, Rotation]

    def outputs(self) -> dict[str, tuple[EmbeddingBagConfig, str]]:
        """Key -> table and feature, of everything that the original returns, in its order."""
        names = get_embedding_names_by_table(self.configs)
        return {
            key: (config, feature)
            for config, keys in zip(self.configs, names, strict=True)
            for key, feature in zip(keys, config.feature_names, strict=True)
        }


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
            rows, device = features.stride(), features.lengths().device
            zeros = torch.zeros(rows, 0 if self.raw else sum(self.original.values()), device=device)
            keys = [] if self.raw else list(self.original)
            return KeyedTensor(keys, [self.original[key] for key in keys], zeros)
        kept = self.masses(embeddings, features)
        if self.raw:
            return kept
        columns = kept.values()
        aligned: dict[str, Tensor] = {}
        groups = zip(self.keys.values(), self.alignments.values(), columns.split(self.sizes, dim=1), strict=True)
        for keys, alignment, group in groups:
            aligned |= zip(keys, alignment(group).unbind(1), strict=True)
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
        outputs = tables.outputs()
        self.tables = {key: config.name for key, (config, _) in outputs.items()}
        self.features = {key: feature for key, (_, feature) in outputs.items()}
        self.dims = {key: tables.plans[name].embedding_dim for key, name in self.tables.items()}
        self.width = output.aligned_dim or tables.configs[0].embedding_dim
        self.raw, self.need_indices = output.raw, need_indices
        kept = {key: d for key, d in self.dims.items() if d}
        self.alignment = None
        if kept and not output.raw:
            self.alignment = Alignment(kept, self.width, {key: self.tables[key] for key in kept})
            self.alignment.start(output.init, {name: own.kept for name, own in tables.plans.items()}, {})

    def transforms(self) -> dict[str, Tensor]:
        """Table -> M [D, d_i], of the tables that have one."""
        return dict(self.alignment.transforms.items()) if self.alignment is not None else {}

    def forward(self, found: list[Any], features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """What the collections of one width each return, and the ids of at least the dropped tables."""
        embeddings: dict[str, JaggedTensor] = {}
        for own in found:
            embeddings |= own.wait() if isinstance(own, Awaitable) else own
        result = {}
        for key, d in self.dims.items():
            if d:
                own = embeddings[key]
                values = own.values()[:, :d]
                if self.alignment is not None:
                    values = values @ self.alignment.transforms[self.tables[key]].T
            elif self.raw:
                continue
            else:
                own = features[self.features[key]]
                values = torch.zeros(len(own.values()), self.width, device=own.values().device)
            ids = own.weights_or_none() if d else own.values()
            result[key] = JaggedTensor(values, ids if self.need_indices else None, own.lengths(), own.offsets_or_none())
        return result
