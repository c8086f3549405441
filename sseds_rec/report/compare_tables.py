"""The tables of a comparison, as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import polars as pl
from markupsafe import Markup

from sseds_rec.compare.statistics import Difference, Ranked, Ranking, rank_methods, summarize
from sseds_rec.report.compare_artefacts import Grid, in_order
from sseds_rec.report.numbers import count, number, percent, text

CHOSEN = "sseds"  # the method that all others are compared with
FULL = "full"


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Attributes:
        heads: number of leading columns that name the row.
        own: indices of rows that stand out: those of the method the comparison is about.
    """

    id: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str
    heads: int = 1
    own: frozenset[int] = field(default_factory=frozenset)


def ordered(grid: Grid, frame: pl.DataFrame) -> pl.DataFrame:
    """Rows by model and method as asked for, then by budget, the largest first."""
    models, methods = in_order(frame["model"], grid.about.models), in_order(frame["method"], grid.about.methods)
    by = [pl.col("model").replace_strict(models, list(range(len(models))), return_dtype=pl.Int64)]
    by.append(pl.col("method").replace_strict(methods, list(range(len(methods))), return_dtype=pl.Int64))
    return frame.sort([*by, *([-pl.col("budget")] if "budget" in frame.columns else [])], nulls_last=True)


def with_spread(mean: float | None, spread: float | None, form: str = ".4f") -> str:
    shown = text(number(mean), form)
    return shown if spread is None else f"{shown} ± {text(spread, form)}"


def ratio(value: float | None, of: float | None) -> str:
    return f"x{text(value / of, '.3g')}" if value and of else "–"


def results_table(grid: Grid) -> Table:
    numbers = ["auc", "logloss", "validation_auc", "embedding_parameters", "stored_parameters", "parameters", "missed"]
    summary = ordered(grid, summarize(grid.results, ["model", "method", "budget"], numbers))
    whole = {row["model"]: row["embedding_parameters"] for row in summary.rows(named=True) if row["method"] == FULL}
    rows = [
        [
            row["model"],
            row["method"],
            percent(row["budget"]),
            with_spread(row["auc"], row["auc_std"]),
            with_spread(row["logloss"], row["logloss_std"]),
            text(number(row["validation_auc"]), ".4f"),
            count(row["embedding_parameters"]),
            _share(row["embedding_parameters"], whole.get(row["model"])),
            count(row["stored_parameters"]),
            count(row["parameters"]),
            str(row["n"]),
            _missed(round(row["n"] * (row["missed"] or 0)), row["n"]),
        ]
        for row in summary.rows(named=True)
    ]
    return Table(
        id="results",
        title="All results",
        columns=[
            "Model", "Method", "Budget", "Test AUC", "Test logloss", "Validation AUC", "Embedding parameters",
            "Of the full", "Stored", "All parameters", "Seeds", "Missed",
        ],
        rows=rows,
        note="Means over seeds, ± one standard deviation. Embedding parameters are the numbers that are kept, of "
        "element-wise methods the nonzeros; stored is what tables take as they are, padded or with the zeros. Missed: "
        "models that are not within their budget.",
        heads=3,
        own=own_rows(rows),
    )  # fmt: skip


def ranking_table(grid: Grid, ranking: Ranking) -> Table:
    of_model = {
        model: rank_methods(grid.results.filter(pl.col("model") == model), ranking.budget) for model in grid.models
    }
    best = ", ".join(f"{m} {own.best.method} {text(own.best.auc, '.4f')}" for m, own in of_model.items() if own.best)
    rows = [
        [
            ranked.method,
            text(number(ranked.mean_rank), ".2f"),
            text(ranked.auc, ".4f"),
            *_compared(ranked.to_best),
            verdict(ranked, ranking),
            *_compared(ranked.to_chosen),
        ]
        for ranked in ranking.methods
    ]
    unranked = "; ".join(f"{method} ({n})" for method, n in ranking.unranked.items())
    left_out = f" Not ranked, since they missed the budget or have too few cells: {unranked}." if unranked else ""
    return Table(
        id=f"ranking-{ranking.budget:g}",
        title=f"Ranking at {percent(ranking.budget)} of the embedding parameters, n = {ranking.pairs}",
        columns=[
            "Method", "Mean rank", "Mean AUC", "Less the best", "95 % interval to it", "p to it", "Verdict",
            f"Less {CHOSEN}", f"95 % interval to {CHOSEN}", f"p to {CHOSEN}",
        ],
        rows=rows,
        note=f"n = {ranking.pairs}: the (model, seed) pairs that all of these methods have. Best mean of each model by "
        f"itself: {best}.{left_out}",
        own=own_rows(rows),
    )  # fmt: skip


def verdict(ranked: Ranked, ranking: Ranking) -> str:
    """What the test says of a method beside the best of its budget, and no more."""
    if ranked is ranking.best:
        return "best"
    if ranked.to_best is None or not ranked.to_best.told_apart:
        return "not told apart"
    return "behind" if ranked.to_best.mean < 0 else "ahead"


def missed_table(grid: Grid) -> Table | None:
    """The trained models that are not within their budget, each by name; None if there are none."""
    frame = ordered(grid, pl.concat([grid.results, grid.ablations]).filter(pl.col("missed")))
    rows = []
    for row in frame.rows(named=True):
        asked = row["budget_parameters"]
        name = f"{row['method']} {row['variant']}".strip()
        where = [row["model"], name, percent(row["budget"]), str(row["seed"])]
        rows.append([*where, count(row["embedding_parameters"]), count(asked)])
    if not rows:
        return None
    return Table(
        id="missed",
        title="Models that missed their budget",
        columns=["Model", "Method", "Budget", "Seed", "Embedding parameters", "Asked"],
        rows=rows,
        note="They are in all figures and tables, at what they reached.",
        heads=4,
    )


def bold(value: str) -> str:
    return Markup("<strong>{}</strong>").format(value)


def at_shown(grid: Grid) -> str:
    """Ends the title of what is shown at one budget."""
    return "" if grid.shown_budget is None else f" at {percent(grid.shown_budget)}"


def _share(part: float | None, whole: float | None) -> str:
    return percent(part / whole) if part is not None and whole else "–"


def _missed(missed: int, n: int) -> str:
    return f"{missed} of {n}" if missed else ""


def own_rows(rows: Sequence[Sequence[str]]) -> frozenset[int]:
    return frozenset(i for i, row in enumerate(rows) if CHOSEN in row[:2])


def _compared(difference: Difference | None) -> tuple[str, str, str]:
    if difference is None:
        return "–", "–", "–"
    low, high = (text(value, "+.4f") for value in (difference.low, difference.high))
    interval = "–" if math.isnan(difference.low) else f"{low} to {high}"
    p = "<0.001" if difference.p < 0.001 else text(difference.p, ".3f")
    return text(difference.mean, "+.4f"), interval, p
