"""The transform matrices: embeddings of different widths, brought to one (Eq. 13)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchrec.sparse.jagged_tensor import KeyedTensor

from sseds_rec.search.rotation import Rotation

Init = Literal["random", "select"]


def columns_of(embeddings: KeyedTensor, dims: Mapping[str, int]) -> dict[str, Tensor]:
    """The first d_i columns [B, d_i] of the keys in `dims`, in its order.

    All keys are split off at once: in backward, every slice of its own would be a [B, ΣD] of zeros with a few columns filled.
    """
    columns = embeddings.to_dict()
    return {key: columns[key] if columns[key].shape[1] == d else columns[key][:, :d] for key, d in dims.items()}


class Alignment(nn.Module):
    """ē_i = M_i e_i with M_i ∈ R^{A x d_i} and no bias, for F features of any widths.

    A table that serves several features has one M_i. The embeddings of a rotated table have their mass as last column
    (`MassColumns`), and M_i has its bias there.

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
        self.reset_parameters()

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrices, and so of what they take."""
        return next(self.parameters()).dtype

    def reset_parameters(self) -> None:
        """The paper's random start. Orthogonal columns keep each embedding's length, whatever its width."""
        for transform in self.transforms.values():
            nn.init.orthogonal_(transform)

    @torch.no_grad()
    def start(self, init: Init, kept: Mapping[str, Sequence[int]], rotations: Mapping[str, Rotation]) -> None:
        """Sets every M_i as a slim model begins.

        Args:
            init: "select" puts kept column j back to where it was, by rows of the identity, so that ē_i is e_i, masked; and
                turns coordinates back, so that ē_i is e_i, projected. The original width is then `aligned_dim`. "random" is
                the paper's start, but for the mean of rotated tables, which stays where ē_i has the original width, and
                is zero in any other.
            kept: table -> column indices in the original table.
            rotations: table -> rotation, of those that are rotated.
        """
        for table, transform in self.transforms.items():
            rotation = rotations.get(table)
            if init == "select" and rotation is not None:
                transform.copy_(rotation.with_mean())
            elif init == "select":
                transform.zero_()
                transform[list(kept[table]), torch.arange(transform.shape[1])] = 1.0
            elif rotation is not None:
                nn.init.orthogonal_(transform[:, :-1])
                own = len(rotation.mean) == self.aligned_dim
                transform[:, -1] = rotation.with_mean()[:, -1] if own else 0.0

    def forward(self, embeddings: Tensor) -> Tensor:
        """Concatenated embeddings [B, Σd_i] -> aligned [B, F, A]."""
        aligned: Tensor = _Align.apply(embeddings, *self._per_feature())
        return aligned

    def fm(self, embeddings: Tensor, first_order: Tensor) -> Tensor:
        """<w, e> + Σ_{i<j} <ē_i, ē_j> of concatenated embeddings e [B, Σd_i] and first-order weights w [Σd_i] -> [B].

        No aligned embeddings [B, F, A] are made: of ½(||Σ_i ē_i||² - Σ_i ||ē_i||²) (Rendle, Factorization Machines, 2010,
        Lemma 3.1) the sum is one product [M_1 ... M_F] e, and ||ē_i||² = e_iᵀ (M_iᵀ M_i) e_i needs its d_i columns only.
        """
        interaction: Tensor = _AlignedFM.apply(embeddings, first_order, *self._per_feature())
        return interaction

    def _per_feature(self) -> list[Tensor]:
        return [self.transforms[table] for table in self.tables]


class _Align(torch.autograd.Function):
    """Every product reads its feature's columns, and writes its slice of the result, where they are.

    Stacking features of one width, or padding all to the widest, for batched products copies [B, F, A] once or twice more:
    that is what takes the time (`benchmarks/slim.md`).
    """

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, *transforms: Tensor) -> Tensor:
        ctx.save_for_backward(embeddings, *transforms)
        aligned = embeddings.new_empty(embeddings.shape[0], len(transforms), transforms[0].shape[0])
        columns = embeddings.split([transform.shape[1] for transform in transforms], dim=1)
        for i, (column, transform) in enumerate(zip(columns, transforms, strict=True)):
            torch.mm(column, transform.T, out=aligned[:, i])
        return aligned

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        embeddings, *transforms = ctx.saved_tensors
        dims = [transform.shape[1] for transform in transforms]
        of_embeddings = torch.empty_like(embeddings)
        columns, of_columns = embeddings.split(dims, dim=1), of_embeddings.split(dims, dim=1)
        of_transforms = []
        for i, transform in enumerate(transforms):
            torch.mm(gradient[:, i], transform, out=of_columns[i])
            of_transforms.append(gradient[:, i].T @ columns[i])
        return of_embeddings, *of_transforms


class _AlignedFM(torch.autograd.Function):
    """z = <w, e> + ½(||t||² - Σ_i e_iᵀ G_i e_i) with t = Σ_i M_i e_i and G_i = M_iᵀ M_i, and its gradients

    ∂z/∂e_i = w_i + M_iᵀ t - G_i e_i and ∂z/∂M_i = t e_iᵀ - M_i e_i e_iᵀ: products over all columns for t, over a feature's own
    for G_i.
    """

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, first_order: Tensor, *transforms: Tensor) -> Tensor:
        total = embeddings @ torch.cat(transforms, dim=1).T  # [B, A]
        own = torch.empty_like(embeddings)  # G_i e_i, side by side
        dims = [transform.shape[1] for transform in transforms]
        for column, target, transform in zip(embeddings.split(dims, 1), own.split(dims, 1), transforms, strict=True):
            torch.mm(column, transform.T @ transform, out=target)
        ctx.save_for_backward(embeddings, first_order, total, own, *transforms)
        return embeddings @ first_order + 0.5 * (total.square().sum(dim=1) - torch.linalg.vecdot(embeddings, own))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        embeddings, first_order, total, own, *transforms = ctx.saved_tensors
        weights = torch.cat(transforms, dim=1)
        weighted = gradient[:, None] * embeddings
        of_embeddings = torch.addmm(own, total, weights, beta=-1).add_(first_order).mul_(gradient[:, None])
        dims = [transform.shape[1] for transform in transforms]
        of_transforms = (total.T @ weighted).split(dims, dim=1)
        columns, weighted_columns = embeddings.split(dims, dim=1), weighted.split(dims, dim=1)
        for i, transform in enumerate(transforms):
            of_transforms[i].addmm_(transform, columns[i].T @ weighted_columns[i], alpha=-1)
        return of_embeddings, weighted.sum(dim=0), *of_transforms
