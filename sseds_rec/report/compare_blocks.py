"""The figures of a comparison with the words around them, for each model."""

from __future__ import annotations

import numpy as np
import polars as pl

from sseds_rec.compare.statistics import summarize
from sseds_rec.report import compare_figures as figures
from sseds_rec.report.artefacts import printable
from sseds_rec.report.blocks import MAX_FIELDS, FigureBlock
from sseds_rec.report.compare_artefacts import Grid, in_order
from sseds_rec.report.compare_costs import at_shown_budget
from sseds_rec.report.compare_search import SEARCHED
from sseds_rec.report.compare_tables import CHOSEN, at_shown
from sseds_rec.report.numbers import percent, text


def auc_blocks(grid: Grid) -> list[FigureBlock]:
    blocks = []
    several = len(grid.about.seeds) > 1
    for i, model in enumerate(grid.models):
        own = grid.results.filter(
            pl.col("model") == model, pl.col("auc").is_finite(), pl.col("embedding_parameters") > 0
        )
        series = []
        for method in in_order(own["method"], grid.methods):
            line = summarize(own.filter(pl.col("method") == method), ["budget"], ["embedding_parameters", "auc"])
            line = line.sort("embedding_parameters")
            columns = (line[name].cast(pl.Float64).to_numpy() for name in ("embedding_parameters", "auc", "auc_std"))
            series.append(figures.Series(method, *columns))
        if not series:
            continue
        span = "; ".join(f"{one.method} {_span(one.auc)}" for one in series)
        bars = " A bar is one standard deviation over the seeds to either side." if several else ""
        blocks.append(
            FigureBlock(
                id=f"auc-{i}",
                title=f"{model}: test AUC against embedding parameters",
                svg=figures.auc_against_parameters(series),
                caption="Up and to the left is better. The dotted lines are the methods without a budget. The vertical axis "
                f"does not start at 0; where a second panel is below, it has the same points down to the lowest.{bars}",
                alt=f"Line plot of mean test AUC by method, over all budgets: {span}.",
            )
        )
    return blocks


def _span(values: np.ndarray) -> str:
    low, high = text(float(values.min()), ".4f"), text(float(values.max()), ".4f")
    return low if low == high else f"{low} to {high}"


def cost_blocks(grid: Grid) -> list[FigureBlock]:
    blocks = []
    parts = {part: f"{part}_seconds" for part in ("pretrain", "search", "retrain")}
    summary = at_shown_budget(grid)
    for i, model in enumerate(grid.models):
        own = summary.filter(pl.col("model") == model)
        methods = own["method"].to_list()
        seconds = {part: own[column].fill_null(0).to_list() for part, column in parts.items()}
        totals = ", ".join(
            f"{method} {total:,.1f} s" for method, total in own.select("method", "total_seconds").iter_rows()
        )
        blocks.append(
            FigureBlock(
                id=f"time-{i}",
                title=f"{model}: training time{at_shown(grid)}",
                svg=figures.training_time(methods, seconds),
                caption="Means over seeds. What a search adds to training is the middle part of a bar; the number is "
                "the whole, in seconds.",
                alt=f"Stacked bars of pretraining, search and retraining seconds by method; in all: {totals}.",
            )
        )
        fast = own.filter(pl.col("inference_samples_per_second").is_not_null())
        if fast.is_empty():
            continue
        names, speed = fast["method"].to_list(), fast["inference_samples_per_second"].to_list()
        known = fast["inference_samples_per_second_std"].is_not_null().any()
        spread = ", with one standard deviation" if known else ""
        words = ", ".join(f"{name} {value:,.0f}" for name, value in zip(names, speed, strict=True))
        blocks.append(
            FigureBlock(
                id=f"speed-{i}",
                title=f"{model}: speed of inference{at_shown(grid)}",
                svg=figures.inference_speed(
                    names, speed, fast["inference_samples_per_second_std"].fill_null(np.nan).to_list()
                ),
                caption=f"Longer is faster; {CHOSEN} is in its own colour. Means over seeds{spread}.",
                alt=f"Bars of samples a second in inference by method: {words}.",
            )
        )
    return blocks


def search_blocks(grid: Grid) -> list[FigureBlock]:
    blocks = []
    for i, model in enumerate(grid.models):
        blocks += _saliency_block(grid, model, i) + _dims_block(grid, model, i)
    return blocks


def _saliency_block(grid: Grid, model: str, i: int) -> list[FigureBlock]:
    own = grid.saliency.filter(pl.col("model") == model)
    methods = [method for method in SEARCHED if method in own["method"]]
    scores = {
        method: [seed["score"].to_numpy() for seed in own.filter(pl.col("method") == method).partition_by("seed")]
        for method in methods
    }
    if not any((values > 0).any() for seeds in scores.values() for values in seeds):
        return []
    top = "; ".join(
        f"{method} {percent(round(np.mean([_top(s) for s in seeds]), 4))}" for method, seeds in scores.items()
    )
    return [
        FigureBlock(
            id=f"saliency-{i}",
            title=f"{model}: distribution of the saliency",
            svg=figures.saliency_curves(scores),
            caption=f"One line a seed. The first hundredth of the columns holds of the sum: {top}. A steep fall means that few "
            f"columns carry the loss. The columns of {CHOSEN} are coordinates after its rotation. Scores below "
            "a hundred-millionth of the largest are not drawn.",
            alt=f"Log-log rank plot of the saliency of every column; the first hundredth of them holds {top}.",
        )
    ]


def _top(scores: np.ndarray) -> float:
    """Share of the sum that the largest hundredth of the scores holds."""
    return float(np.sort(scores)[::-1][: max(1, len(scores) // 100)].sum() / scores.sum()) if scores.sum() > 0 else 0.0


def _dims_block(grid: Grid, model: str, i: int) -> list[FigureBlock]:
    own = grid.widths.filter(pl.col("model") == model, grid.is_shown, pl.col("method").is_in(SEARCHED))
    if own.is_empty():
        return []
    fields = own.group_by("field").agg(pl.col("rows").max(), pl.col("dim").mean())
    largest = fields.sort("rows", "field", descending=[True, False]).head(MAX_FIELDS)
    names = largest.sort("dim", "rows", descending=[True, False])["field"].to_list()
    dims = own.rows_by_key(["method", "field"], named=True)
    methods = [method for method in SEARCHED if method in own["method"]]
    drawn = {
        method: [np.array([row["dim"] for row in dims.get((method, name), [])]) for name in names] for method in methods
    }
    hidden = fields.height - len(names)
    remark = f" The {MAX_FIELDS} largest fields; {hidden:,} more are in the table." if hidden else ""
    dropped = own.group_by("method").agg((pl.col("dim") == 0).mean())
    words = ", ".join(
        f"{method} drops {percent(round(share, 3))} of the fields" for method, share in dropped.sort("method").rows()
    )
    return [
        FigureBlock(
            id=f"dims-{i}",
            title=f"{model}: searched dim of every field{at_shown(grid)}",
            svg=figures.dims_by_field([printable(name) for name in names], max(own["original_dim"]), drawn),
            caption=f"A marker is the mean over seeds, a line spans them; 0 is a field that is dropped.{remark}",
            alt=f"Dot plot of the embedding dim by field: {words}.",
        )
    ]
