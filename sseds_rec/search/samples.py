"""What one forward, and one backward to the embeddings, show of each table: what criteria look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Lookup:
    """What one feature looked up in one call of a module.

    Attributes:
        output: e [B, D] as the module computed it; of a sequence one for each id, [ids, D].
        gradient: ∂f/∂e in the same shape, if the forward ran with gradients.
        lengths: of sequences, ids of each row [B].
        mass: gives float64 [B], what a constant added to every row of the table adds to e. Sum pooling: the number of ids or the
            sum of their weights; mean pooling: 1, and 0 for an empty bag. Raises `UserError` if the table is not of an
            EmbeddingBagCollection (names the module).
    """

    output: Tensor
    gradient: Tensor | None
    lengths: Tensor | None
    mass: Callable[[], Tensor]

    def slope(self) -> Tensor:
        """`gradient`, where there is one."""
        assert self.gradient is not None, "samples() was given no gradients"
        return self.gradient

    def per_row(self, values: Tensor) -> Tensor:
        """Values in the shape of `output`, summed over the positions of a sequence [B, D]."""
        if self.lengths is None:
            return values
        # Unsafe: no check of what TorchRec guarantees, that the lengths sum to the number of ids.
        return torch.segment_reduce(values, "sum", lengths=self.lengths.long(), axis=0, initial=0, unsafe=True)


@dataclass
class Sample:
    """One table in one forward, as criteria see it.

    What its methods return is [B, D] in the precision of the embeddings, float32 at least, summed over the table's features,
    over the module's calls and over the positions of a sequence, since all of them share one α. It is computed when asked
    for and not kept; add it up with `sum_rows`.

    Attributes:
        lookups: one per feature and call.
    """

    lookups: list[Lookup]

    def contribution(self) -> Tensor:
        """Σ e ⊙ ∂f/∂e [B, D]."""
        return self._sum(lambda one: exact(one.output) * exact(one.slope()))

    def gradient(self) -> Tensor:
        """Σ ∂f/∂e [B, D]."""
        return self._sum(lambda one: exact(one.slope()))

    def output(self) -> Tensor:
        """Σ e [B, D]."""
        return self._sum(lambda one: exact(one.output))

    @property
    def vectors(self) -> int:
        """How many embeddings were put out: one a row, feature and call, of a sequence one an id."""
        return sum(len(one.output) for one in self.lookups)

    def _sum(self, of: Callable[[Lookup], Tensor]) -> Tensor:
        first, *others = self.lookups
        total = first.per_row(of(first))
        for one in others:
            total = total + one.per_row(of(one))
        return total


#: Rows that are added up in the precision of their values, before the sums are in float64.
_BLOCK = 256


def exact(values: Tensor) -> Tensor:
    """In float32 if they were in less."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def sum_rows(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Σ_b w_b v_b of [B, D] and [B, 1], or ones -> float64 [D].

    Products round as their values do, and a sum of few of them little more; all in float64 it would take twice the time.
    """
    ones = values.new_ones(len(values), 1) if weights is None else weights.to(values.dtype)
    return sum_products(ones, values)[0]


def sum_products(left: Tensor, right: Tensor) -> Tensor:
    """Σ_b l_b r_bᵀ of [B, K] and [B, D] -> float64 [K, D], as `sum_rows`."""
    if left.is_cuda:  # where a product of float32 may be one of TF32
        left, right = left.double(), right.double()
    whole = len(left) // _BLOCK * _BLOCK
    total = left.new_zeros(left.shape[1], right.shape[1], dtype=torch.float64)
    if whole:
        blocks = [side[:whole].unflatten(0, (-1, _BLOCK)) for side in (left, right)]
        with torch.autocast(left.device.type, enabled=False):
            total += torch.bmm(blocks[0].transpose(1, 2), blocks[1]).sum(dim=0, dtype=torch.float64)
    if whole < len(left):
        total += left[whole:].double().T @ right[whole:].double()
    return total
