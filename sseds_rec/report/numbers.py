"""Numbers as the report prints them: a dash for what was not reported, a true minus, no sign on a zero."""

import math
from typing import Any


def number(value: Any) -> float:
    """The number, or NaN for one that a stage did not report."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else math.nan


def text(value: float, form: str) -> str:
    if math.isnan(value):
        return "–"
    shown = format(value, form)
    if not any(digit in "123456789" for digit in shown):
        shown = shown.lstrip("+-")  # no sign on a zero
    return shown.replace("-", "\N{MINUS SIGN}")


def count(value: float) -> str:
    return text(number(value), ",.0f")


def percent(fraction: float | None) -> str:
    if fraction is None:
        return "–"
    shown = "<0.01" if 0 < fraction < 1e-4 else f"{100 * fraction:.4g}"
    return f"{shown}\N{NO-BREAK SPACE}%"


def mib(value: float) -> str:
    return f"{value:,.2f}" if value >= 0.1 or value == 0 else f"{value:.2g}"
