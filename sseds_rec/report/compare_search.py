"""What the searches of a comparison found, and which of their steps matter."""

from __future__ import annotations

import math

import polars as pl

from sseds_rec.compare.statistics import summarize
from sseds_rec.report.artefacts import printable
from sseds_rec.report.compare_artefacts import Grid, in_order
from sseds_rec.report.compare_tables import FULL, Table, at_shown, bold, with_spread
from sseds_rec.report.numbers import count, number, percent, text

PAPER = "sseds_paper"
SEARCHED = ("sseds", PAPER)
_STARTS = ("select", "random")
_STEPS = ("without retraining", "without ticket", "without rescaling", "in full")


def dims_table(grid: Grid, model: str, number_of: int) -> Table | None:
    """Mean dim of every field under each method that ends in widths; None if none of this model does."""
    own = grid.widths.filter(pl.col("model") == model, grid.is_shown)
    if own.is_empty():
        return None
    methods = in_order(own["method"], grid.about.methods)
    means = own.group_by("field", "method").agg(pl.col("dim").mean())
    dims = {(name, method): dim for name, method, dim in means.iter_rows()}
    fields = own.group_by("field").agg(pl.col("rows").max(), pl.col("original_dim").max())
    rows = [
        [printable(name), count(size), str(width), *(text(number(dims.get((name, m))), ".3g") for m in methods)]
        for name, size, width in fields.sort("rows", "field", descending=[True, False]).iter_rows()
    ]
    return Table(
        id=f"dims-table-{number_of}",
        title=f"{model}: dim of every field{at_shown(grid)}",
        columns=["Field", "Rows", "Dim before", *methods],
        rows=rows,
        note="Means over seeds; largest field first. 0: the field is dropped.",
    )


def ablation_table(grid: Grid) -> Table | None:
    """AUC without retraining, without the ticket and with both, by start of the transform matrices; None without any.

    It has the budgets of the ablations, or, if there are none, the one that figures show.
    """
    cells = pl.concat([grid.results.filter(pl.col("method").is_in(SEARCHED)), grid.ablations])
    budgets = set(grid.ablations["budget"].drop_nulls()) or {grid.shown_budget}
    cells = cells.filter(pl.col("budget").is_in([b for b in budgets if b is not None]))
    if cells.is_empty():
        return None
    variant = pl.col("variant").str
    random = (pl.col("method") == PAPER) & ~variant.starts_with("select") | variant.starts_with("random")
    *parts, whole = _STEPS
    steps = [pl.when(variant.ends_with(part.replace(" ", "_"))).then(pl.lit(part)) for part in parts]
    cells = cells.with_columns(
        transform=pl.when(random).then(pl.lit("random")).otherwise(pl.lit("select")),
        step=pl.coalesce(*steps, pl.lit(whole)),
    )
    # The slim stage measures the cut model as `select` starts it.
    untrained = cells.filter(pl.col("step") == whole, ~random, pl.col("auc_before_retraining").is_not_null())
    untrained = untrained.with_columns(pl.col("auc_before_retraining").alias("auc"), step=pl.lit(_STEPS[0]))
    summary = summarize(
        pl.concat([cells, untrained]), ["budget", "method", "step", "model", "transform"], ["auc"]
    ).rows_by_key(["budget", "method", "step", "model", "transform"], named=True, unique=True)
    found = {key: (row["auc"], row["auc_std"]) for key, row in summary.items()}
    base = summarize(grid.results.filter(pl.col("method") == FULL), ["model"], ["auc"]).rows(named=True)
    full = {row["model"]: (row["auc"], row["auc_std"]) for row in base}

    columns = [(model, transform) for model in in_order(cells["model"], grid.about.models) for transform in _STARTS]
    methods = in_order(cells["method"], grid.about.methods)
    keys = [(b, m, step) for b in sorted(budgets, reverse=True) for m in methods for step in _STEPS]
    lines = [(["–", FULL, "all columns"], [full.get(model) for model, _ in columns])]
    for budget, method, step in keys:
        values = [found.get((budget, method, step, *column)) for column in columns]
        if any(values):
            lines.append(([percent(budget), method, step], values))
    best = [
        max((mean for mean, _ in filter(None, column) if mean is not None), default=math.nan)
        for column in zip(*(values for _, values in lines), strict=True)
    ]
    rows = [[*names, *(_cell(value, best[i]) for i, value in enumerate(values))] for names, values in lines]
    return Table(
        id="ablation",
        title="Without retraining, without the winning ticket, without rescaling, and in full",
        columns=["Budget", "Method", "Test AUC", *(f"{model}, {transform}" for model, transform in columns)],
        rows=rows,
        note="Means over seeds, ± one standard deviation; the best of a column is bold. Without retraining: the cut model as "
        "it is. Without ticket: retrained from new embeddings of the searched widths. Without rescaling: the ticket as it was "
        "cut, and no table of it drawn anew. select and random are the two starts of the transform matrices; the paper's is "
        "random.",
        heads=3,
    )


def _cell(value: tuple[float | None, float | None] | None, best: float) -> str:
    if value is None:
        return "–"
    shown = with_spread(*value)
    return bold(shown) if value[0] == best else shown
