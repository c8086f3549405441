"""The page in a real browser: what shows, what fits, and that it asks the network for nothing."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from sseds_rec.report import write_report

MakeRun = Callable[..., Path]

# Each text of a figure whose box leaves the figure's by more than a pixel: a label that is cut off.
CUT_OFF = """() => [...document.querySelectorAll('figure svg')].flatMap(svg => {
  const box = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('text')].filter(text => {
    const b = text.getBoundingClientRect();
    return b.left < box.left - 1 || b.right > box.right + 1 || b.top < box.top - 1 || b.bottom > box.bottom + 1;
  }).map(text => text.textContent);
})"""
FIGURE_SIZES = """() => [...document.querySelectorAll('figure svg')].map(svg => {
  const drawn = svg.getBBox(), box = svg.getBoundingClientRect();
  return Math.min(drawn.width, drawn.height, box.width, box.height);
})"""


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_in_the_browser(browser: Browser, make_run: MakeRun, width: int, scheme: str) -> None:
    run = make_run()
    metrics = json.loads((run / "metrics.json").read_text())
    url = write_report(run).resolve().as_uri()
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
    messages: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(url)

    assert messages == []
    assert [request for request in requests if not request.startswith("data:")] == [url]
    assert page.evaluate("document.documentElement.scrollWidth") == width  # no horizontal overflow
    sizes = page.evaluate(FIGURE_SIZES)
    assert len(sizes) == 7 and min(sizes) > 100
    assert page.evaluate(CUT_OFF) == []

    rows = {row.split("\t")[0]: row.split("\t")[1:] for row in page.locator(".results tbody").inner_text().split("\n")}
    for side, stage in enumerate(("pretrain", "retrain")):
        assert float(rows["Test AUC"][side]) == pytest.approx(metrics[stage]["auc"], abs=5.001e-5)
        assert float(rows["Test logloss"][side]) == pytest.approx(metrics[stage]["logloss"], abs=5.001e-5)
        assert int(rows["Embedding parameters"][side].replace(",", "")) == metrics[stage]["embedding_parameters"]
        assert int(rows["All parameters"][side].replace(",", "")) == metrics[stage]["parameters"]

    # Text of page and figures stands out from what is behind it, in both schemes (WCAG AA asks for 4.5).
    for selector in ("h1", "figcaption", "figure svg text", ".plan td", ".plan .dropped td"):
        assert contrast(page.evaluate(COLORS, selector)) > 4.5, selector
    page.close()


# Colour of the first match and of the first opaque background behind it.
COLORS = """selector => {
  const element = document.querySelector(selector);
  const style = getComputedStyle(element);
  let behind = element;
  while (getComputedStyle(behind).backgroundColor === 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
  const text = element instanceof SVGElement ? style.fill : style.color;
  return [text, getComputedStyle(behind).backgroundColor].map(c => c.match(/\\d+/g).slice(0, 3).map(Number));
}"""


def contrast(colors: list[list[int]]) -> float:
    def luminance(rgb: list[int]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in rgb)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted(map(luminance, colors), reverse=True)
    return (high + 0.05) / (low + 0.05)
