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

    What its methods return is float64 [B, D], summed over the table's features, over the module's calls and over the positions
    of a sequence, since all of them share one α. It is computed when asked for and not kept.

    Attributes:
        lookups: one per feature and call.
    """

    lookups: list[Lookup]

    def contribution(self) -> Tensor:
        """Σ e ⊙ ∂f/∂e [B, D]."""
        return self._sum(lambda one: one.output.double() * one.slope())

    def gradient(self) -> Tensor:
        """Σ ∂f/∂e [B, D]."""
        return self._sum(lambda one: one.slope().double())

    def output(self) -> Tensor:
        """Σ e [B, D]."""
        return self._sum(lambda one: one.output.double())

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
