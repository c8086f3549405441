"""The rotated basis: what it promises of the loss, and that slim models keep the promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sseds_rec as sr
from sseds_rec.search.masks import keep_only
from sseds_rec.search.rotation import loss_basis
from sseds_rec.search.tap import tapped
from tests.search.reference import TABLES, ClickModel, make_batch, make_rows

ROWS = 120


def _matrices(dim: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    slopes, embeddings = (torch.randn(200, dim, dim, generator=generator).double()[:, 0] for _ in range(2))
    slopes = slopes * torch.logspace(0, -2, dim).double()
    embeddings = embeddings @ torch.randn(dim, dim, generator=generator).double()
    covariance = torch.cov(embeddings.T, correction=0)
    return slopes.T @ slopes / 200, covariance, embeddings.mean(dim=0)


def _lost(slopes: Tensor, covariance: Tensor, projection: Tensor) -> float:
    """tr(G Cov(e - P e))."""
    rest = torch.eye(len(slopes)).double() - projection
    return float((slopes @ rest @ covariance @ rest.T).trace())


def test_no_projection_of_the_same_rank_loses_less() -> None:
    slopes, covariance, mean = _matrices()
    basis = loss_basis(slopes, covariance, mean)
    assert basis is not None
    torch.testing.assert_close(basis.inverse @ basis.forward.T, torch.eye(6).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(basis.inverse.norm(dim=0), torch.ones(6).double())
    generator = torch.Generator().manual_seed(1)
    for rank in range(6):
        lost = _lost(slopes, covariance, basis.inverse[:, :rank] @ basis.forward[:, :rank].T)
        # Eckart and Young: the squared singular values of G^½ C^½ from the rank on, up to the damping of G.
        tail = torch.linalg.eigvals(slopes @ covariance).real.sort(descending=True).values[rank:].sum()
        assert lost == pytest.approx(float(tail), rel=1e-2, abs=1e-9)
        for _ in range(20):
            left, right = (torch.linalg.qr(torch.randn(6, rank, generator=generator).double())[0] for _ in range(2))
            other = left @ torch.linalg.pinv(right.T @ left) @ right.T if rank else torch.zeros(6, 6).double()
            assert lost <= _lost(slopes, covariance, other) + 1e-9


def test_scores_are_what_a_coordinate_costs() -> None:
    slopes, covariance, mean = _matrices()
    basis = loss_basis(slopes, covariance, mean)
    assert basis is not None
    own = (basis.inverse.T @ slopes @ basis.inverse).diagonal() * (
        basis.forward.T @ covariance @ basis.forward
    ).diagonal()
    spectrum = torch.linalg.eigvals(slopes @ covariance).real.sort(descending=True).values
    torch.testing.assert_close(own, spectrum, rtol=1e-2, atol=1e-6)


def test_a_table_without_influence_has_no_basis() -> None:
    _, covariance, mean = _matrices()
    assert loss_basis(torch.zeros(6, 6).double(), covariance, mean) is None


@pytest.fixture
def model() -> ClickModel:
    torch.manual_seed(3)
    return ClickModel().eval()


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(make_batch(make_rows(ROWS, seed=5), 0, ROWS))[1]


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_slim_models_equal_the_projected_one(model: ClickModel, share: float) -> None:
    batches = [make_batch(make_rows(ROWS, seed=5), first, first + 40) for first in (0, 40, 80)]
    scores = sr.score_dimensions(model, batches, "ggn_rotated")
    plan = sr.allocate(scores, sr.Budget(dims=share))
    assert set(plan.rotations) == set(TABLES)
    with tapped(model) as taps:
        taps.edits |= {name: keep_only(plan, name) for name in TABLES}
        projected = _logits(model)
    slim = _logits(sr.slim(model, plan))
    torch.testing.assert_close(slim, projected, rtol=0, atol=1e-6)
    change = float((slim - _logits(model)).abs().max())
    assert change < 1e-6 if share == 1.0 else change > 1e-4  # nothing cut, nothing changed


def test_cutting_in_the_basis_costs_less_than_cutting_columns(model: ClickModel) -> None:
    batches = [make_batch(make_rows(ROWS, seed=5), 0, ROWS)]

    def change(criterion: str) -> float:
        plan = sr.allocate(sr.score_dimensions(model, batches, criterion), sr.Budget(dims=0.5))
        return float((_logits(sr.slim(model, plan)) - _logits(model)).square().mean())

    assert change("ggn_rotated") < 0.5 * change("ggn")
