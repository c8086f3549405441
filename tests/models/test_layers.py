"""Layers whose gradients are written by hand, against autograd on their sums."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sseds_rec.models.layers import pair_dots


def _plain(vectors: Tensor) -> Tensor:
    return torch.stack([(a * b).sum(dim=1) for a, b in itertools.combinations(vectors.unbind(1), 2)], dim=1)


@pytest.mark.parametrize("shape", [(5, 4, 3), (5, 2, 8), (1, 7, 4), (0, 3, 4)])
def test_pair_dots_and_their_gradient(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    vectors = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(shape[0], shape[1] * (shape[1] - 1) // 2, dtype=torch.float64)
    torch.testing.assert_close(pair_dots(vectors), _plain(vectors))
    torch.testing.assert_close(
        torch.autograd.grad((pair_dots(vectors) * weights).sum(), vectors),
        torch.autograd.grad((_plain(vectors) * weights).sum(), vectors),
    )


def test_pair_dots_under_autocast() -> None:
    torch.manual_seed(0)
    vectors = torch.randn(6, 5, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        dots = pair_dots(vectors)
    assert dots.dtype == torch.bfloat16
    (gradient,) = torch.autograd.grad(dots.float().sum(), vectors)
    (expected,) = torch.autograd.grad(_plain(vectors).sum(), vectors)
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, expected, rtol=0.02, atol=0.1)
