"""Layers that several models share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


def mlp(in_features: int, hidden: Sequence[int], dropout: float, batch_norm: bool) -> nn.Sequential:
    """Linear (-> batch norm) -> ReLU (-> dropout) per hidden layer; [B, in_features] -> [B, hidden[-1]]."""
    layers: list[nn.Module] = []
    for width in hidden:
        layers.append(nn.Linear(in_features, width))
        if batch_norm:
            layers.append(nn.BatchNorm1d(width))
        layers.append(nn.ReLU())
        if dropout:
            layers.append(nn.Dropout(dropout))
        in_features = width
    return nn.Sequential(*layers)


def fm_interaction(embeddings: Tensor) -> Tensor:
    """Σ_{i<j} <e_i, e_j> of [B, F, D] -> [B], in O(F·D) (Rendle, Factorization Machines, 2010, Lemma 3.1)."""
    flat = embeddings.flatten(1)
    square_of_sum = embeddings.sum(dim=1).square().sum(dim=1)
    return 0.5 * (square_of_sum - (flat * flat).sum(dim=1))
