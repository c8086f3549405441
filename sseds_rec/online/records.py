"""What is measured of each window and model, and its files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import polars as pl

from sseds_rec.files import write_atomic, write_json

Side = Literal["base", "slim"]


@dataclass(frozen=True)
class Record:
    """One model on one window.

    Attributes:
        window: its name.
        model: which one.
        rows: of the window.
        auc, logloss: of predictions made before the model was trained on the window, with the ids known then.
        embedding_parameters_in_use: in rows of tables that have an id by the end of the window.
        embedding_parameters: in all rows of the tables, which have room for the ids of the last window.
        seconds: predicting, training and, where there was one, searching.
        searched: whether the model was searched anew between predicting the window and training on it.
    """

    window: str
    model: Side
    rows: int
    auc: float
    logloss: float
    embedding_parameters_in_use: int
    embedding_parameters: int
    seconds: float
    searched: bool


def write_records(folder: Path, records: Sequence[Record]) -> None:
    """Writes `windows.csv`, a line for each record, and `metrics.json`, their means."""
    frame = pl.DataFrame([asdict(record) for record in records])
    write_atomic(folder / "windows.csv", frame.write_csv)
    write_json(folder / "metrics.json", summary(records))


def read_records(path: Path) -> list[Record]:
    """Reads `windows.csv`."""
    return [Record(**row) for row in pl.read_csv(path, schema_overrides={"window": pl.String}).iter_rows(named=True)]


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """Means over windows, each of the same weight; of seconds the sum."""
    sides = {side: [record for record in records if record.model == side] for side in ("base", "slim")}
    return {
        "windows": len(sides["base"]),
        "rows": sum(record.rows for record in sides["base"]),
        "searches": [record.window for record in sides["slim"] if record.searched],
        "slim_better_auc": sum(slim.auc > base.auc for base, slim in zip(sides["base"], sides["slim"], strict=True)),
        **{
            side: {
                "auc": fmean(record.auc for record in own),
                "logloss": fmean(record.logloss for record in own),
                "seconds": sum(record.seconds for record in own),
                "embedding_parameters_in_use": fmean(record.embedding_parameters_in_use for record in own),
                "embedding_parameters": own[-1].embedding_parameters,
            }
            for side, own in sides.items()
        },
    }
