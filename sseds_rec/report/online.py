"""Write `report/online.html`: accuracy and parameters of base and slim model, window by window."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from sseds_rec.files import read_json
from sseds_rec.online.records import Record, read_records, summary
from sseds_rec.report.blocks import FigureBlock
from sseds_rec.report.numbers import count, text
from sseds_rec.report.svg import COLORS, WIDTH, as_svg
from sseds_rec.report.templates import render_template, write_page

_SIDES = (("base", "o", "-"), ("slim", "s", "-"))  # colour and label, marker, line
_TICKS = 5  # names of windows below a figure


def write_online_report(run_dir: Path) -> Path:
    """Writes the page of a run of `sseds online` and returns its path, `run_dir/report/online.html`."""
    records = read_records(run_dir / "online" / "windows.csv")
    environment: dict[str, Any] = read_json(run_dir / "environment.json")
    config_text = (run_dir / "config.yaml").read_text(encoding="utf-8")
    return write_page(run_dir / "report" / "online.html", render(records, config_text, environment))


def render(records: Sequence[Record], config_text: str, environment: Mapping[str, Any]) -> str:
    """The page as HTML text."""
    found = summary(records)
    pairs = list(zip(records[::2], records[1::2], strict=True))
    return render_template(
        "online.html.j2",
        name=str(yaml.safe_load(config_text)["name"]),
        headline=_headline(found),
        sentences=_sentences(found, pairs),
        results=_results(found),
        figures=_figures(records, found),
        pairs=[_row(*pair) for pair in pairs],
        config_text=config_text,
        environment=environment,
    )


def _headline(found: dict[str, Any]) -> str:
    base, slim = found["base"], found["slim"]
    share = slim["embedding_parameters"] / base["embedding_parameters"]
    change = text(slim["auc"] - base["auc"], "+.4f")
    return (
        f"{share:.1%} of the embedding parameters, mean AUC of the next window {text(base['auc'], '.4f')} → "
        f"{text(slim['auc'], '.4f')} ({change})"
    )


def _sentences(found: dict[str, Any], pairs: Sequence[tuple[Record, Record]]) -> list[str]:
    searches = len(found["searches"])
    again = {0: "never searched again", 1: "searched again once"}.get(searches, f"searched again {searches} times")
    return [
        (
            f"{found['windows']:,} windows of {found['rows']:,} rows in all, {pairs[0][0].window} to {pairs[-1][0].window}: "
            "each is predicted by both models, with the ids known by then, before they are trained on it."
        ),
        (
            f"The slim model has the higher AUC in {found['slim_better_auc']} of the {found['windows']} windows. "
            f"After the warm-up it was {again}."
        ),
    ]


def _results(found: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    base, slim = found["base"], found["slim"]
    rows = [
        (title, text(base[key], ".4f"), text(slim[key], ".4f"), text(slim[key] - base[key], "+.4f"))
        for title, key in (("Mean AUC", "auc"), ("Mean logloss", "logloss"))
    ]
    for title, key in (
        ("Embedding parameters in use, mean", "embedding_parameters_in_use"),
        ("Embedding parameters", "embedding_parameters"),
        ("Seconds", "seconds"),
    ):
        rows.append((title, count(base[key]), count(slim[key]), f"x{slim[key] / base[key]:.3f}"))
    return rows


def _row(base: Record, slim: Record) -> tuple[str, ...]:
    return (
        f"{base.window}{' *' if slim.searched else ''}",
        count(base.rows),
        *(text(value, ".4f") for value in (base.auc, slim.auc)),
        text(slim.auc - base.auc, "+.4f"),
        *(text(value, ".4f") for value in (base.logloss, slim.logloss)),
        *(count(own.embedding_parameters_in_use) for own in (base, slim)),
    )


def _figures(records: Sequence[Record], found: dict[str, Any]) -> list[FigureBlock]:
    windows = [record.window for record in records if record.model == "base"]
    searches = [windows.index(name) for name in found["searches"]]

    def block(key: str, title: str, caption: str) -> FigureBlock:
        values = {side: [getattr(r, key) for r in records if r.model == side] for side, _, _ in _SIDES}
        form = ",.0f" if key.startswith("embedding") else ".4f"
        ends = "; ".join(f"{side}: {text(own[0], form)} to {text(own[-1], form)}" for side, own in values.items())
        svg = curves(windows, values, searches, title, key.startswith("embedding"))
        return FigureBlock(key, title, svg, caption, f"{title} by window, first to last; {ends}.")

    lines = f" The axis does not start at 0.{' A dotted line is a new search.' * bool(searches)}"
    return [
        block("auc", "AUC of the next window", f"Measured before training on the window; higher is better.{lines}"),
        block("logloss", "Logloss of the next window", f"The same predictions; lower is better.{lines}"),
        block(
            "embedding_parameters_in_use",
            "Embedding parameters in use",
            "In rows that have an id by the end of the window: tables fill as values appear that were never seen before "
            "(log axis).",
        ),
    ]


@as_svg
def curves(
    windows: Sequence[str], values: Mapping[str, Sequence[float]], searches: Sequence[int], label: str, is_count: bool
) -> Figure:
    """One value of both models over the windows.

    Args:
        windows: their names, in order.
        values: "base" and "slim" -> a number for each window.
        searches: the windows after whose prediction the slim model was searched anew.
        label: of the vertical axis.
        is_count: whether it is a number of things, on a log axis, since the two differ by orders of magnitude.
    """
    figure = Figure(figsize=(WIDTH, 2.7))
    axes: Axes = figure.subplots()
    for place in searches:
        axes.axvline(place + 0.5, color=COLORS["muted"], linewidth=0.8, linestyle=":")
    for side, marker, line in _SIDES:
        axes.plot(values[side], line, marker=marker, markersize=2.6, color=COLORS[side], linewidth=1.2, label=side)
    if is_count:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    ticks = np.unique(np.linspace(0, len(windows) - 1, min(_TICKS, len(windows))).round().astype(int))
    axes.set_xticks(ticks, labels=[windows[tick] for tick in ticks])
    axes.set_ylabel(f"{label[0].lower()}{label[1:]}" if not label.startswith("AUC") else label)
    axes.set_xlabel("window")
    axes.grid(True)
    figure.legend(loc="outside upper center", ncols=2)
    return figure
