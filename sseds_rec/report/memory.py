"""The picture of a forecast: what lies in the memory of every rank, before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, MultipleLocator

from sseds_rec.distributed.hardware import binary_unit, show_size
from sseds_rec.report.svg import COLORS

#: Part of a device's memory -> its words and colour (Okabe and Ito), from the bottom to the top.
PARTS = {
    "weights": ("table weights", "#0072b2"),
    "optimizer": ("optimizer states", "#56b4e9"),
    "lookups": ("ids, embeddings, caches", "#e69f00"),
    "dense": ("dense part", "#cc79a7"),
    "margin": ("CUDA, NCCL, allocator", "#b8c0ca"),
}
_SIZE = (7.2, 2.0)  # inches, the height of one panel


@dataclass(frozen=True)
class Panel:
    """One model on the cluster.

    Attributes:
        title: says which, and whether it fits.
        memory: part -> bytes, int64 [ranks].
    """

    title: str
    memory: dict[str, np.ndarray]


def parts_in(memories: Sequence[Mapping[str, np.ndarray]]) -> dict[str, tuple[str, str]]:
    """Of `PARTS` those that any of these have: a CPU's memory has no margin."""
    return {part: shown for part, shown in PARTS.items() if any(memory[part].any() for memory in memories)}


def memory_per_rank(panels: Sequence[Panel], capacity: int, per_node: int) -> Figure:
    """Stacked memory of every rank, one panel a model, on one scale with the line that it must not cross.

    Args:
        panels: from top to bottom.
        capacity: of each device, bytes.
        per_node: ranks of a node; a gap in the grid is between two.
    """
    width, height = _SIZE
    figure = Figure(figsize=(width, height * len(panels) + 0.8))
    every = figure.subplots(len(panels), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    parts = parts_in([panel.memory for panel in panels])
    for axes, panel in zip(every, panels, strict=True):
        _stack(axes, panel, parts, capacity, per_node)
    most = max(capacity, *(int(np.sum(list(panel.memory.values()), axis=0).max()) for panel in panels))
    every[0].set_ylim(0, 1.12 * most / binary_unit(capacity)[1])
    every[-1].set_xlabel("rank" + (f" (lines: nodes of {per_node})" if _nodes(panels[0], per_node) > 1 else ""))
    handles, labels = every[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def _stack(axes: Axes, panel: Panel, parts: dict[str, tuple[str, str]], capacity: int, per_node: int) -> None:
    unit, size = binary_unit(capacity)
    ranks = len(panel.memory["weights"])
    edges = np.arange(ranks + 1) - 0.5
    below = np.zeros(ranks)
    for part, (label, color) in parts.items():
        above = below + panel.memory[part] / size
        axes.stairs(above, edges, baseline=below, fill=True, color=color, label=label)
        below = above
    if ranks <= 64:  # a gap between neighbours, as long as it can be seen
        axes.vlines(edges[1:-1], 0, np.maximum(below[1:], below[:-1]), color="white", linewidth=min(1.0, 24 / ranks))
    label = f"the device has {show_size(capacity)}"
    axes.axhline(capacity / size, color=COLORS["slim"], linestyle="--", linewidth=1.2, label=label)
    for node in range(1, _nodes(panel, per_node)):
        axes.axvline(node * per_node - 0.5, color=COLORS["grid"], linewidth=0.8, zorder=0)
    axes.set_title(panel.title, loc="left", fontsize=8.5)
    axes.set_ylabel(f"{unit} of a rank")
    axes.set_xlim(edges[0], edges[-1])
    whole = _nodes(panel, per_node) > 1
    axes.xaxis.set_major_locator(MultipleLocator(per_node) if whole else MaxNLocator(12, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))


def _nodes(panel: Panel, per_node: int) -> int:
    return -(-len(panel.memory["weights"]) // per_node)
