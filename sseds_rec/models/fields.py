"""The embedding side that every model sees: fields of any widths, raw and aligned."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchrec.sparse.jagged_tensor import KeyedTensor

from sseds_rec.models.layers import fm
from sseds_rec.slim.alignment import Alignment, columns_of


class FieldEmbeddings(nn.Module):
    """A KeyedTensor of F fields -> their raw concatenation [B, Σd_i] and the aligned embeddings [B, F, A].

    Uniform fields need no alignment: the aligned embeddings are then a view of the raw ones. Slim fields go through
    transform matrices (Eq. 13).

    Args:
        dims: field -> d_i, in the order the models concatenate them, a mass included. A table that is stored wider (see
            `DimensionPlan`, multiple=1) is cut to its first d_i columns.
        aligned_dim: A for slim fields; None for uniform ones.
        tables: field -> table, by whose name its transform matrix goes; the same if not given.
    """

    def __init__(
        self, dims: Mapping[str, int], aligned_dim: int | None = None, tables: Mapping[str, str] | None = None
    ) -> None:
        super().__init__()
        self.dims = dict(dims)
        self.names = list(self.dims)
        self.raw_dim = sum(self.dims.values())
        self.alignment = Alignment(self.dims, aligned_dim, tables) if aligned_dim is not None else None
        self.aligned_dim = aligned_dim if aligned_dim is not None else next(iter(self.dims.values()))

    def concatenate(self, embeddings: KeyedTensor) -> Tensor:
        """The raw embeddings of all fields, one beside the other: [B, Σd_i]."""
        widths = dict(zip(embeddings.keys(), embeddings.length_per_key(), strict=True))
        if list(widths.items()) == list(self.dims.items()):
            return embeddings.values()
        # A sharded collection orders its keys by the plan.
        if {*widths.values(), *self.dims.values()} == {self.aligned_dim}:
            # torch.compile makes a constant of it, and warns of caches.
            places_of = _places if torch.compiler.is_compiling() else _kept_places
            places = places_of(tuple(self.names), tuple(widths), embeddings.device())
            fields: Tensor = _Reorder.apply(self._per_field(embeddings.values()), places)
            return fields.flatten(1)
        return torch.cat(list(columns_of(embeddings, self.dims).values()), dim=1)

    def align(self, raw: Tensor) -> Tensor:
        """Raw concatenation [B, Σd_i] -> aligned embeddings [B, F, A]."""
        if self.alignment is not None:
            return self.alignment(raw)
        return self._per_field(raw)

    def fm(self, dense: Tensor, raw: Tensor, first_order: nn.Linear) -> Tensor:
        """The factorization machine b + <w, [dense, raw]> + Σ_{i<j} <ē_i, ē_j>, its pairs over aligned embeddings.

        Args:
            dense: [B, N]; dense inputs have a first order only.
            raw: concatenation [B, Σd_i].
            first_order: holds w [1, N + Σd_i] and b; taken in with the pairs, since every pass over the embeddings counts.

        Returns:
            [B], in float32 under autocast as well: the pairs are the small difference of two large sums.
        """
        with torch.autocast(raw.device.type, enabled=False):
            of_dense, of_raw = first_order.weight[0].split([dense.shape[1], self.raw_dim])
            pairs = self.alignment.fm(raw, of_raw) if self.alignment is not None else fm(self.align(raw), of_raw)
            return first_order.bias + dense @ of_dense + pairs

    def _per_field(self, raw: Tensor) -> Tensor:
        # Not `unflatten`: the search scores compiled models under a TorchFunctionMode, where it breaks their graphs.
        return raw.view(raw.shape[0], len(self.dims), self.aligned_dim)


class _Reorder(torch.autograd.Function):
    """Fields [B, F, D] in another order (see `_places`): one gather of whole rows, in half the time of a concatenation."""

    @staticmethod
    def forward(ctx: Any, fields: Tensor, places: Tensor) -> Tensor:
        ctx.places = places
        return fields.index_select(1, places[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.index_select(1, ctx.places[0]), None


def _places(names: tuple[str, ...], keys: tuple[str, ...], device: torch.device) -> Tensor:
    """Where each of the F keys goes among the names, and where each name comes from: [2, F]."""
    there = [names.index(key) for key in keys]
    back = [keys.index(name) for name in names]
    return torch.tensor([there, back], device=device)


_kept_places = cache(_places)  # on CUDA this is a copy to the device, which no step should wait for
