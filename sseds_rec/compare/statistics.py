"""What a grid of trained models says, and how surely: means over seeds, ranks, paired tests.

A cell of the grid is one (model, seed). Two methods are compared by their differences within the same cells, so that what
a seed or a model does to both of them cancels out.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import polars as pl
from scipy import stats

K = TypeVar("K")

SIGNIFICANCE = 0.05
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """Mean of a method's AUC less another's over the cells that both have.

    Attributes:
        n: number of pairs.
        mean: of the differences.
        low, high: 95 % interval of the mean, for this comparison alone; NaN for a single pair.
        p: of the two-sided paired t-test, corrected for the comparisons made beside it; NaN for a single pair.
    """

    n: int
    mean: float
    low: float
    high: float
    p: float

    @property
    def told_apart(self) -> bool:
        return self.p < SIGNIFICANCE


@dataclass(frozen=True)
class Ranked:
    """One method at one budget.

    Attributes:
        auc: mean test AUC over the cells of the ranking.
        mean_rank: mean of its ranks within each cell, 1 for the best; None for a reference, which has no budget.
        to_best: against the best method of the budget, None for that one.
        to_chosen: against the method chosen beforehand, None for that one and where it is not ranked.
    """

    method: str
    auc: float
    mean_rank: float | None
    to_best: Difference | None
    to_chosen: Difference | None


@dataclass(frozen=True)
class Ranking:
    """The methods of one budget.

    Attributes:
        budget: fraction of the embedding parameters.
        pairs: number of (model, seed) cells that all ranked methods have.
        methods: the ranked ones, by mean test AUC, the best first.
        unranked: method -> number of cells it has, of those that have too few, or missed the budget.
    """

    budget: float
    pairs: int
    methods: list[Ranked]
    unranked: dict[str, int]

    @property
    def best(self) -> Ranked | None:
        """The first method that has a budget."""
        return next((ranked for ranked in self.methods if ranked.mean_rank is not None), None)


def summarize(frame: pl.DataFrame, by: Sequence[str], of: Sequence[str]) -> pl.DataFrame:
    """Means and standard deviations of columns over the rows of a group, as a rule its seeds.

    Returns:
        One row a group, in order of appearance: `by`, `n` (rows), and for each column its mean under its own name and
        `NAME_std` (n - 1 in the denominator; null for a single value). Nulls and NaN are left out.
    """
    values = [pl.col(name).cast(pl.Float64).fill_nan(None) for name in of]
    deviations = [value.std().alias(f"{name}_std") for name, value in zip(of, values, strict=True)]
    return frame.group_by(by, maintain_order=True).agg(pl.len().alias("n"), *(v.mean() for v in values), *deviations)


def holm(p_values: Mapping[K, float]) -> dict[K, float]:
    """Corrects p values for being several (Holm 1979): smallest times their number, the next times one less, and so on."""
    corrected: dict[K, float] = {}
    reached = 0.0
    known = sorted((key for key, p in p_values.items() if not math.isnan(p)), key=lambda key: p_values[key])
    for i, key in enumerate(known):
        reached = max(reached, min(1.0, (len(known) - i) * p_values[key]))
        corrected[key] = reached
    return {key: corrected.get(key, math.nan) for key in p_values}


def paired_difference(a: np.ndarray, b: np.ndarray) -> Difference:
    """Paired t-test of a - b, float [N] each, not corrected."""
    differences = a - b
    mean = float(differences.mean())
    if len(differences) < 2:
        return Difference(len(differences), mean, math.nan, math.nan, math.nan)
    if not differences.any():
        return Difference(len(differences), 0.0, 0.0, 0.0, 1.0)  # of no spread the t-test makes 0 / 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # differences that are all the same
        test = stats.ttest_rel(a, b)
        interval = test.confidence_interval(CONFIDENCE)
    return Difference(len(differences), mean, float(interval.low), float(interval.high), float(test.pvalue))


def rank_methods(results: pl.DataFrame, budget: float, chosen: str = "sseds") -> Ranking:
    """Ranks the methods of one budget by mean test AUC, and compares each with the best one and with a chosen one.

    All ranked methods are compared on the same cells: those which all of them have. A method with fewer than half of the
    cells of the fullest one is not ranked, lest it take the others' cells away, nor is one that missed its budget: it had
    more to spend. Methods without a budget (the full model) are compared but get no rank.

    The p values against the chosen method are corrected for the number of methods (Holm). The best method is picked by
    the same numbers that then test it, so those against it are corrected for all pairs of methods.

    Args:
        results: columns model, method, budget, seed, auc, missed; one row a trained model.
        budget: fraction of the embedding parameters, as in the column.
        chosen: the method that the comparison is about, picked before the numbers were seen.
    """
    frame = results.filter((pl.col("budget") == budget) | pl.col("budget").is_null(), pl.col("auc").is_finite())
    budgeted = set(frame.filter(pl.col("budget").is_not_null())["method"])
    counts = dict(frame.group_by("method", maintain_order=True).len().iter_rows())
    most = max((counts[method] for method in budgeted), default=0)
    missed = set(frame.filter("missed")["method"])
    names = [method for method, n in counts.items() if 2 * n >= most and method not in missed]
    budgeted -= missed
    wide = frame.pivot(on="method", index=["model", "seed"], values="auc").select(names).drop_nulls()
    auc = {method: wide[method].to_numpy() for method in names} if wide.height else {}
    ranks = _mean_ranks({method: values for method, values in auc.items() if method in budgeted})
    order = sorted(auc, key=lambda method: -float(auc[method].mean()))
    best = next((method for method in order if method in budgeted), None)
    to_best = _differences(auc, list(itertools.combinations(order, 2)))
    to_chosen = _differences(auc, [(method, chosen) for method in order if chosen in auc and method != chosen])
    return Ranking(
        budget=budget,
        pairs=wide.height,
        methods=[
            Ranked(
                method=method,
                auc=float(auc[method].mean()),
                mean_rank=ranks.get(method),
                to_best=to_best.get((method, best)) if best else None,
                to_chosen=to_chosen.get((method, chosen)),
            )
            for method in order
        ],
        unranked={method: n for method, n in counts.items() if method not in auc},
    )


def _differences(auc: Mapping[str, np.ndarray], pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Difference]:
    """Differences a - b of the pairs (a, b), and b - a under (b, a), corrected for the number of pairs."""
    found = {(a, b): paired_difference(auc[a], auc[b]) for a, b in pairs}
    corrected = holm({pair: difference.p for pair, difference in found.items()})
    found = {pair: replace(difference, p=corrected[pair]) for pair, difference in found.items()}
    return found | {(b, a): replace(d, mean=-d.mean, low=-d.high, high=-d.low) for (a, b), d in found.items()}


def _mean_ranks(auc: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Mean rank of each method over the cells; methods that are level share the mean of their ranks."""
    if not auc:
        return {}
    ranks = stats.rankdata(-np.array(list(auc.values())), axis=0)
    return dict(zip(auc, ranks.mean(axis=1).tolist(), strict=True))
