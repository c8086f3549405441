"""The shapes in the SVG are the data: read back from the drawing, not from the code that drew it."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from sseds_rec.report import figures
from sseds_rec.report.svg import WIDTH

SVG = "{http://www.w3.org/2000/svg}"


def elements(svg: str, tag: str, style: str) -> list[ET.Element]:
    return [e for e in ET.fromstring(svg).iter(SVG + tag) if style in e.get("style", "")]


def bars(svg: str, color: str) -> list[tuple[float, float]]:
    """Width and height of every filled rectangle of the colour, in points."""
    boxes = []
    for path in elements(svg, "path", f"fill: var(--{color}"):
        points = np.array(re.findall(r"[ML] (\S+) (\S+)", path.get("d", "")), dtype=float)
        boxes.append(tuple(np.ptp(points, axis=0)))
    return boxes


def markers(svg: str, color: str) -> np.ndarray:
    """Position of every marker of the colour, [N, 2] in points."""
    uses = [e for e in ET.fromstring(svg).iter(SVG + "use") if f"fill: var(--{color}" in e.get("style", "")]
    return np.array([[float(e.get("x", "nan")), float(e.get("y", "nan"))] for e in uses])


def texts(svg: str) -> list[str]:
    return ["".join(e.itertext()) for e in ET.fromstring(svg).iter(SVG + "text")]


def test_bars_have_the_length_of_the_dims() -> None:
    svg = figures.dims_per_field(["a", "b", "c"], before=[64, 32, 64], after=[48, 32, 0], rows=[1_500_000, 12, 7])
    before = [width for width, _ in bars(svg, "track")]
    after = [width for width, _ in bars(svg, "slim")]
    assert np.array(before) / before[0] == pytest.approx([1, 32 / 64, 1], abs=1e-3)
    assert np.array(after) / before[0] == pytest.approx([48 / 64, 32 / 64, 0], abs=1e-3)
    assert {"48 · 1.5M rows", "32 · 12 rows", "0, dropped · 7 rows"} <= set(texts(svg))


def test_rank_plot_draws_every_positive_score_once_on_log_axes() -> None:
    scores = np.array([0.001, 0.5, 0.0, 0.05, 0.449])
    kept = np.array([False, True, False, True, True])
    svg = figures.saliency_rank(scores, kept)
    # The legend adds one marker; the others stand at (log rank, log score), highest score first.
    points = markers(svg, "slim")[:3]
    x, y = points[np.argsort(points[:, 0])].T
    ranks, values = np.log([1, 2, 3]), np.log([0.5, 0.449, 0.05])
    assert (x - x[0]) / (x[2] - x[0]) == pytest.approx((ranks - ranks[0]) / (ranks[2] - ranks[0]), abs=1e-3)
    assert (y - y[0]) / (y[2] - y[0]) == pytest.approx((values - values[0]) / (values[2] - values[0]), abs=1e-3)
    assert {"kept (3)", "dropped (1)"} <= set(texts(svg))


def test_histogram_counts_every_score() -> None:
    rng = np.random.default_rng(0)
    scores, kept = rng.lognormal(0, 3, 5000), rng.random(5000) < 0.3
    svg = figures.saliency_histogram(scores, kept, bins=20)
    heights = {color: np.array([height for _, height in bars(svg, color)][:20]) for color in ("slim", "dropped")}
    edges = np.geomspace(scores.min() * 0.99, scores.max() * 1.01, 21)
    slim, dropped = np.histogram(scores[kept], edges)[0], np.histogram(scores[~kept], edges)[0]
    unit = heights["dropped"].max() / dropped.max()
    assert heights["slim"] / unit == pytest.approx(slim, abs=0.5)
    assert heights["dropped"] / unit == pytest.approx(dropped, abs=0.5)


def test_quality_axis_never_blows_up_a_difference_of_noise() -> None:
    svg = figures.quality({"base": (0.7400, 0.45), "slim": (0.7401, 0.45)})
    (x0, _), (x1, _) = markers(svg, "base")[0], markers(svg, "slim")[0]
    assert 0 < x1 - x0 < 0.02 * WIDTH * 72  # 0.0001 AUC on an axis of at least 0.01
    assert {"0.7400", "0.7401", "test AUC (axis starts at 0.735)"} <= set(texts(svg))


def test_a_metric_that_is_not_a_number_leaves_no_label() -> None:
    assert "nan" not in " ".join(texts(figures.quality({"base": (0.74, 0.45), "slim": (np.nan, np.nan)})))


def test_memory_axis_is_logarithmic_and_dropped_fields_stand_at_its_edge() -> None:
    svg = figures.memory_per_field(["a", "b", "c"], before=[100.0, 10.0, 1.0], after=[10.0, 1.0, 0.0])
    a, b = markers(svg, "slim")[:2]
    steps = [a[0] - b[0]]
    circles = elements(svg, "use", "stroke: var(--base")[:3]
    xs = [float(e.get("x", "nan")) for e in circles]
    steps += [xs[0] - xs[1], xs[1] - xs[2], xs[0] - a[0]]
    assert steps == pytest.approx([steps[0]] * 4, abs=1e-3)  # each is a factor of ten
    muted = elements(svg, "use", "stroke: var(--muted")  # ticks, too
    cross = next(float(e.get("x", "nan")) for e in muted if e.get("y") == circles[2].get("y"))
    assert "dropped: 0 MiB" in texts(svg) and cross < min(*xs, a[0], b[0])


def test_heatmap_of_tables_of_different_width() -> None:
    scores = [np.array([0.1, 0.4, 0.2]), np.array([0.3]), np.zeros(2)]
    svg = figures.saliency_heatmap(["a", "b", "c"], scores, [[1, 2], [0], []])
    assert len(list(ET.fromstring(svg).iter(SVG + "image"))) >= 1
    assert {"a", "b", "c"} <= set(texts(svg))


@pytest.mark.parametrize("name", ['<b>&"', "$x$", "a" * 300, "\\frac", "目的地"])
def test_names_are_drawn_as_they_are(name: str) -> None:
    svg = figures.memory_per_field([name], [1.0], [0.5])
    shown = name if len(name) <= 20 else f"{name[:6]}…{name[-13:]}"
    assert shown in texts(svg)


def test_long_curves_are_thinned_to_their_means() -> None:
    points = [(i / 1000, 2.0 if i % 2 else 0.0) for i in range(100_000)]
    svg = figures.learning_curves({"base": [(1.0, 0.7)]}, {"base": points})
    assert len(svg) < 60_000
    epochs, values = figures._thinned(points)
    assert len(epochs) == 200 and values == pytest.approx(np.ones(200))
    assert epochs.mean() == pytest.approx(np.mean([epoch for epoch, _ in points]))


def test_no_curve_and_no_positive_score_still_draw() -> None:
    assert texts(figures.learning_curves({"base": []}, {"base": []}))
    for draw in (figures.saliency_rank, figures.saliency_histogram):
        assert texts(draw(np.zeros(4), np.array([True, False, False, True])))


def test_rank_plot_draws_an_interval_behind_each_point() -> None:
    scores, kept = np.array([0.5, 0.3, 0.2]), np.array([True, True, True])
    svg = figures.saliency_rank(scores, kept, errors=np.array([0.05, 0.01, 0.3]))
    points = markers(svg, "slim")[:3]  # the legend adds one
    points = points[np.argsort(points[:, 0])]
    lines = [
        np.array(re.findall(r"[ML] (\S+) (\S+)", path.get("d", "")), dtype=float)
        for path in elements(svg, "path", "stroke: var(--track")
    ]
    spans = [line for line in lines if len(line) == 2 and abs(np.ptp(line[:, 0])) < 1e-6]
    per_e = (points[1, 1] - points[0, 1]) / np.log(0.5 / 0.3)  # points of height for a factor e
    lengths = sorted(np.ptp(line[:, 1]) / per_e for line in spans)
    expected = [np.log((s + 1.96 * e) / max(s - 1.96 * e, 0.1)) for s, e in [(0.3, 0.01), (0.5, 0.05), (0.2, 0.3)]]
    assert lengths == pytest.approx(expected, abs=2e-2)
