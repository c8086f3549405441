"""The figures of a comparison: plain Python and numpy in, one inline SVG string out.

A method has one colour, one marker and one line in all figures: related methods share a colour, markers all differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from sseds_rec.report.figures import MAX_POINTS, compact, field_axis
from sseds_rec.report.svg import COLORS, WIDTH, as_svg, log_ticks

REFERENCES = ("full", "drop_ids")  # methods without a budget


@dataclass(frozen=True)
class Style:
    """How a method is drawn; of the two of a colour, the second is dashed and has open markers."""

    color: str
    marker: str
    second: bool = False
    bold: bool = False
    size: float = 4.2  # points

    @property
    def line(self) -> dict[str, Any]:
        width = 1.0 + 1.2 * self.bold
        return {"color": COLORS[self.color], "linestyle": "--" if self.second else "-", "linewidth": width}

    @property
    def points(self) -> dict[str, Any]:
        face = COLORS["surface" if self.second else self.color]
        return {"marker": self.marker, "markersize": self.size, "markerfacecolor": face}


STYLES = {
    "full": Style("ink", "*", size=7.5),
    "drop_ids": Style("ink", "X", second=True, size=6.5),
    "uniform": Style("base", "s"),
    "random": Style("muted", "p"),
    "magnitude": Style("purple", "v"),
    "pca_energy": Style("purple", "D", second=True),
    "mde": Style("green", "^"),
    "autodim": Style("green", "h", second=True),
    "pep": Style("amber", "<"),
    "deeplight": Style("amber", ">", second=True),
    "sseds_paper": Style("slim", "d", second=True),
    "sseds": Style("slim", "o", bold=True, size=5.4),
}
_OTHER = Style("muted", "P", second=True)
FAINT = 1e-8
_ROW = 0.19  # inches a row of a bar chart
_LEAST_SPAN = 0.01  # AUC of a vertical axis: noise between seeds must not look like a gap


@dataclass(frozen=True)
class Series:
    """One method: its points in order of parameters, float [N] each; `spread` is NaN where there is one seed only."""

    method: str
    parameters: np.ndarray
    auc: np.ndarray
    spread: np.ndarray


def style_of(method: str) -> Style:
    return STYLES.get(method, _OTHER)


@as_svg
def auc_against_parameters(series: Sequence[Series]) -> Figure:
    """Test AUC against embedding parameters, log axis, one line a method (Figures 2 and 3 of the paper).

    Methods without a budget are single points with a line through the whole figure. Where the worst points would press
    the others together, a lower panel has all of them and the upper one the better part.
    """
    auc = np.concatenate([one.auc for one in series])
    window = _window(auc)
    panels = 2 if auc.min() < window[0] else 1
    figure = Figure(figsize=(WIDTH, 3.2 + 1.6 * (panels - 1) + 0.16 * -(-len(series) // 3)))
    every = figure.subplots(panels, 1, sharex=True, squeeze=False, height_ratios=[2.4, 1.4][:panels])[:, 0]
    for axes in every:
        for one in series:
            _draw(axes, one)
        axes.set_xscale("log")
        axes.grid(True)
        axes.margins(x=0.06)
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.set_ylabel("test AUC")
    every[0].set_ylim(*window)
    if panels == 2:
        every[1].set_ylim(*_padded(auc.min(), auc.max()))
        every[1].set_ylabel("all of them")
    _count_ticks(every[-1].xaxis, np.concatenate([one.parameters for one in series]))
    every[-1].set_xlabel("embedding parameters kept (log scale)")
    handles, labels = every[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, columnspacing=1.2, handlelength=2.4)
    return figure


def _draw(axes: Axes, one: Series) -> None:
    style = style_of(one.method)
    order = 3 + style.bold
    if one.method in REFERENCES:
        axes.axhline(one.auc[0], **{**style.line, "linestyle": ":"}, zorder=1)
    spread = one.spread if np.isfinite(one.spread).any() else None
    axes.errorbar(
        one.parameters, one.auc, spread, **style.line, **style.points,
        capsize=2, elinewidth=0.8, capthick=0.8, label=one.method, zorder=order,
    )  # fmt: skip


def _window(auc: np.ndarray) -> tuple[float, float]:
    """Limits for all values or, where a few are far below the others, for the better part of them."""
    worst, high = float(auc.min()), float(auc.max())
    span = max(2.5 * (high - float(np.median(auc))), _LEAST_SPAN)
    return _padded(worst if worst > high - 1.5 * span else high - span, high)


def _padded(low: float, high: float) -> tuple[float, float]:
    missing = max(0.0, _LEAST_SPAN - (high - low)) / 2
    pad = 0.07 * max(high - low, _LEAST_SPAN)
    return low - missing - pad, high + missing + pad


def _count_ticks(axis: Axis, values: np.ndarray) -> None:
    dense = values.max() / values.min() < 200
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if dense else (1,), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    axis.set_minor_formatter(NullFormatter())


@as_svg
def training_time(methods: Sequence[str], parts: Mapping[str, Sequence[float]]) -> Figure:
    """Seconds of pretraining, search and retraining, stacked, one bar a method (Figures 4 and 5 of the paper).

    Args:
        methods: drawn from top to bottom.
        parts: "pretrain", "search", "retrain" -> seconds of each method.
    """
    figure = Figure(figsize=(WIDTH, _ROW * len(methods) + 1.0))
    axes = figure.subplots()
    left = np.zeros(len(methods))
    for (part, seconds), color in zip(parts.items(), ("dropped", "slim", "base"), strict=True):
        values = np.asarray(seconds, dtype=float)
        axes.barh(range(len(methods)), values, left=left, height=0.68, color=COLORS[color], label=part)
        left += values
    for row, (total, search) in enumerate(zip(left, parts["search"], strict=True)):
        words = f"{total:,.1f}" + (f", search {search:.2g}" if 0 < search < 100 else "")  # of more, the bar tells
        axes.text(total + 0.015 * left.max(), row, words, va="center", fontsize=7)
    axes.set_xlim(0, max(1.3 * left.max(), 1e-3))
    _method_axis(axes, methods)
    axes.set_xlabel("seconds")
    figure.legend(loc="outside upper center", ncols=3)
    return figure


@as_svg
def inference_speed(methods: Sequence[str], speed: Sequence[float], spread: Sequence[float]) -> Figure:
    """Samples a second in inference, one bar a method; `spread` is the standard deviation, NaN where unknown."""
    figure = Figure(figsize=(WIDTH, _ROW * len(methods) + 0.8))
    axes = figure.subplots()
    values, error = np.asarray(speed, dtype=float), np.nan_to_num(np.asarray(spread, dtype=float))
    colors = [COLORS["slim" if style_of(method).bold else "base"] for method in methods]
    errors = error if error.any() else None
    style = {"elinewidth": 0.8, "capsize": 2, "ecolor": COLORS["ink"]}
    axes.barh(range(len(methods)), values, xerr=errors, height=0.68, color=colors, error_kw=style)
    most = float((values + error).max())
    for row, value in enumerate(values):
        axes.text(value + error[row] + 0.015 * most, row, compact(value), va="center", fontsize=7)
    axes.set_xlim(0, max(1.17 * most, 1e-3))
    _method_axis(axes, methods)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    axes.set_xlabel("samples a second")
    return figure


def _method_axis(axes: Axes, methods: Sequence[str]) -> None:
    field_axis(axes, methods)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(True, axis="x")


@as_svg
def saliency_curves(scores: Mapping[str, Sequence[np.ndarray]]) -> Figure:
    """Scores from the largest to the smallest, log-log, one line a seed (Figures 7 and 8 of the paper, left).

    Args:
        scores: method -> for each seed the scores of all columns of all fields, float [N]; those below `FAINT` of the
            largest, zeros among them, are not drawn.
    """
    figure = Figure(figsize=(WIDTH, 3.1))
    axes = figure.subplots()
    for method, seeds in scores.items():
        for i, values in enumerate(seeds):
            ranked = np.sort(values[values > FAINT * values.max()])[::-1]
            if not len(ranked):
                continue
            ranks = np.unique(np.geomspace(1, len(ranked), min(MAX_POINTS // 4, len(ranked))).round().astype(int))
            line = {**style_of(method).line, "linewidth": 1.1}
            axes.plot(ranks, ranked[ranks - 1], **line, label=None if i else method)
    axes.set(xscale="log", yscale="log")
    axes.set(xlabel="rank of the column (log scale)", ylabel="saliency, all sum to 1 (log scale)")
    log_ticks(axes.xaxis)
    log_ticks(axes.yaxis)
    axes.grid(True)
    axes.legend(loc="lower left")
    return figure


@as_svg
def dims_by_field(names: Sequence[str], widest: int, dims: Mapping[str, Sequence[np.ndarray]]) -> Figure:
    """Dims that methods leave to each field (Figures 7 and 8 of the paper, right).

    Args:
        names: the fields, drawn from top to bottom.
        widest: embedding dim before the search.
        dims: method -> for each field its dim in each seed, [seeds]; a line spans them, the marker is their mean.
    """
    figure = Figure(figsize=(WIDTH, 0.165 * len(names) + 1.0))
    axes = figure.subplots()
    step = 0.26
    for i, (method, fields) in enumerate(dims.items()):
        y = np.arange(len(names)) + step * (i - (len(dims) - 1) / 2)
        style = style_of(method)
        low, mean, high = (np.array([how(own) if len(own) else np.nan for own in fields]) for how in _EXTENT)
        axes.hlines(y, low, high, color=COLORS[style.color], linewidth=1.0)
        axes.plot(
            mean, y, linestyle="none", color=COLORS[style.color], **{**style.points, "markersize": 3.6}, label=method
        )
    field_axis(axes, names)
    axes.set_xlim(-0.02 * widest, 1.03 * widest)
    axes.set_xticks(np.unique(np.linspace(0, widest, 5).round().astype(int)))
    axes.grid(True, axis="x")
    axes.set_xlabel(f"embedding dim (of {widest})")
    figure.legend(loc="outside upper center", ncols=3)
    return figure


_EXTENT = (np.min, np.mean, np.max)
