"""The transform matrices: embeddings of different widths, brought to one (Eq. 13)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Init = Literal["random", "select"]


class Alignment(nn.Module):
    """ē_i = M_i e_i with M_i ∈ R^{A x d_i} and no bias, for F features of any widths.

    Features of one width are multiplied together in one batched product. A table that serves several features has one M_i.

    Args:
        dims: feature -> d_i, in the order of the input's columns.
        aligned_dim: A, the common width.
        tables: feature -> table, for tables that serve several features; by default each feature has its own.
    """

    def __init__(self, dims: Mapping[str, int], aligned_dim: int, tables: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.dims = list(dims.values())
        self.aligned_dim = aligned_dim
        self.tables = [tables[feature] if tables else feature for feature in dims]
        widths = dict(zip(self.tables, self.dims, strict=True))
        self.transforms = nn.ParameterDict(
            {table: nn.Parameter(torch.empty(aligned_dim, d)) for table, d in widths.items()}
        )
        self.groups = {d: [i for i, own in enumerate(self.dims) if own == d] for d in sorted(set(self.dims))}
        order = [i for members in self.groups.values() for i in members]
        self.position: Tensor
        self.register_buffer("position", torch.tensor(order).argsort(), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The paper's random start. Orthogonal columns keep each embedding's length, whatever its width."""
        for transform in self.transforms.values():
            nn.init.orthogonal_(transform)

    @torch.no_grad()
    def select(self, kept: Mapping[str, Sequence[int]]) -> None:
        """Sets M_i to the rows of the identity that put kept column j back to where it was: ē_i is e_i, masked.

        Args:
            kept: table -> column indices in the original table, whose width is `aligned_dim`.
        """
        for table, transform in self.transforms.items():
            transform.zero_()
            transform[list(kept[table]), torch.arange(transform.shape[1])] = 1.0

    def forward(self, embeddings: Tensor) -> Tensor:
        """Concatenated embeddings [B, Σd_i] -> aligned [B, F, A]."""
        columns = embeddings.split(self.dims, dim=1)
        aligned = []
        for members in self.groups.values():
            stacked = torch.stack([columns[i] for i in members])  # [G, B, d]
            transforms = torch.stack([self.transforms[self.tables[i]] for i in members])  # [G, A, d]
            aligned.append(torch.bmm(stacked, transforms.transpose(1, 2)))  # [G, B, A]
        if len(aligned) == 1:
            return aligned[0].transpose(0, 1)
        return torch.cat(aligned).index_select(0, self.position).transpose(0, 1)
