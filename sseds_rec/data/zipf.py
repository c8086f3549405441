"""Zipf's law over a finite number of values: how popular the values of one field are."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_SUMMED = 1 << 16  # terms of the normaliser that are added one by one


@dataclass(frozen=True)
class Zipf:
    """P(k) ∝ (k + 1)^-s for k = 0 .. n-1, exactly; no array of n entries is ever made.

    Attributes:
        values: n, at least 1.
        exponent: s, at least 0. 0 makes all values equally likely.
    """

    values: int
    exponent: float

    def draw(self, generator: np.random.Generator, count: int) -> npt.NDArray[np.int64]:
        """Independent draws of k, by rejection-inversion (Hörmann & Derflinger, ACM TOMACS 6(3), 1996)."""
        drawn, accepted = self._propose(generator, count)
        while len(again := np.flatnonzero(~accepted)):
            drawn[again], accepted[again] = self._propose(generator, len(again))
        return drawn

    def probabilities(self, first: int, stop: int) -> npt.NDArray[np.float64]:
        """P(k) of k = first .. stop-1."""
        return np.arange(first + 1, stop + 1, dtype=np.float64) ** -self.exponent / self._total()

    def _total(self) -> float:
        summed = min(self.values, _SUMMED)
        head = np.sum(np.arange(1, summed + 1, dtype=np.float64) ** -self.exponent)
        # the midpoint rule: relative error below 1e-10 that far out
        return float(head + self._integral(self.values + 0.5) - self._integral(summed + 0.5))

    def _propose(
        self, generator: np.random.Generator, count: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Draws x from the density x^-s, rounds it to j = k + 1, and says which draws make the law exact."""
        low, high = self._integral(1.5) - 1, self._integral(self.values + 0.5)
        area = generator.random(count) * (low - high) + high
        x = self._inverse(area)
        j = np.clip(np.rint(x), 1, self.values)
        squeeze = 2 - self._inverse(self._integral(2.5) - 2.0**-self.exponent)
        accepted = j - x <= squeeze
        unsure = np.flatnonzero(~accepted)
        accepted[unsure] = area[unsure] >= self._integral(j[unsure] + 0.5) - j[unsure] ** -self.exponent
        return j.astype(np.int64) - 1, accepted

    def _integral(self, x: Any) -> Any:
        """∫ t^-s dt from 1 to x, a number or an array."""
        rest = 1 - self.exponent
        return np.expm1(rest * np.log(x)) / rest if rest else np.log(x)

    def _inverse(self, area: Any) -> Any:
        """x of an integral."""
        rest = 1 - self.exponent
        return np.exp(np.log1p(np.maximum(rest * area, -1 + 1e-16)) / rest) if rest else np.exp(area)
