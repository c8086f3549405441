"""Rotations drawn at random, and what they make of a table, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from sseds_rec.search.rotation import Rotation


def draw_rotation(d: int, seed: int) -> Rotation:
    """T no more orthogonal than stretching by 0.5 to 2 leaves it, M its inverse transposed, and any mean."""
    random = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(d, d, generator=random, dtype=torch.float64)).Q for _ in range(2))
    forward = left @ torch.diag(torch.linspace(0.5, 2, d, dtype=torch.float64)) @ right
    return Rotation(forward, torch.linalg.inv(forward).T, torch.randn(d, generator=random, dtype=torch.float64))


def project(table: Tensor, rotation: Rotation) -> Tensor:
    """Rows v -> M Tᵀ(v - μ) + μ, which pool to the projection of what v pools to."""
    return (table.double() - rotation.mean) @ rotation.forward @ rotation.inverse.T + rotation.mean
