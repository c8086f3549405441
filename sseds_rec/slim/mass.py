"""The mass of every bag: what the mean of a rotated table is multiplied by."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor
from torchrec.sparse.tensor_dict import maybe_td_to_kjt

from sseds_rec.slim.alignment import columns_of


class MassColumns(nn.Module):
    """Pooled embeddings -> the same, with mass·|μ| of its bag beside each embedding of a rotated table.

    So e = M t + mass·μ is the product of `Rotation.with_mean` and what is returned, a bag that is empty or weighted is as exact
    as any other, and a rotated table that is dropped still counts with its mean.

    It is a module of its own since TorchRec's pipelines trace everything else around sharded tables.

    Args:
        dims: key -> d_i, the columns its embeddings have (of those stored, the first); 0 if the table is dropped.
        features: key -> feature of the ids, for the keys of rotated tables.
        mean_lengths: key -> |μ| of its rotation, for the same keys.
        averaged: keys of tables that pool by the mean.
        is_weighted: whether ids are pooled with weights.
    """

    def __init__(
        self,
        dims: Mapping[str, int],
        features: Mapping[str, str],
        mean_lengths: Mapping[str, float],
        averaged: Collection[str],
        is_weighted: bool,
    ) -> None:
        super().__init__()
        self.kept = {key: d for key, d in dims.items() if d}
        self.features = dict(features)
        self.mean_lengths = dict(mean_lengths)
        self.averaged = set(averaged)
        self.is_weighted = is_weighted
        #: key -> columns of what is returned, in the order of `dims`.
        self.dims = {key: d + (key in features) for key, d in dims.items() if d or key in features}

    def forward(self, embeddings: KeyedTensor | None, ids: KeyedJaggedTensor) -> KeyedTensor:
        """Embeddings of at least the kept tables, if there are any, and ids of at least the rotated ones -> [B, Σ dims]."""
        columns = columns_of(embeddings, self.kept) if self.kept else {}
        masses = self._masses(maybe_td_to_kjt(ids, None)) if self.features else {}
        parts = [part for key in self.dims for part in (columns.get(key), masses.get(key)) if part is not None]
        return KeyedTensor(list(self.dims), list(self.dims.values()), torch.cat(parts, dim=1))

    def _masses(self, ids: KeyedJaggedTensor) -> dict[str, Tensor]:
        """Key -> what |μ| in every row of its table would be pooled to [B, 1]."""
        names, lengths = ids.keys(), ids.lengths()
        # Not its "safe" form, which waits for the device to check the lengths.
        reduce = partial(torch.segment_reduce, reduce="sum", lengths=lengths, unsafe=True)
        sums = reduce(ids.weights()) if self.is_weighted else lengths.float()
        own_sums, own_lengths = sums.split(ids.stride_per_key()), lengths.split(ids.stride_per_key())
        masses = {}
        for key, feature in self.features.items():
            i = names.index(feature)
            mass = own_sums[i] / own_lengths[i].clamp(min=1) if key in self.averaged else own_sums[i]
            if ids.variable_stride_per_key():  # rows that repeat are looked up once
                keys, inverse = ids.inverse_indices()
                mass = mass[inverse[keys.index(feature)]]
            masses[key] = mass[:, None] * self.mean_lengths[key]
        return masses
