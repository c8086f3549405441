"""Layers whose gradients are written by hand, against autograd on their sums or finite differences of them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sseds_rec.models.layers import fm, pair_dots
from sseds_rec.slim.alignment import Alignment

#: Field -> width; `second` shares the table of `first`.
DIMS = {"first": 3, "one": 1, "wide": 6, "second": 3, "four": 4}
TABLES = {field: "first" if field == "second" else field for field in DIMS}


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


@pytest.mark.parametrize("shape", [(5, 4, 3), (5, 2, 8), (4, 3, 1), (1, 1, 4), (0, 3, 4)])
def test_fm_and_its_gradients(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    embeddings = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    first_order = torch.randn(shape[1] * shape[2], dtype=torch.float64, requires_grad=True)
    expected = (embeddings.flatten(1) * first_order).sum(dim=1)
    if shape[1] > 1:
        expected = expected + _plain(embeddings).sum(dim=1)
    torch.testing.assert_close(fm(embeddings, first_order), expected)
    assert torch.autograd.gradcheck(fm, (embeddings, first_order))


def _aligned(raw: Tensor, alignment: Alignment) -> Tensor:
    columns = raw.split(list(DIMS.values()), dim=1)
    transforms = [alignment.transforms[TABLES[field]] for field in DIMS]
    return torch.stack([column @ transform.T for column, transform in zip(columns, transforms, strict=True)], dim=1)


@pytest.mark.parametrize("count", [5, 1])
def test_alignment_and_its_fm_and_their_gradients(count: int) -> None:
    torch.manual_seed(0)
    alignment = Alignment(DIMS, 6, TABLES).double()
    raw = torch.randn(count, sum(DIMS.values()), dtype=torch.float64, requires_grad=True)
    first_order = torch.randn(raw.shape[1], dtype=torch.float64, requires_grad=True)
    aligned = _aligned(raw, alignment)
    torch.testing.assert_close(alignment(raw), aligned)
    torch.testing.assert_close(alignment.fm(raw, first_order), raw @ first_order + _plain(aligned).sum(dim=1))
    transforms = list(alignment.parameters())  # gradcheck moves them in place, so that the module sees it
    assert len(transforms) == len(DIMS) - 1
    assert torch.autograd.gradcheck(lambda raw, *_: alignment(raw), (raw, *transforms))
    assert torch.autograd.gradcheck(lambda raw, w, *_: alignment.fm(raw, w), (raw, first_order, *transforms))
