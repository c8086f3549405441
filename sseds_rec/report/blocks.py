"""The figures of one run with the words around them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sseds_rec.report import figures
from sseds_rec.report.artefacts import Run, Table
from sseds_rec.report.numbers import mib, number, percent, text
from sseds_rec.report.placement import Placements

MAX_FIELDS = 40  # rows of a chart that are still legible; the table below the charts has every field


@dataclass(frozen=True)
class FigureBlock:
    """A figure with the words around it: what it is, how to read it, and what it says to who cannot see it."""

    id: str
    title: str
    svg: str
    caption: str
    alt: str


def _shown(tables: Sequence[Table]) -> tuple[list[Table], str]:
    """The tables that the charts by field draw, by dim and then by rows, and a remark on those that are left out."""
    largest = sorted(tables, key=lambda table: -table.parameters_before)[:MAX_FIELDS]
    hidden = len(tables) - len(largest)
    remark = f" The {MAX_FIELDS} largest fields; {hidden:,} more are in the plan below." if hidden else ""
    return sorted(largest, key=lambda table: (-table.dim, table.rows)), remark


def quality_block(run: Run) -> FigureBlock:
    stages = {"base": "pretrain", "slim": "retrain", "slim, not retrained": "slim"}
    models = {
        label: (number(run.metrics[stage].get("auc")), number(run.metrics[stage].get("logloss")))
        for label, stage in stages.items()
        if isinstance(run.metrics.get(stage), dict)
    }
    words = "; ".join(f"{label}: AUC {text(a, '.4f')}, logloss {text(b, '.4f')}" for label, (a, b) in models.items())
    return FigureBlock(
        id="quality",
        title="Quality on the test split",
        svg=figures.quality(models),
        caption="AUC is better to the right, logloss to the left; neither axis starts at 0, so read the distances "
        "against the tick labels.",
        alt=f"Dot plot of the test metrics. {words}.",
    )


def search_blocks(run: Run) -> list[FigureBlock]:
    return [*_saliency_blocks(run), _dims_block(run), _heatmap_block(run)] if run.is_scored else [_dims_block(run)]


def _saliency_blocks(run: Run) -> list[FigureBlock]:
    scores = np.concatenate([table.saliency for table in run.tables])
    kept = np.concatenate([np.isin(np.arange(table.original_dim), table.kept) for table in run.tables])
    known = [table.errors for table in run.tables if table.errors is not None]
    errors = np.concatenate(known) if len(known) == len(run.tables) else None
    interval = (
        " A line spans 1.96 standard errors to either side, over other draws of the batches."
        if errors is not None
        else ""
    )
    top = np.sort(scores)[::-1][: max(1, len(scores) // 100)].sum()
    zeros = int((scores <= 0).sum())
    thinned = " Of the lower ranks, only some are drawn." if len(scores) > figures.MAX_POINTS else ""
    unseen = f" {zeros:,} dims with a saliency of 0 are not drawn." if zeros else ""
    return [
        FigureBlock(
            id="saliency-rank",
            title="Saliency of every dim, ranked",
            svg=figures.saliency_rank(scores, kept, errors),
            caption="Each point is one dim of one field; a steep fall means that few dims carry the loss. Kept and "
            f"dropped points mix where the plan also weighs the number of rows.{interval}{thinned}{unseen}",
            alt=f"Log-log rank plot of {len(scores):,} saliency scores; the first percent holds {percent(top)} of the "
            f"sum; {kept.sum():,} dims are kept.",
        ),
        FigureBlock(
            id="saliency-histogram",
            title="Distribution of the saliency",
            svg=figures.saliency_histogram(scores, kept),
            caption="The height of a bar is the number of dims whose saliency lies in that range: dims further right "
            f"matter more to the loss.{unseen}",
            alt=f"Histogram of {len(scores):,} saliency scores on a log axis, {kept.sum():,} kept, "
            f"{(~kept).sum():,} dropped.",
        ),
    ]


def _dims_block(run: Run) -> FigureBlock:
    shown, remark = _shown(run.tables)
    dims = np.array([table.dim for table in run.tables])
    spread = f"{(dims == 0).sum():,} of {len(dims):,} fields dropped, median dim {np.median(dims):g}, max {dims.max()}"
    return FigureBlock(
        id="dims",
        title="Searched dim per field",
        svg=figures.dims_per_field(
            [t.label for t in shown], [t.original_dim for t in shown], [t.dim for t in shown], [t.rows for t in shown]
        ),
        caption="The coloured part of a bar is what the plan leaves of the embedding dim; the full bar is the dim "
        f"before the search.{remark}",
        alt=f"Bar chart of the embedding dim per field: {spread}.",
    )


def _heatmap_block(run: Run) -> FigureBlock:
    shown, remark = _shown(run.tables)
    return FigureBlock(
        id="saliency-fields",
        title="Saliency by field and dim",
        svg=figures.saliency_heatmap([t.label for t in shown], [t.saliency for t in shown], [t.kept for t in shown]),
        caption="A brighter cell is a dim that matters more to the loss; what is right of the line was cut. "
        f"Same order of fields as the searched dims.{remark}",
        alt="Heat map of saliency, one row a field and one column a dim, with the cut of the plan in each row.",
    )


def training_blocks(run: Run) -> list[FigureBlock]:
    shown, remark = _shown(run.tables)
    shown = sorted(shown, key=lambda table: -table.parameters_before)
    before, after = (sum(getattr(t, side) for t in run.tables) for side in ("mib_before", "mib_after"))
    labels = {"base (pretrain)": "pretrain", "slim (retrain)": "retrain"}
    best = [max((auc for _, auc in run.curves[stage].validation_auc), default=math.nan) for stage in labels.values()]
    return [
        FigureBlock(
            id="memory",
            title="Embedding memory per field",
            svg=figures.memory_per_field(
                [f"all {len(run.tables):,} fields", *(table.label for table in shown)],
                [before, *(table.mib_before for table in shown)],
                [after, *(table.mib_after for table in shown)],
            ),
            caption="The longer the line, the larger the part of its memory that a field gave back (log axis). "
            f"In all {mib(before)} MiB before and {mib(after)} MiB after (float32 weights, without optimizer "
            f"state).{remark}",
            alt=f"Dot plot of memory per field on a log axis; in all {mib(before)} MiB before, {mib(after)} MiB after.",
        ),
        FigureBlock(
            id="curves",
            title="Learning curves",
            svg=figures.learning_curves(
                {label: run.curves[stage].validation_auc for label, stage in labels.items()},
                {label: run.curves[stage].train_loss for label, stage in labels.items()},
            ),
            caption="A curve that reaches its best earlier needs fewer passes over the data; training loss that falls "
            "while validation AUC falls too is overfitting.",
            alt=f"Validation AUC and training loss by epoch; best validation AUC: base {text(best[0], '.4f')}, slim "
            f"{text(best[1], '.4f')}.",
        ),
    ]


def placement_block(placements: Placements) -> FigureBlock:
    return FigureBlock(
        id="ranks",
        title="Embedding memory per rank",
        svg=figures.memory_per_rank({"base": placements.base.mib, "slim": placements.slim.mib}),
        caption="A step takes as long as its slowest rank, and a rank that is full ends the run: the lower and the more "
        "even, the better (float32 weights, without optimizer state).",
        alt=f"Bar chart of embedding weights per rank. {placements.summary}",
    )
