"""What a search remembers of its batches: sums over rows, in float64, on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sseds_rec.search.samples import Sample
from sseds_rec.search.steps import sum_over_ranks

#: What is differentiated for a moment: the loss, each of its predictions ("logit"), or nothing.
Of = Literal["loss", "logit", "output"]

#: Batches are kept apart, to be drawn again, in so many sums at most ...
_GROUPS = 32
#: ... and in so few that they hold no more numbers than this.
_NUMBERS = 1 << 23


@dataclass(frozen=True)
class Moment:
    """A sum over rows of what they show of one table.

    Attributes:
        of: what is differentiated.
        sum: (sample, curvature h [B, 1] of the logit that was differentiated) -> its sum over the rows, of shape [D] * axes.
        axes: 0 for a number, 1 for one per column, 2 for one per pair of columns.
        fold: applied to the sum over a whole batch, of all ranks, before batches are added.
    """

    of: Of
    sum: Callable[[Sample, Tensor], Tensor]
    axes: int = 1
    fold: Callable[[Tensor], Tensor] | None = None


class Moments:
    """Moments of all tables, added up over batches and ranks.

    Args:
        moments: what is kept.
        dims: table -> D.
        device: where the sums lie.

    Attributes:
        batches: how many were added.
        rows: how many rows they had, on all ranks.
        loss: sum of their mean losses, to see whether it is finite.
        failed: on how many ranks a batch could not be scored.
    """

    def __init__(self, moments: Sequence[Moment], dims: Mapping[str, int], device: torch.device) -> None:
        self.moments = list(moments)
        self.batches, self.rows, self.loss, self.failed = 0, 0.0, 0.0, 0.0
        self._shapes = {name: [(dim,) * moment.axes for moment in moments] for name, dim in dims.items()}
        self._sizes = [torch.Size(shape).numel() for shapes in self._shapes.values() for shape in shapes]
        self._most_groups = max(2, min(_GROUPS, _NUMBERS // max(1, sum(self._sizes))))
        self._groups: list[Tensor] = []  # moments, rows
        self._device = device

    def begin_batch(self) -> Batch:
        """A batch to be filled on this rank."""
        return Batch(self, torch.zeros(sum(self._sizes) + 3, dtype=torch.float64, device=self._device))

    def add(self, batch: Batch) -> None:
        """Adds a batch of all ranks; every rank calls it. This is the search's only communication."""
        sum_over_ranks(batch.packed)
        for moments in batch.tables.values():
            for moment, total in zip(self.moments, moments, strict=True):
                if moment.fold:
                    total.copy_(moment.fold(total))
        if len(self._groups) < self._most_groups:
            self._groups.append(batch.packed[:-2])
        else:
            self._groups[self.batches % self._most_groups] += batch.packed[:-2]
        rows, loss, self.failed = batch.packed[-3:].tolist()
        self.rows, self.loss, self.batches = self.rows + rows, self.loss + loss, self.batches + 1

    @property
    def groups(self) -> int:
        """How many sums there are that can be drawn again: one a batch, of very many batches or numbers fewer."""
        return len(self._groups)

    def means(self, times: Tensor | None = None) -> dict[str, list[Tensor]]:
        """Table -> the mean over rows of every moment.

        Args:
            times: how often each group counts, float64 [groups]; once each by default.
        """
        if times is None:
            times = torch.ones(self.groups)
        total = torch.zeros_like(self._groups[0])
        for group, count in zip(self._groups, times.tolist(), strict=True):
            total.add_(group, alpha=count)
        return self.split(total[:-1] / total[-1])

    def split(self, packed: Tensor) -> dict[str, list[Tensor]]:
        """Table -> views of its moments."""
        parts = iter(packed.split(self._sizes)) if self._sizes else iter(())
        return {name: [next(parts).view(shape) for shape in shapes] for name, shapes in self._shapes.items()}


class Batch:
    """One batch of one rank.

    Attributes:
        packed: all moments of all tables, then the number of rows, the loss, and 1 if the batch could not be scored: what is
            summed over the ranks.
        tables: table -> views of its moments.
    """

    def __init__(self, moments: Moments, packed: Tensor) -> None:
        self.packed = packed
        self.tables = moments.split(packed[:-3])
        self._moments = moments.moments

    def count(self, rows: int, loss: Tensor) -> None:
        """Notes the batch's rows and its mean loss."""
        self.packed[-3] = rows
        self.packed[-2] = loss.detach()

    def fail(self) -> None:
        """Tells the other ranks, who would wait, that this one stops here."""
        self.packed[-1] = 1

    def see(self, of: Of, table: str, sample: Sample, curvature: Tensor | None = None) -> None:
        """Adds what a table's sample, differentiated so, says."""
        curvature = self.packed.new_ones(1, 1) if curvature is None else curvature
        for moment, total in zip(self._moments, self.tables[table], strict=True):
            if moment.of == of:
                total += moment.sum(sample, curvature)
