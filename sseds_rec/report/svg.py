"""How every figure of the report looks, and how it becomes SVG that can stand inside an HTML page.

Text stays text (small, selectable, scales with the page) and every colour of `COLORS` is written as a CSS variable with
the light value as fallback, so that a page can restyle the figures for its dark scheme. A figure is drawn for a narrow
column (a phone) and is scaled up on a wide screen. Colours: Okabe and Ito, safe for colour-blind readers.
"""

import functools
import hashlib
import io
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from sseds_rec.files import write_atomic

P = ParamSpec("P")

COLORS = {
    "ink": "#1f2933",
    "muted": "#5b6673",
    "grid": "#dde2e8",
    "track": "#e6eaef",
    "dropped": "#98a2ae",
    "base": "#0072b2",
    "slim": "#d55e00",
    "green": "#009e73",
    "purple": "#aa4499",
    "amber": "#b37d00",
    "surface": "#ffffff",
}

WIDTH = 3.9  # inches; 281 pt, so that 8 pt text is still above 9 px on a phone
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sseds",
    "text.parse_math": False,  # a field may be called "$x$"
    "axes.unicode_minus": True,
    "font.size": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.edgecolor": COLORS["muted"],
    "axes.labelcolor": COLORS["ink"],
    "text.color": COLORS["ink"],
    "xtick.color": COLORS["muted"],
    "ytick.color": COLORS["muted"],
    "xtick.labelcolor": COLORS["ink"],
    "ytick.labelcolor": COLORS["ink"],
    "grid.color": COLORS["grid"],
    "grid.linewidth": 0.6,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "figure.constrained_layout.use": True,
    "savefig.transparent": True,
}
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def as_svg(draw: Callable[P, Figure]) -> Callable[P, str]:
    """Turn a function that draws a matplotlib figure into one that returns it as SVG, ready to be put into HTML."""

    @functools.wraps(draw)
    def render(*args: P.args, **kwargs: P.kwargs) -> str:
        buffer = io.StringIO()
        with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
            # The browser, not matplotlib, draws the text: glyphs that matplotlib's font lacks do not matter.
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            draw(*args, **kwargs).savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        return _inline(buffer.getvalue(), draw.__name__)

    return render


def write_figure(path: Path, draw: Callable[[], Figure]) -> Path:
    """Writes a figure as a file of its own, atomically: SVG, PNG or PDF, by the name's ending."""
    form = path.suffix[1:].lower()
    style = {**_STYLE, "savefig.transparent": False, "savefig.dpi": 200}
    with matplotlib.rc_context(style):
        figure = draw()
        metadata = {"Date": None} if form == "svg" else {"CreationDate": None} if form == "pdf" else {}
        return write_atomic(path, lambda temporary: figure.savefig(temporary, format=form, metadata=metadata))


def _inline(document: str, name: str) -> str:
    """The `<svg>` element alone: no prologue, no global style, ids unique in the page, colours as CSS variables."""
    svg = document[document.index("<svg") :]
    prefix = f"{name}-{hashlib.sha256(svg.encode()).hexdigest()[:6]}-"
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", svg)
    for color, value in COLORS.items():
        svg = re.sub(rf"((?:fill|stroke): ){value}", rf"\1var(--{color}, {value})", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg", '<svg style="stroke-linejoin:round;stroke-linecap:butt"', 1).strip()


def log_ticks(axis: Axis) -> None:
    axis.set_major_locator(LogLocator(numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"10{str(round(np.log10(value))).translate(_SUPERSCRIPT)}"))
    axis.set_minor_formatter(NullFormatter())
