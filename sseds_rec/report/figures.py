"""The figures of the report: plain Python and numpy in, one inline SVG string out."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sseds_rec.report.svg import COLORS, WIDTH, as_svg, log_ticks

Points = Sequence[tuple[float, float]]

SERIES = (("base", "o", "-"), ("slim", "s", "-"), ("muted", "^", "--"))  # colour, marker, line: never colour alone
MAX_POINTS = 500  # of the rank plot
_ROW = 0.165  # inches a row of a chart with one row a field


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height))
    return figure, figure.subplots()


def field_axis(axes: Axes, names: Sequence[str]) -> None:
    """One row a field, the first on top; the end of a long name tells more than its middle."""
    labels = [name if len(name) <= 20 else f"{name[:6]}…{name[-13:]}" for name in names]
    axes.set_yticks(range(len(names)), labels=labels)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def compact(count: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def _positive_order(scores: np.ndarray) -> np.ndarray:
    """Indices of the scores above 0, the largest first."""
    order = np.argsort(-scores, kind="stable")
    return order[scores[order] > 0]


def _empty(figure: Figure, axes: Axes) -> Figure:
    axes.set(xticks=[], yticks=[])
    axes.text(0.5, 0.5, "no dim has a saliency above 0", ha="center", va="center", transform=axes.transAxes)
    return figure


@as_svg
def saliency_rank(
    scores: np.ndarray, kept: np.ndarray, errors: np.ndarray | None = None, max_points: int = MAX_POINTS
) -> Figure:
    """Scores of all dims from the largest to the smallest, log-log (Figures 7 and 8 of the paper, left).

    Args:
        scores: saliency of every column of every table, float [N]; zeros cannot be drawn and are left out.
        kept: whether the plan keeps the column, bool [N].
        errors: standard errors, float [N]: a line behind each point spans 1.96 of them to either side.
        max_points: above this many dims, ranks are thinned evenly on the log axis.
    """
    order = _positive_order(scores)
    figure, axes = _figure(2.9)
    axes.set(xlabel="rank of the dim (log scale)", ylabel="saliency, all sum to 1 (log scale)")
    if not len(order):
        return _empty(figure, axes)
    scores, kept = scores[order], kept[order]
    ranks = np.arange(1, len(scores) + 1)
    if len(ranks) > max_points:
        ranks = np.unique(np.geomspace(1, len(scores), max_points).round().astype(int))
    if errors is not None:
        reach = 1.96 * errors[order][ranks - 1]
        shown = scores[ranks - 1]
        low = np.maximum(shown - reach, scores[-1] / 2)  # of an interval that holds 0, what the axis can show
        axes.vlines(ranks, low, shown + reach, color=COLORS["track"], linewidth=1.0, label="±1.96 standard errors")
    for side, color, marker, word in ((~kept, "dropped", "x", "dropped"), (kept, "slim", "o", "kept")):
        shown = ranks[side[ranks - 1]]
        label = f"{word} ({side.sum():,})"
        axes.plot(shown, scores[shown - 1], marker, color=COLORS[color], markersize=2.6, label=label)
    axes.set(xscale="log", yscale="log")
    log_ticks(axes.xaxis)
    log_ticks(axes.yaxis)
    axes.grid(True)
    axes.legend(loc="lower left", markerscale=1.6)
    return figure


@as_svg
def saliency_histogram(scores: np.ndarray, kept: np.ndarray, bins: int = 40) -> Figure:
    """How many dims have which saliency, kept and dropped stacked, log score axis; arguments as `saliency_rank`."""
    order = _positive_order(scores)
    scores, kept = scores[order], kept[order]
    figure, axes = _figure(2.9)
    axes.set(xlabel="saliency, all sum to 1 (log scale)", ylabel="number of dims")
    if not len(scores):
        return _empty(figure, axes)
    edges = np.geomspace(scores[-1] * 0.99, scores[0] * 1.01, bins + 1)
    counts = [np.histogram(scores[side], edges)[0] for side in (kept, ~kept)]
    widths = np.diff(edges)
    axes.bar(edges[:-1], counts[0], widths, align="edge", color=COLORS["slim"], label="kept")
    axes.bar(edges[:-1], counts[1], widths, counts[0], align="edge", color=COLORS["dropped"], label="dropped")
    axes.set_xscale("log")
    log_ticks(axes.xaxis)
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(True, axis="y")
    axes.legend(loc="upper left")
    return figure


@as_svg
def dims_per_field(names: Sequence[str], before: Sequence[int], after: Sequence[int], rows: Sequence[int]) -> Figure:
    """Searched dim of every field as a bar over the dim it had (Figures 7 and 8 of the paper, right).

    Args:
        names: the fields, drawn from top to bottom.
        before: embedding dim before the search.
        after: embedding dim after it, 0 for a dropped field.
        rows: number of embeddings.
    """
    figure, axes = _figure(_ROW * len(names) + 0.7)
    y, widest = np.arange(len(names)), max(before)
    axes.barh(y, before, height=0.72, color=COLORS["track"])
    axes.barh(y, after, height=0.72, color=COLORS["slim"])
    field_axis(axes, names)
    for i, (dim, count) in enumerate(zip(after, rows, strict=True)):
        note = f"{dim} · {compact(count)} rows" if dim else f"0, dropped · {compact(count)} rows"
        color = COLORS["ink" if dim else "muted"]
        axes.text(widest * 1.02, i, note, va="center", fontsize=7, color=color)
    axes.set_xlim(0, widest * 1.62)
    axes.set_xticks(np.unique(np.linspace(0, widest, 5).round().astype(int)))
    axes.set_xlabel("embedding dim (full bar: before)", loc="left")
    axes.spines["bottom"].set_bounds(0, widest)
    return figure


@as_svg
def saliency_heatmap(names: Sequence[str], saliency: Sequence[np.ndarray], kept: Sequence[Sequence[int]]) -> Figure:
    """Saliency of every dim of every field as colour; a field's kept dims come first, each part from high to low.

    Args:
        names: the fields, drawn from top to bottom.
        saliency: scores of the field's columns, float [D] each; D may differ.
        kept: indices of the columns the plan keeps.
    """
    cells = np.full((len(names), max(len(scores) for scores in saliency)), np.nan)
    for row, scores, columns in zip(cells, saliency, kept, strict=True):
        is_kept = np.isin(np.arange(len(scores)), columns)
        row[: len(scores)] = scores[np.lexsort((-scores, ~is_kept))]
    positive = cells[cells > 0]
    high = positive.max() if positive.size else 1.0
    low = max(positive.min(), high / 1e6) if positive.size else 0.1  # below a millionth, all is equally dark
    figure, axes = _figure(_ROW * len(names) + 1.2)
    norm = LogNorm(low, high * 1.001, clip=True)
    colors = matplotlib.colormaps["cividis"](norm(np.nan_to_num(cells)))
    colors[np.isnan(cells), 3] = 0  # beyond a narrower table
    axes.imshow(colors, aspect="auto", interpolation="none")
    ends = [len(columns) - 0.5 for columns in kept]
    axes.vlines(ends, np.arange(len(names)) - 0.5, np.arange(len(names)) + 0.5, color=COLORS["slim"], linewidth=1.8)
    field_axis(axes, names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(-1, cells.shape[1] - 0.5)
    axes.set_xlabel("dims, kept ones first (line: the cut)")
    scale = ScalarMappable(norm, "cividis")
    bar = figure.colorbar(
        scale, ax=axes, location="bottom", extend="min", aspect=40, pad=0.02, label="saliency (log scale)"
    )
    log_ticks(bar.ax.xaxis)
    bar.ax.tick_params(which="minor", length=0)
    return figure


@as_svg
def quality(models: Mapping[str, tuple[float, float]]) -> Figure:
    """Test AUC and logloss, one dot a model, on axes that show a small difference but do not blow it up.

    Args:
        models: label to (AUC, logloss), drawn from top to bottom.
    """
    figure = Figure(figsize=(WIDTH, 0.62 * len(models) + 1.5))
    panels = (("test AUC", 0), ("test logloss", 1))
    for axes, (label, index) in zip(figure.subplots(2, 1), panels, strict=True):
        values = np.array([pair[index] for pair in models.values()])
        finite = values[np.isfinite(values)]
        low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
        half = max(0.75 * (high - low), 0.005)  # 0.01 at least: noise between seeds must not look like a gap
        axes.set_xlim((low + high) / 2 - half, (low + high) / 2 + half)
        for i, value in enumerate(values):
            color, marker, _ = SERIES[i % len(SERIES)]
            axes.plot(value, i, marker, color=COLORS[color], markersize=6)
            if np.isfinite(value):
                axes.annotate(f"{value:.4f}", (value, i), (0, 6), textcoords="offset points", ha="center", fontsize=7.5)
        field_axis(axes, list(models))
        axes.set_ylim(len(models) - 0.6, -0.8)
        axes.grid(True)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(f"{label} (axis starts at {axes.get_xlim()[0]:.3f})")
    return figure


def _thinned(points: Points, limit: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Means of consecutive points, so that a long run stays a small figure."""
    epochs, values = np.array(points, dtype=float).reshape(-1, 2).T
    if len(points) <= limit:
        return epochs, values
    groups = np.array_split(np.arange(len(points)), limit)
    return np.array([epochs[g].mean() for g in groups]), np.array([values[g].mean() for g in groups])


