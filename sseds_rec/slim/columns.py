"""What becomes of rows of a full table, or of some of its columns, in the slim one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Rows that are rotated at once: in float64, they are twice or four times what they are in the table.
_ROWS = 1 << 16


def keep_columns(values: Tensor, kept: Sequence[int], target: Tensor, first: int = 0) -> None:
    """Copies the kept columns that are among the given ones.

    Args:
        values: [n, c], columns [first, first + c) of the full table.
        kept: column indices in the full table, ascending.
        target: [n, len(kept) or more]; changed in place.
        first: where the given columns begin.
    """
    found = [(position, c - first) for position, c in enumerate(kept) if first <= c < first + values.shape[1]]
    if found:
        positions, columns = (torch.tensor(side, device=values.device) for side in zip(*found, strict=True))
        target[:, positions] = values.index_select(1, columns)


def rotate_columns(values: Tensor, matrix: Tensor, mean: Tensor, target: Tensor, first: int = 0) -> None:
    """Adds to the first d columns of the target what the given columns contribute to (V - μ) T.

    Args:
        values: [n, c], columns [first, first + c) of V [n, D].
        matrix: T [D, d].
        mean: μ [D].
        target: [n, d or more]; changed in place.
        first: where the given columns begin.
    """
    own = slice(first, first + values.shape[1])
    matrix, mean = (part[own].to(values.device, torch.float64) for part in (matrix, mean))
    for rows, sums in zip(values.split(_ROWS), target[:, : matrix.shape[1]].split(_ROWS), strict=True):
        sums += (rows.double() - mean) @ matrix
