"""Criteria: how much a column matters, from what one pass over a few batches shows.

With one indicator α_j per column, shared by all rows of a table, c_bj = e_bj · ∂f_b/∂e_bj is exactly ∂f_b/∂α_j at α = 1
(Eq. 10), where f_b is the loss of row b (times B, since the loss is a mean) or a prediction z_b for it. E is the mean over
rows, h_b = ∂²ℓ/∂z² the curvature of the loss: p(1-p) for cross-entropy, see `losses`.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from sseds_rec.errors import UserError
from sseds_rec.search.moments import Moment
from sseds_rec.search.rotation import Rotation, loss_basis
from sseds_rec.search.samples import Sample, exact, sum_products, sum_rows


def _gradient(sample: Sample, _: Tensor) -> Tensor:
    return sum_rows(sample.contribution())


GRADIENT = Moment("loss", _gradient)
CURVATURE = Moment("logit", lambda sample, h: sum_rows(sample.contribution().square_(), h))
OUTPUT = Moment("output", lambda sample, _: sum_rows(sample.output()))
VECTORS = Moment("output", lambda sample, _: torch.tensor(sample.vectors, dtype=torch.float64), axes=0)


class Criterion:
    """Turns mean moments into scores.

    Attributes:
        name: what the user calls it.
        moments: what it needs to know.
    """

    name: ClassVar[str]
    moments: ClassVar[tuple[Moment, ...]]

    def score(self, *means: Tensor) -> Tensor:
        """The means over all rows of `moments`, of one table -> non-negative scores [D]: the mean itself, if there is one."""
        (mean,) = means
        return mean

    def basis(self, *means: Tensor) -> Rotation | None:
        """The basis in which the table is scored and cut; None for that of its columns."""
        return None

    def score_in(self, basis: Rotation | None, *means: Tensor) -> Tensor:
        """Scores [D] in a basis that other means may have given."""
        return self.score(*means)


class Snip(Criterion):
    """|E c|, c of the loss: the magnitude of the mean gradient in α (Eq. 10 and 11; Lee et al., SNIP, ICLR 2019).

    Where the model has converged the mean gradient vanishes, and what is left of it is the noise of the batches.
    """

    name = "snip"
    moments = (GRADIENT,)

    def score(self, *means: Tensor) -> Tensor:
        (gradient,) = means
        return gradient.abs()


class SnipBatchAbs(Criterion):
    """The mean over batches of |Σ_{b in batch} c_b|, c of the loss: SNIP's score of each batch, averaged by their rows."""

    name = "snip_batch_abs"
    moments = (Moment("loss", _gradient, fold=torch.abs),)


class TaylorAbs(Criterion):
    """E|c|, c of the loss: the first-order Taylor term of removing the column, row by row.

    (Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient Inference, ICLR 2017, Eq. 7.)
    """

    name = "taylor_abs"
    moments = (Moment("loss", lambda sample, _: sum_rows(sample.contribution().abs_())),)


class Fisher(Criterion):
    """E c², c of the loss: the diagonal of the empirical Fisher information in α (Theis et al., Fisher pruning, 2018)."""

    name = "fisher"
    moments = (Moment("loss", lambda sample, _: sum_rows(sample.contribution().square_())),)


class Ggn(Criterion):
    """E h c², c of each prediction: the diagonal of the generalised Gauss-Newton matrix in α (Schraudolph, 2002).

    To second order it is twice the loss that removing the column costs, and it does not vanish at convergence.
    """

    name = "ggn"
    moments = (CURVATURE,)


class Taylor2(Criterion):
    """max(0, ½ E h c_z² - E c_L): the second-order Taylor estimate of what removing the column costs, c_L of the loss and c_z
    of each prediction (LeCun et al., Optimal Brain Damage, 1989, with its gradient term and Gauss-Newton curvature).

    A column whose removal would lower the loss scores 0.
    """

    name = "taylor2"
    moments = (GRADIENT, CURVATURE)

    def score(self, *means: Tensor) -> Tensor:
        gradient, curvature = means
        return (0.5 * curvature - gradient).clamp_min(0)


class MeanReplace(Criterion):
    """E h ((e - ē) ∂z/∂e)²: as `ggn`, for a column that is replaced by its mean ē and not by zero.

    (Evci et al., Mean Replacement Pruning, 2018.) It suits models that have a bias for each field to put the mean into. With
    c = Σ e ∂z/∂e and g = Σ ∂z/∂e over the features of a table it is E h c² - 2 ē E h c g + ē² E h g².
    """

    name = "mean_replace"
    moments = (
        CURVATURE,
        Moment("logit", lambda sample, h: sum_rows(sample.contribution().mul_(sample.gradient()), h)),
        Moment("logit", lambda sample, h: sum_rows(sample.gradient().square(), h)),
        OUTPUT,
        VECTORS,
    )

    def score(self, *means: Tensor) -> Tensor:
        curvature, mixed, slope, output, vectors = means
        mean = output / vectors.clamp_min(1e-300)
        return (curvature - 2 * mean * mixed + mean.square() * slope).clamp_min(0)


