"""What becomes of rows of a table, or of optimizer state of its shape: some of their columns, or a product with a matrix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from sseds_rec.search.plan import TablePlan
from sseds_rec.search.rotation import Rotation

#: Rows that are multiplied at once: in float64, they are twice or four times what they are in the table.
_ROWS = 1 << 16


class RowConversion(Protocol):
    """Rows [n, D] -> rows [n, width].

    The rows come in parts, since column-wise shards lie apart: (first, values [n, c]) are columns [first, first + c).
    """

    width: int

    def reads(self, first: int, stop: int) -> bool:
        """Whether the result depends on any of the columns [first, stop)."""
        ...

    def convert(self, parts: Iterable[tuple[int, Tensor]], target: Tensor) -> None:
        """Fills all of `target` [n, width] from the parts that `reads` asks for, whatever it held."""
        ...


class KeepColumns:
    """The kept columns side by side, and zeros behind them up to the stored width."""

    def __init__(self, kept: Sequence[int], width: int) -> None:
        self.kept, self.width = torch.tensor(kept, dtype=torch.int64), width

    def reads(self, first: int, stop: int) -> bool:
        return bool(((self.kept >= first) & (self.kept < stop)).any())

    def convert(self, parts: Iterable[tuple[int, Tensor]], target: Tensor) -> None:
        target[:, len(self.kept) :] = 0
        for first, values in parts:
            # The kept columns ascend, so those of one part are neighbours in the target.
            begin, end = (int(torch.searchsorted(self.kept, c)) for c in (first, first + values.shape[1]))
            columns = (self.kept[begin:end] - first).to(values.device)
            torch.index_select(values, 1, columns, out=target[:, begin:end])


class Product:
    """X A + b, summed in float64, and zeros behind it up to the stored width.

    Args:
        matrix: A [D, d].
        constant: b [d]; zero if not given.
        width: columns of the result; d if not given.
    """

    def __init__(self, matrix: Tensor, constant: Tensor | None = None, width: int | None = None) -> None:
        self.matrix = matrix.double()
        self.constant = self.matrix.new_zeros(matrix.shape[1]) if constant is None else constant.double()
        self.width = matrix.shape[1] if width is None else width

    def reads(self, first: int, stop: int) -> bool:
        return bool(self.matrix[first:stop].any())

    def convert(self, parts: Iterable[tuple[int, Tensor]], target: Tensor) -> None:
        d = self.matrix.shape[1]
        held = list(parts)
        target[:, d:] = 0
        matrix, constant = self.matrix.to(target.device), self.constant.to(target.device)
        for begin in range(0, len(target), _ROWS):
            rows = slice(begin, begin + _ROWS)
            sums = constant.expand(len(target[rows]), d).clone()
            for first, values in held:
                sums.addmm_(values[rows].double(), matrix[first : first + values.shape[1]])
            target[rows, :d] = sums


def row_conversion(plan: TablePlan, rotation: Rotation | None) -> RowConversion:
    """What becomes of the rows of a kept table's weight."""
    return KeepColumns(plan.kept, plan.stored_dim) if rotation is None else coordinates(rotation, plan.stored_dim)


def coordinates(rotation: Rotation, width: int) -> Product:
    """Rows v [D] -> Tᵀ(v - μ), and zeros up to the stored width."""
    forward = rotation.forward.double()
    return Product(forward, -(rotation.mean.double() @ forward), width)
