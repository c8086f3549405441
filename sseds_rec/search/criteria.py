"""Criteria: how much a column matters, from one forward-backward pass.

A criterion sees, for each table, the per-sample contribution `c_bj = e_bj · ∂f_b/∂e_bj` [B, D], where f is the loss or
the logit. With one indicator α_j per column, shared by all rows, c_bj is exactly ∂f_b/∂α_j at α = 1 (Eq. 10).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from torch import Tensor


class Criterion(ABC):
    """Accumulates per-column statistics over batches and ranks, then turns them into scores.

    Attributes:
        name: what the user calls it.
        of: what is differentiated, the "loss" or the "logit".
    """

    name: ClassVar[str]
    of: ClassVar[Literal["loss", "logit"]]

    @abstractmethod
    def statistic(self, contribution: Tensor, curvature: Tensor | None) -> Tensor:
        """Per-sample contributions [B, D] and, of the logit, curvatures [B, 1] -> a sum over the batch [D] in float64."""

    @abstractmethod
    def score(self, mean: Tensor) -> Tensor:
        """The statistic's mean over all samples [D] -> non-negative scores [D]."""


class Snip(Criterion):
    """|g_ij|, the magnitude of the mean gradient of the loss in α (Eq. 10 and 11; Lee et al., SNIP, 2018)."""

    name = "snip"
    of = "loss"

    def statistic(self, contribution: Tensor, curvature: Tensor | None) -> Tensor:
        return contribution.double().sum(dim=0)

    def score(self, mean: Tensor) -> Tensor:
        return mean.abs()


class Ggn(Criterion):
    """E_b[h_b (e_bj · ∂z_b/∂e_bj)²], h = ∂²ℓ/∂z² (p(1-p) for cross-entropy): the diagonal of the generalised Gauss-Newton
    matrix in α (Schraudolph, 2002), which is twice the loss that removing the column costs to second order.

    It does not vanish at convergence, as the mean gradient does.
    """

    name = "ggn"
    of = "logit"

    def statistic(self, contribution: Tensor, curvature: Tensor | None) -> Tensor:
        assert curvature is not None
        return (contribution.double().square_() * curvature.double()).sum(dim=0)

    def score(self, mean: Tensor) -> Tensor:
        return mean


CRITERIA: dict[str, type[Criterion]] = {criterion.name: criterion for criterion in (Snip, Ggn)}
