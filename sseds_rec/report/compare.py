"""Write `report/compare.html`: the tables that a comparison leaves, as one page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sseds_rec.compare.statistics import Ranking, rank_methods
from sseds_rec.report.artefacts import printable
from sseds_rec.report.blocks import FigureBlock
from sseds_rec.report.compare_artefacts import Grid, read_grid
from sseds_rec.report.compare_blocks import auc_blocks, cost_blocks, search_blocks
from sseds_rec.report.compare_costs import storage_table, time_table, tuning_table
from sseds_rec.report.compare_search import ablation_table, dims_table
from sseds_rec.report.compare_tables import Table, missed_table, ranking_table, results_table
from sseds_rec.report.compare_words import RANKING_NOTE, headline, summary
from sseds_rec.report.templates import render_template, write_page


def write_compare_report(folder: Path) -> Path:
    """Write the page of a comparison, finished or not, and return its path, `folder/report/compare.html`.

    Raises:
        UserError: a file of the comparison is missing, damaged, or not as it should be; names it. Nothing is written then.
    """
    return write_page(folder / "report" / "compare.html", render(read_grid(folder)))


@dataclass(frozen=True)
class Section:
    """A part of the page: figures, then tables; left out if it has neither."""

    id: str
    title: str
    figures: Sequence[FigureBlock] = ()
    tables: Sequence[Table | None] = ()
    notes: Sequence[str] = ()


def render(grid: Grid) -> str:
    """The page as HTML text."""
    rankings = [rank_methods(grid.results, budget) for budget in grid.budgets]
    missed = missed_table(grid)
    return render_template(
        "compare.html.j2",
        name=printable(grid.folder.resolve().name),
        headline=headline(grid, rankings),
        summary=summary(grid, rankings, len(missed.rows) if missed else 0),
        sections=[section for section in map(_filled, _sections(grid, rankings)) if section.figures or section.tables],
        missing=[_cell(cell) for cell in grid.about.missing],
        command=grid.about.command,
        environment=grid.about.environment,
    )


def _sections(grid: Grid, rankings: Sequence[Ranking]) -> list[Section]:
    if grid.results.is_empty():
        return []
    dims = [dims_table(grid, model, i) for i, model in enumerate(grid.models)]
    ranked = [ranking_table(grid, ranking) for ranking in rankings if ranking.methods]
    return [
        Section("accuracy", "Accuracy against size", auc_blocks(grid)),
        Section("ranks", "Who is best, and how surely", tables=ranked, notes=[RANKING_NOTE]),
        Section("cost", "Time and storage", cost_blocks(grid), [time_table(grid), storage_table(grid)]),
        Section("steps", "Which steps matter", tables=[ablation_table(grid)]),
        Section("found", "What the searches found", search_blocks(grid), dims),
        Section("numbers", "Every number", tables=[results_table(grid), missed_table(grid), tuning_table(grid)]),
    ]


def _filled(section: Section) -> Section:
    return replace(section, tables=[table for table in section.tables if table and table.rows])


def _cell(cell: Any) -> str:
    """A cell that is not finished, by its parts."""
    if isinstance(cell, dict):
        return printable(", ".join(f"{key} {value}" for key, value in cell.items() if value not in (None, "")))
    return printable(", ".join(map(str, cell)) if isinstance(cell, list) else str(cell))
