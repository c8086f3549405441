"""What becomes of rows of a table, or of optimizer state of its shape: some of their columns, or a product with a matrix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sseds_rec.search.plan import TablePlan
from sseds_rec.search.rotation import Rotation

#: Rows that a CPU multiplies at once: in float64, where they are twice or four times as large, they stay in its cache.
_ROWS = 1 << 10


class RowConversion(ABC):
    """Rows [n, D] -> rows [n, width], from some of the D columns.

    Columns may come in parts, since column-wise shards lie apart.

    Args:
        needs: the columns [m] that the result depends on, ascending.
        width: of the result.
    """

    def __init__(self, needs: Tensor, width: int) -> None:
        self.needs, self.width = needs, width

    def part(self, first: int, stop: int) -> tuple[slice, Tensor]:
        """Of the columns [first, stop): where in `needs` those are that are needed, and which of the part's columns they are."""
        begin, end = (int(torch.searchsorted(self.needs, column)) for column in (first, stop))
        return slice(begin, end), self.needs[begin:end] - first

    def reads(self, first: int, stop: int) -> bool:
        """Whether any of the columns [first, stop) is needed."""
        return len(self.part(first, stop)[1]) > 0

    def convert(self, parts: Iterable[tuple[int, Tensor]], target: Tensor) -> None:
        """Fills `target` [n, width] from (first, values [n, c]), columns [first, first + c), of all parts that are needed."""
        gathered = self.room(target)
        for first, values in parts:
            place, columns = self.part(first, first + values.shape[1])
            torch.index_select(values, 1, columns.to(values.device), out=gathered[:, place])
        self.finish(gathered, target)

    @abstractmethod
    def room(self, target: Tensor) -> Tensor:
        """Memory [n, m] for the needed columns."""

    @abstractmethod
    def finish(self, gathered: Tensor, target: Tensor) -> None:
        """Fills `target` [n, width], whatever it held, once its `room` is filled."""


class KeepColumns(RowConversion):
    """The kept columns side by side, and zeros behind them up to the stored width."""

    def __init__(self, kept: Sequence[int], width: int) -> None:
        super().__init__(torch.tensor(kept, dtype=torch.int64), width)

    def room(self, target: Tensor) -> Tensor:
        return target[:, : len(self.needs)]

    def finish(self, gathered: Tensor, target: Tensor) -> None:
        target[:, len(self.needs) :] = 0


class Product(RowConversion):
    """X A + b, summed in float64, and zeros behind it up to the stored width.

    Args:
        matrix: A [D, d].
        constant: b [d]; zero if not given.
        width: columns of the result; d if not given.
    """

    def __init__(self, matrix: Tensor, constant: Tensor | None = None, width: int | None = None) -> None:
        super().__init__(matrix.any(dim=1).nonzero()[:, 0], matrix.shape[1] if width is None else width)
        self.matrix = matrix.double()
        self.constant = self.matrix.new_zeros(matrix.shape[1]) if constant is None else constant.double()

    def convert(self, parts: Iterable[tuple[int, Tensor]], target: Tensor) -> None:
        held = list(parts)
        if len(held) == 1 and held[0][1].shape[1] == len(self.needs):
            self.finish(held[0][1], target)  # nothing to gather
        else:
            super().convert(held, target)

    def room(self, target: Tensor) -> Tensor:
        return target.new_empty(len(target), len(self.needs))

    def finish(self, gathered: Tensor, target: Tensor) -> None:
        matrix, constant = self.matrix[self.needs].to(target.device), self.constant.to(target.device)
        d, step = len(constant), _ROWS if target.device.type == "cpu" else len(target)
        exact = matrix.new_empty(min(step, len(target)), gathered.shape[1])
        for begin in range(0, len(target), max(step, 1)):
            rows = gathered[begin : begin + step]
            target[begin : begin + step, :d] = torch.addmm(constant, exact[: len(rows)].copy_(rows), matrix)
        target[:, d:] = 0


def row_conversion(plan: TablePlan, rotation: Rotation | None) -> RowConversion:
    """What becomes of the rows of a kept table's weight."""
    return KeepColumns(plan.kept, plan.stored_dim) if rotation is None else coordinates(rotation, plan.stored_dim)


def coordinates(rotation: Rotation, width: int) -> Product:
    """Rows v [D] -> Tᵀ(v - μ), and zeros up to the stored width."""
    forward = rotation.forward.double()
    return Product(forward, -(rotation.mean.double() @ forward), width)
