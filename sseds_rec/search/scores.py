"""What a search measures: one score per column of every table, and the tables they belong to."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sseds_rec.errors import UserError
from sseds_rec.files import write_atomic

if TYPE_CHECKING:
    from sseds_rec.search.draws import Draws
    from sseds_rec.search.rotation import Rotation


@dataclass(frozen=True)
class Table:
    """The facts about a table that an allocation needs: n_i rows, D columns, who looks it up."""

    rows: int
    dim: int
    feature_names: tuple[str, ...] = ()
    pooling: str = "SUM"


class DimensionScores(Mapping[str, Tensor]):
    """Table name -> float64 scores [D]; all entries of all tables sum to 1 (Eq. 11).

    Args:
        raw: table name -> non-negative scores [D], in any scale.
        tables: the same names -> `Table`.
        search: how the scores were made (method, criterion, batches, samples, ...); copied into the plan.
        draws: the batches they come from, if they come from batches.

    Attributes:
        rotations: table -> the basis whose coordinates were scored, of those that are not scored by their own columns.

    Raises:
        UserError: a score is not finite, or all are zero, so that there is nothing to rank.
    """

    def __init__(
        self,
        raw: Mapping[str, Tensor],
        tables: Mapping[str, Table],
        search: Mapping[str, Any],
        draws: Draws | None = None,
    ) -> None:
        for name, values in raw.items():
            if not bool(torch.isfinite(values).all()):
                raise UserError(
                    f"table {name}: its scores are not finite; the model's loss or weights hold NaN or infinity"
                )
        total = sum(float(values.sum()) for values in raw.values())
        if total <= 0:
            raise UserError("every score is zero: no embedding column influences the loss of these batches")
        self._scores = {name: values.detach().to("cpu", torch.float64) / total for name, values in raw.items()}
        self.tables = dict(tables)
        self.search = dict(search)
        self.draws = draws
        self.rotations: dict[str, Rotation] = dict(draws.rotations) if draws else {}

    def __getitem__(self, name: str) -> Tensor:
        return self._scores[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._scores)

    def __len__(self) -> int:
        return len(self._scores)

    def save(self, path: str | Path) -> None:
        """Writes one float64 array [D] per table, as `.npz`, atomically."""
        save_arrays(path, self)


def save_arrays(path: str | Path, arrays: Mapping[str, Tensor]) -> None:
    """Writes one array [D] per table, as `.npz`, atomically."""

    def write(temporary: Path) -> None:
        # Not np.savez: it takes the names as keyword arguments, of which "file" is its own.
        with zipfile.ZipFile(temporary, "w") as archive:
            for name, values in arrays.items():
                with archive.open(f"{name}.npy", "w") as entry:
                    np.lib.format.write_array(entry, values.numpy())

    write_atomic(path, write)
