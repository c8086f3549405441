"""What the tables of a trained model hold, counted in its tensors and not taken from a plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from sseds_rec.distributed.checkpoint import load_checkpoint, stored_shapes

_TABLE = ".embedding_bags."


@dataclass(frozen=True)
class TableCounts:
    """Numbers in all tables of a checkpoint.

    Attributes:
        stored: all of them.
        columns: those in columns that are not zero in every row: padding is, and nothing that was trained.
        elements: those that are not zero.
    """

    stored: int
    columns: int
    elements: int


def count_tables(checkpoint: Path) -> TableCounts:
    """Counts the numbers in the tables of a run's checkpoint, one table in memory at a time."""
    stored = columns = elements = 0
    for name, shape in stored_shapes(checkpoint).items():
        if _TABLE not in name or not name.startswith("model."):
            continue
        table = torch.empty(shape)
        load_checkpoint({"model": {name.removeprefix("model."): table}}, checkpoint)
        nonzero = table != 0
        stored += table.numel()
        columns += table.shape[0] * int(nonzero.any(dim=0).sum())
        elements += int(nonzero.sum())
    return TableCounts(stored, columns, elements)
