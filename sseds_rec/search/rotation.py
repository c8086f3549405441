"""The basis in which a table is cut: the directions of its embeddings, ranked by what they do to the loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """e = M t + mass·μ, with t = Tᵀ(e - mass·μ): coordinates t of an embedding e, some or all of them.

    `mass` is what a constant added to every row of the table adds to a pooled output: with sum pooling the number of ids or
    the sum of their weights, with mean pooling 1, for an empty bag 0. So the coordinates of the pooled output are the pooled
    coordinates, and each row of the table is rotated on its own: V_rotated = (V - μ) T.

    Attributes:
        forward: T [D, d].
        inverse: M [D, d]; with all d = D columns M Tᵀ = I.
        mean: μ [D].
    """

    forward: Tensor
    inverse: Tensor
    mean: Tensor

    @property
    def mean_length(self) -> float:
        """|μ|, or 1 if there is no mean."""
        return float(self.mean.norm()) or 1.0

    def with_mean(self) -> Tensor:
        """[M μ/|μ|] [D, d + 1]: e is its product with t and, as one more coordinate, mass·|μ|.

        So the mean is a coordinate like others, with a column of length 1 and of the size of embeddings: a weight over the mass
        itself, which is 1 in most bags where embeddings may be a hundredth, would be trained a hundred times as fast.
        """
        return torch.cat([self.inverse, self.mean[:, None] / self.mean_length], dim=1)

    def keep(self, columns: list[int]) -> Rotation:
        """The rotation to some of the coordinates only."""
        return Rotation(self.forward[:, columns], self.inverse[:, columns], self.mean)


#: Added to the eigenvalues of G, as a share of their mean: T and M stay within a hundredfold of an orthogonal matrix.
_DAMPING = 1e-4


def loss_basis(slopes: Tensor, covariance: Tensor, mean: Tensor) -> Rotation | None:
    """The basis whose first k coordinates keep, for every k, as much of the loss as k coordinates can.

    If a table's e and ∂z/∂e vary independently, replacing e by ê costs ½ tr(G Cov(e - ê)) to second order. With the singular
    value decomposition G^½ C^½ = U S Wᵀ the best ê of rank k is e's projection by M = G^-½ U_k and T = G^½ U_k, which loses
    the squared singular values behind the k-th (Eckart & Young, 1936). Each coordinate is scaled such that its column of M
    has length 1: it is then as large as the embeddings were.

    Args:
        slopes: G [D, D], E h ∂z/∂e ∂z/∂eᵀ.
        covariance: C [D, D] of e about `mean`.
        mean: μ [D].

    Returns:
        In float64 on the CPU, coordinates in descending order of what they keep, up to the damping; None if the loss
        does not depend on the table.
    """
    dim = len(mean)
    level = float(slopes.trace()) / dim
    if not level > 0:
        return None
    values, vectors = torch.linalg.eigh(slopes)
    roots = (values.clamp_min(0) + _DAMPING * level).sqrt()
    root, inverse_root = (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T
    # U S² Uᵀ is the eigendecomposition of G^½ C G^½, in ascending order.
    left = torch.linalg.eigh(root @ covariance @ root).eigenvectors.flip(1)
    inverse = inverse_root @ left
    lengths = inverse.norm(dim=0)
    return Rotation(root @ left * lengths, inverse / lengths, mean)