@as_svg
def learning_curves(validation_auc: Mapping[str, Points], train_loss: Mapping[str, Points]) -> Figure:
    """Validation AUC and training loss by epoch.

    Args:
        validation_auc: label of the stage to its points (epoch, AUC).
        train_loss: label of the stage to its points (epoch, mean loss); thinned above 200 points.
    """
    figure = Figure(figsize=(WIDTH, 4.2))
    upper, lower = figure.subplots(2, 1, sharex=True)
    for axes, curves, marked in ((upper, validation_auc, True), (lower, train_loss, False)):
        for (label, points), (color, marker, line) in zip(curves.items(), SERIES, strict=False):
            epochs, values = _thinned(points)
            style = {"marker": marker, "markersize": 4} if marked else {}
            axes.plot(epochs, values, line, color=COLORS[color], linewidth=1.3, label=label, **style)
        axes.grid(True)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.margins(y=0.12)
    upper.legend(loc="lower right")
    upper.set_ylabel("validation AUC")
    lower.set_ylabel("training loss (logloss)")
    lower.set_xlabel("epoch (vertical axes do not start at 0)")
    lower.set_xlim(left=0)
    return figure


@as_svg
def memory_per_field(names: Sequence[str], before: Sequence[float], after: Sequence[float]) -> Figure:
    """Embedding memory of every field before and after the search, as two dots on a log axis.

    Args:
        names: the fields, drawn from top to bottom.
        before: MiB before the search.
        after: MiB after it; 0 (a dropped field) is a cross at the left edge.
    """
    figure, axes = _figure(_ROW * len(names) + 0.9)
    y, old, new = np.arange(len(names)), np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    gone = new <= 0
    positive = np.concatenate([old[old > 0], new[new > 0]])
    left = positive.min() / 3
    axes.hlines(y, np.where(gone, left, new), old, color=COLORS["track"], linewidth=2.5)
    axes.plot(old, y, "o", color=COLORS["base"], markersize=4.5, markerfacecolor="none", label="before")
    axes.plot(new[~gone], y[~gone], "s", color=COLORS["slim"], markersize=4.2, label="after")
    if gone.any():
        axes.plot(
            np.full(gone.sum(), left), y[gone], "x", color=COLORS["muted"], markersize=4.5, label="dropped: 0 MiB"
        )
    axes.set(xscale="log", xlim=(left / 1.3, positive.max() * 1.6))
    axes.set_xlabel("embedding weights (MiB, log scale)")
    log_ticks(axes.xaxis)
    field_axis(axes, names)
    axes.grid(True, axis="x")
    figure.legend(loc="outside upper center", ncols=3)
    return figure


@as_svg
def memory_per_rank(mib: Mapping[str, np.ndarray]) -> Figure:
    """What each rank holds, one outline a model.

    Args:
        mib: "base" and "slim" -> MiB of each rank, float [ranks]; their numbers may differ.
    """
    figure, axes = _figure(2.6)
    for label, held in mib.items():
        filled = label == "slim"
        axes.stairs(held, np.arange(len(held) + 1) - 0.5, fill=filled, color=COLORS[label], linewidth=1.3, label=label)
    axes.set(xlabel="rank", ylabel="embedding weights (MiB)")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.grid(True, axis="y")
    figure.legend(loc="outside upper center", ncols=2)
    return figure