class Magnitude(Criterion):
    """√E e²: the size of what the column puts out. Rows weigh by how often they are looked up; needs no gradient."""

    name = "magnitude"
    moments = (Moment("output", lambda sample, _: sum_rows(sample.output().square())),)

    def score(self, *means: Tensor) -> Tensor:
        (square,) = means
        return square.sqrt()


class PcaEnergy(Criterion):
    """The share of a table's variance that is lost if it keeps fewer principal components; needs no gradient.

    With the eigenvalues λ_1 >= λ_2 ... of Cov(e), component j scores Σ_{i>=j} λ_i / Σ_i λ_i: a threshold on it keeps as many of
    each table as its energy asks for (field-level dimension optimization of GDCN, Wang et al., CIKM 2023). The method
    decides widths; the columns are those of the largest variance.
    """

    name = "pca_energy"
    moments = (OUTPUT, Moment("output", lambda sample, _: sum_products(e := sample.output(), e), axes=2))

    def score(self, *means: Tensor) -> Tensor:
        mean, square = means
        covariance = square - torch.outer(mean, mean)
        energy = torch.linalg.eigvalsh(covariance.cpu()).clamp_min(0)  # ascending
        tails = energy.cumsum(0).flip(0) / energy.sum().clamp_min(1e-300)
        order = covariance.diagonal().cpu().argsort(descending=True, stable=True)
        return torch.empty_like(tails).index_copy_(0, order, tails)


class Random(Criterion):
    """Uniform in [0, 1), drawn anew whenever scores are asked for: what a criterion must beat; needs no gradient.

    Args:
        seed: the same on all ranks.
    """

    name = "random"
    moments = (OUTPUT,)  # for its shape

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def score(self, *means: Tensor) -> Tensor:
        return torch.rand(len(means[0]), generator=self._generator, dtype=torch.float64)


def _slopes(sample: Sample, h: Tensor) -> Tensor:
    slopes = [exact(one.slope()) for one in sample.lookups]
    return torch.stack([sum_products(slope, slope * h.to(slope.dtype)) for slope in slopes]).sum(dim=0)


def _pairs(sample: Sample, _: Tensor) -> Tensor:
    outputs = [exact(one.output) for one in sample.lookups]
    return torch.stack([sum_products(output, output) for output in outputs]).sum(dim=0)


def _massed(sample: Sample, _: Tensor) -> Tensor:
    parts = [sum_rows(exact(one.output), one.mass()[:, None]) for one in sample.lookups]
    return torch.stack(parts).sum(dim=0)


class GgnRotated(Criterion):
    """As `ggn`, in the basis that matters to the loss: squared singular values of G^½ C^½ (see `loss_basis`).

    C is the covariance of e about a mean that stays, over all features of a table, G = E h Σ_features ∂z/∂e ∂z/∂eᵀ. Coordinate j,
    t_j = T_jᵀ(e - mass·μ) with M_j t_j in its place, scores (M_jᵀ G M_j)(T_jᵀ C T_j).
    """

    name = "ggn_rotated"
    moments = (
        Moment("logit", _slopes, axes=2),
        Moment("output", _pairs, axes=2),
        Moment("output", _massed),
        Moment(
            "output", lambda sample, _: torch.stack([one.mass().square().sum() for one in sample.lookups]).sum(), axes=0
        ),
        VECTORS,
    )

    def basis(self, *means: Tensor) -> Rotation | None:
        slopes, covariance, mean = self._parts(*means)
        return loss_basis(slopes, covariance, mean)

    def score_in(self, basis: Rotation | None, *means: Tensor) -> Tensor:
        slopes, covariance, _ = self._parts(*means)
        if basis is None:
            return torch.zeros(len(slopes), dtype=torch.float64)
        return _forms(basis.inverse, slopes) * _forms(basis.forward, covariance)

    def _parts(self, *means: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """G [D, D], C [D, D], μ [D]: the mean about which masses leave the least."""
        slopes, pairs, massed, squared_mass, vectors = (mean.cpu() for mean in means)
        mean = massed / squared_mass.clamp_min(1e-300)
        return slopes, (pairs - torch.outer(massed, mean)) / vectors.clamp_min(1e-300), mean


def _forms(vectors: Tensor, matrix: Tensor) -> Tensor:
    """v_jᵀ A v_j of the columns v_j [D, d] -> [d]."""
    return (vectors * (matrix @ vectors)).sum(dim=0).clamp_min(0)


CRITERIA: dict[str, type[Criterion]] = {
    criterion.name: criterion
    for criterion in (
        Snip,
        SnipBatchAbs,
        TaylorAbs,
        Fisher,
        Ggn,
        Taylor2,
        MeanReplace,
        GgnRotated,
        Magnitude,
        PcaEnergy,
        Random,
    )
}


def criterion_named(name: str | Criterion, seed: int = 0) -> Criterion:
    """The criterion of a name; `seed` is for the one that draws.

    Raises:
        UserError: there is none of that name.
    """
    if isinstance(name, Criterion):
        return name
    if name not in CRITERIA:
        raise UserError(f"unknown criterion {name!r}; choose one of {', '.join(CRITERIA)}")
    return Random(seed) if name == Random.name else CRITERIA[name]()
