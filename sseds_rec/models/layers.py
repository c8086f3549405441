"""Layers that several models share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def mlp(in_features: int, hidden: Sequence[int], dropout: float, batch_norm: bool) -> nn.Sequential:
    """Linear (-> batch norm) -> ReLU (-> dropout) per hidden layer; [B, in_features] -> [B, hidden[-1]]."""
    layers: list[nn.Module] = []
    for width in hidden:
        layers.append(nn.Linear(in_features, width))
        if batch_norm:
            layers.append(nn.BatchNorm1d(width))
        layers.append(nn.ReLU(inplace=True))
        if dropout:
            layers.append(nn.Dropout(dropout))
        in_features = width
    return nn.Sequential(*layers)


def join(dense: Tensor, raw: Tensor) -> Tensor:
    """[dense inputs, raw concatenation], [B, N] and [B, Σd_i] -> [B, N + Σd_i]; no copy when N = 0."""
    return torch.cat([dense, raw], dim=1) if dense.shape[1] else raw


def fm(embeddings: Tensor, first_order: Tensor) -> Tensor:
    """<w, e> + Σ_{i<j} <e_i, e_j> of embeddings e [B, F, D] and first-order weights w [F·D] -> [B].

    In O(F·D) (Rendle, Factorization Machines, 2010, Lemma 3.1).
    """
    interaction: Tensor = _FM.apply(embeddings, first_order)
    return interaction


class _FM(torch.autograd.Function):
    """<w, e> + ½(||Σ_i e_i||² - Σ_i ||e_i||²), whose gradient w + Σ_j e_j - e_i is the only [B, F, D] that is made."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, first_order: Tensor) -> Tensor:
        total = embeddings.sum(dim=1)
        ctx.save_for_backward(embeddings, first_order, total)
        squares = torch.linalg.vector_norm(embeddings, dim=(1, 2)).square()
        return embeddings.flatten(1) @ first_order + 0.5 * (total.square().sum(dim=1) - squares)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        embeddings, first_order, total = ctx.saved_tensors
        per_field = gradient[:, None, None]
        of_embeddings = torch.addcmul(per_field * total[:, None], per_field, embeddings, value=-1)
        of_embeddings.view(-1, len(first_order)).addr_(gradient, first_order)  # in place: a view or an error
        return of_embeddings, embeddings.flatten(1).T @ gradient


def pair_dots(vectors: Tensor) -> Tensor:
    """<v_i, v_j> of all pairs i < j, row by row: [B, V, D] -> [B, V(V-1)/2]."""
    dots: Tensor = _PairDots.apply(vectors)
    return dots


class _PairDots(torch.autograd.Function):
    """The pairs above the diagonal of V Vᵀ, whose gradient (G + Gᵀ) V takes one batched product; autograd makes it two."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor) -> Tensor:
        i, j = torch.triu_indices(vectors.shape[1], vectors.shape[1], offset=1, device=vectors.device)
        ctx.save_for_backward(vectors, i, j)
        return torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1).index_select(1, i * vectors.shape[1] + j)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        vectors, i, j = ctx.saved_tensors
        symmetric = gradient.new_zeros(len(vectors), vectors.shape[1], vectors.shape[1])
        symmetric[:, i, j] = gradient
        symmetric[:, j, i] = gradient
        return torch.bmm(symmetric, vectors.to(symmetric.dtype))  # which differ under autocast
