"""The tidy tables of a comparison, from what its cells left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from sseds_rec.compare.cells import Cell
from sseds_rec.compare.grid import Grid
from sseds_rec.compare.run_cell import RESULT, is_above
from sseds_rec.files import read_json, write_atomic, write_json
from sseds_rec.report.compare_artefacts import RESULTS, SALIENCY, WIDTHS


def write_results(grid: Grid, facts: dict[str, Any]) -> None:
    """Leaves `results.parquet` and `.csv`, `widths.parquet`, `saliency.parquet` and `compare.json`.

    Args:
        grid: its cells may be done or not.
        facts: what `compare.json` says besides of the cells that are missing, or failed.
    """
    rows: list[dict[str, Any]] = []
    missing: dict[str, dict[str, str]] = {}  # a cell may have two roles
    for cell, role in grid.roles:
        path = grid.folder / cell.folder / RESULT
        found = read_json(path) if path.exists() else {"error": "not run yet"}
        if "auc" in found:
            rows.append({**_of(cell), "role": role, **found, "missed": is_above(found)})
        else:
            missing[str(cell.folder)] = {"run": str(cell.folder), "role": role, "why": found["error"]}
    widths, saliency = [], []
    for cell in {cell for cell, role in grid.roles if role == "result"}:
        widths += _widths(grid.folder, cell)
        if cell.method in ("sseds", "sseds_paper") and cell.budget == grid.config.compare.tuned_at:
            saliency += _saliency(grid.folder, cell)
    results = pl.DataFrame(rows, RESULTS)
    _write(grid.folder / "results.parquet", results)
    write_atomic(grid.folder / "results.csv", results.write_csv)
    _write(grid.folder / "widths.parquet", pl.DataFrame(widths, WIDTHS, orient="row").sort(list(WIDTHS)[:4]))
    _write(grid.folder / "saliency.parquet", pl.DataFrame(saliency, SALIENCY, orient="row").sort(list(SALIENCY)[:3]))
    write_json(grid.folder / "compare.json", {**facts, "missing": list(missing.values())})


def _of(cell: Cell) -> dict[str, Any]:
    return {
        "model": cell.model,
        "method": cell.method,
        "variant": cell.variant,
        "budget": cell.budget,
        "seed": cell.seed,
        "learning_rate": cell.rates.learning_rate,
        "embedding_l2": cell.rates.embedding_l2,
        "run": str(cell.folder),
    }


def _widths(folder: Path, cell: Cell) -> list[tuple[Any, ...]]:
    path = folder / cell.folder / "search" / "plan.json"
    plan = read_json(path) if path.exists() else {"tables": {}, "search": {}}
    if "elements" in plan["search"]:  # its columns all stay
        return []
    who = (cell.model, cell.method, cell.budget, cell.seed)
    return [
        (*who, name, table["rows"], table["original_dim"], table["embedding_dim"])
        for name, table in plan["tables"].items()
    ]


def _saliency(folder: Path, cell: Cell) -> list[tuple[Any, ...]]:
    path = folder / cell.folder / "search" / "saliency.npz"
    if not path.exists():
        return []
    with np.load(path) as scores:
        return [
            (cell.model, cell.method, cell.seed, name, column, float(score))
            for name in scores.files
            for column, score in enumerate(scores[name])
        ]


def _write(path: Path, frame: pl.DataFrame) -> None:
    write_atomic(path, frame.write_parquet)
