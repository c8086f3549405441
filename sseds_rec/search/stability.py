"""How far scores and plans would be others if the batches had been drawn again: a bootstrap over batches (Efron, 1979)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from sseds_rec.errors import UserError
from sseds_rec.search.plan import DimensionPlan
from sseds_rec.search.scores import DimensionScores

#: Redraws for a standard error, and pairs of redraws for an overlap.
_REDRAWS, _PAIRS = 100, 10


def standard_errors(scores: DimensionScores) -> dict[str, Tensor] | None:
    """Standard error of every score.

    Args:
        scores: from `score_dimensions`. Of scores in a rotated basis these are the errors in it.

    Returns:
        Table name -> float64 [D]; None if the scores come from fewer than two batches, which say nothing about others.
    """
    totals = {name: torch.zeros_like(own) for name, own in scores.items()}
    squares = {name: torch.zeros_like(own) for name, own in scores.items()}
    if _groups(scores) < 2:
        return None
    for drawn in _redraws(scores, _REDRAWS):
        for name in scores:
            change = (drawn[name] if drawn else 0.0) - scores[name]
            totals[name] += change
            squares[name] += change.square()
    # Of G batches a bootstrap has the variance of a sum over G, not G - 1.
    unbiased = (_groups(scores) / (_groups(scores) - 1)) ** 0.5
    return {
        name: unbiased * ((squares[name] - totals[name].square() / _REDRAWS) / (_REDRAWS - 1)).clamp_min(0).sqrt()
        for name in scores
    }


def expected_overlap(scores: DimensionScores, plan: Callable[[DimensionScores], DimensionPlan]) -> float:
    """The share of kept columns that plans from two independent draws of as many batches would have in common.

    Rotated tables are scored in the basis of all batches: of them this compares how many coordinates are kept, not how the basis
    would turn. Batches are kept apart in 32 groups at most, in fewer if they would hold more than 2^23 numbers.

    Args:
        scores: from `score_dimensions`.
        plan: what makes a plan of scores, such as `functools.partial(sr.allocate, budget=sr.Budget(parameters=0.1))`.

    Returns:
        Mean of |A ∩ B| / ((|A| + |B|) / 2) over pairs of redraws; of a budget that keeps nothing 0. NaN if the scores come from
        fewer than two batches.
    """
    if _groups(scores) < 2:
        return float("nan")
    kept = [_kept(drawn, plan) for drawn in _redraws(scores, 2 * _PAIRS)]
    overlaps = [2 * len(a & b) / max(1, len(a) + len(b)) for a, b in zip(kept[::2], kept[1::2], strict=True)]
    return float(np.mean(overlaps))


def _groups(scores: DimensionScores) -> int:
    return scores.draws.groups if scores.draws else 0


def _redraws(scores: DimensionScores, count: int) -> Iterator[DimensionScores | None]:
    """Scores of batches drawn with replacement from those that there were, None if all are zero; the same every time."""
    assert scores.draws is not None
    groups = scores.draws.groups
    random = np.random.default_rng(0)
    for times in random.multinomial(groups, [1 / groups] * groups, count):
        raw = scores.draws.raw(torch.from_numpy(times).double())
        is_zero = not any(bool(own.any()) for own in raw.values())
        yield None if is_zero else DimensionScores(raw, scores.tables, scores.search)


def _kept(scores: DimensionScores | None, plan: Callable[[DimensionScores], DimensionPlan]) -> set[tuple[str, int]]:
    if scores is None:
        return set()
    try:
        tables = plan(scores).tables
    except UserError:  # order=stop, at a budget below the first group
        return set()
    return {(name, column) for name, own in tables.items() for column in own.kept}
