"""The embedding side that every model sees: fields of any widths, raw and aligned."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedTensor

from sseds_rec.slim.alignment import Alignment


class FieldEmbeddings(nn.Module):
    """A KeyedTensor of F fields -> their raw concatenation [B, Σd_i] and the aligned embeddings [B, F, A].

    Uniform fields need no alignment: the aligned embeddings are then a view of the raw ones. Slim fields go through
    transform matrices (Eq. 13).

    Args:
        dims: field -> d_i, in the order the models concatenate them. A table that is stored wider than d_i (see
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

    def forward(self, embeddings: KeyedTensor) -> tuple[Tensor, Tensor]:
        widths = dict(zip(embeddings.keys(), embeddings.length_per_key(), strict=True))
        if list(widths.items()) == list(self.dims.items()):
            raw = embeddings.values()
        else:  # a sharded collection orders its keys by the plan
            raw = torch.cat([embeddings[name][:, :dim] for name, dim in self.dims.items()], dim=1)
        if self.alignment is not None:
            return raw, self.alignment(raw)
        return raw, raw.unflatten(1, (len(self.dims), self.aligned_dim))
