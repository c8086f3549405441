"""The statistics against formulas written out by hand, and what they must never claim."""

from __future__ import annotations

import itertools
import math

import numpy as np
import polars as pl
import pytest
from scipy.special import betainc

from sseds_rec.compare.statistics import holm, paired_difference, rank_methods, summarize


def t_test(differences: np.ndarray) -> tuple[float, float]:
    """Mean over its standard error, and the two-sided p from the incomplete beta function."""
    n = len(differences)
    deviation = math.sqrt(sum((d - sum(differences) / n) ** 2 for d in differences) / (n - 1))
    t = sum(differences) / n / (deviation / math.sqrt(n))
    return t, float(betainc((n - 1) / 2, 0.5, (n - 1) / (n - 1 + t**2)))


def grid(auc: dict[str, list[float]], seeds: int = 3, budget: float | None = 0.1) -> pl.DataFrame:
    """Values of each method by model (two of them at most) and seed."""
    rows = [
        {"model": f"m{i // seeds}", "method": method, "budget": budget, "seed": i % seeds, "auc": value}
        for method, values in auc.items()
        for i, value in enumerate(values)
    ]
    return pl.DataFrame(rows, schema_overrides={"budget": pl.Float64}).with_columns(missed=pl.lit(False))


def test_a_method_that_missed_its_budget_is_not_ranked() -> None:
    """It had more to spend than the others; one cell of it is enough."""
    frame = grid({"a": [0.7] * 3, "b": [0.8, 0.9, 0.8], "c": [0.6] * 3})
    over = (pl.col("method") == "b") & (pl.col("seed") == 1)
    ranking = rank_methods(frame.with_columns(missed=over), 0.1, chosen="a")
    assert [ranked.method for ranked in ranking.methods] == ["a", "c"] and ranking.unranked == {"b": 3}
    assert ranking.best is ranking.methods[0]


def test_means_and_deviations_leave_out_what_is_missing() -> None:
    frame = pl.DataFrame({"method": ["a", "a", "a", "b"], "auc": [0.5, 0.8, None, 0.7], "s": [1.0, math.nan, 3.0, 9.0]})
    a, b = summarize(frame, ["method"], ["auc", "s"]).to_dicts()
    assert a == {"method": "a", "n": 3, "auc": 0.65, "s": 2.0} | {
        "auc_std": pytest.approx(0.3 / math.sqrt(2)),
        "s_std": pytest.approx(math.sqrt(2)),
    }
    assert b == {"method": "b", "n": 1, "auc": 0.7, "auc_std": None, "s": 9.0, "s_std": None}


def test_the_paired_test_is_the_textbooks() -> None:
    a, b = np.array([0.781, 0.792, 0.779, 0.801]), np.array([0.780, 0.788, 0.777, 0.799])
    difference = paired_difference(a, b)
    _, p = t_test(a - b)
    assert difference.p == pytest.approx(p)
    assert (difference.n, difference.mean) == (4, pytest.approx(0.00225))
    half = 3.182446305 * np.std(a - b, ddof=1) / 2  # t of 0.975 with 3 degrees of freedom
    assert (difference.low, difference.high) == pytest.approx((0.00225 - half, 0.00225 + half))


def test_holm_by_its_definition() -> None:
    """Corrected p is the smallest level at which the step-down procedure rejects the hypothesis."""
    p = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005, "e": math.nan}
    corrected = holm(p)
    assert math.isnan(corrected.pop("e"))
    for level in np.linspace(0.001, 0.999, 500):
        rejected = set()
        for i, key in enumerate(sorted("abcd", key=p.__getitem__)):
            if p[key] > level / (4 - i):
                break
            rejected.add(key)
        assert {key for key, value in corrected.items() if value <= level} == rejected


def test_ranking_against_brute_force() -> None:
    rng = np.random.default_rng(3)
    seeds = rng.normal(0.78, 0.01, 6)
    gains = {"sseds": 0.004, "uniform": 0.003, "random": -0.02, "mde": 0.0}
    auc = {method: seeds + gain + rng.normal(0, 0.001, 6) for method, gain in gains.items()}
    full = seeds + 0.003 + rng.normal(0, 0.001, 6)
    frame = pl.concat(
        [
            grid({"full": full.tolist()}, budget=None),
            grid({method: values.tolist() for method, values in auc.items()}),
            grid({"random": [0.99] * 6}, budget=0.5),
        ]
    )
    ranking = rank_methods(frame, 0.1, chosen="uniform")
    every = auc | {"full": full}
    assert [r.method for r in ranking.methods] == sorted(every, key=lambda m: -every[m].mean())
    assert (ranking.pairs, ranking.unranked, ranking.best) == (6, {}, ranking.methods[0])

    by_hand = {method: np.mean([1 + sum(auc[o][i] > auc[method][i] for o in auc) for i in range(6)]) for method in auc}
    assert {r.method: r.mean_rank for r in ranking.methods} == pytest.approx(by_hand | {"full": None})

    pairs = {pair: t_test(every[pair[0]] - every[pair[1]])[1] for pair in itertools.combinations(sorted(every), 2)}
    all_corrected = holm(pairs)
    own = holm({m: t_test(every[m] - every["uniform"])[1] for m in every if m != "uniform"})
    best = ranking.methods[0].method
    for ranked in ranking.methods:
        if ranked.method != best:
            assert ranked.to_best is not None and ranked.to_best.n == 6
            assert ranked.to_best.mean == pytest.approx((every[ranked.method] - every[best]).mean())
            a, b = sorted((ranked.method, best))
            assert ranked.to_best.p == pytest.approx(all_corrected[a, b])
            assert ranked.to_best.low < ranked.to_best.mean < ranked.to_best.high
        if ranked.method != "uniform":
            assert ranked.to_chosen is not None
            assert ranked.to_chosen.p == pytest.approx(own[ranked.method])
            assert ranked.to_chosen.mean == pytest.approx((every[ranked.method] - every["uniform"]).mean())


def test_noise_is_told_apart_no_more_often_than_it_may() -> None:
    """Methods that are all the same: over many grids, the best is told apart from any other in at most 5 %."""
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(60):
        frame = grid({f"method{i}": rng.normal(0.78, 0.001, 6).tolist() for i in range(6)})
        found += any(r.to_best.told_apart for r in rank_methods(frame, 0.1).methods if r.to_best)
    assert found <= 60 * 0.05 + 3 * math.sqrt(60 * 0.05 * 0.95)


def test_one_pair_tells_nothing_apart() -> None:
    _, other = rank_methods(grid({"sseds": [0.8], "random": [0.6]}), 0.1).methods
    assert other.to_best is not None and other.to_chosen is not None
    assert (other.to_best.n, other.to_best.mean) == (1, pytest.approx(-0.2))
    assert math.isnan(other.to_best.p) and math.isnan(other.to_best.low) and not other.to_best.told_apart


def test_methods_that_are_level_share_their_rank_and_are_not_told_apart() -> None:
    first, second = rank_methods(grid({"sseds": [0.8, 0.7, 0.75], "mde": [0.8, 0.7, 0.75]}), 0.1).methods
    assert (first.mean_rank, second.mean_rank) == (1.5, 1.5)
    assert second.to_best is not None and (second.to_best.p, second.to_best.mean) == (1.0, 0.0)


def test_all_ranked_methods_are_compared_on_the_same_cells() -> None:
    """mde lacks the hard cell, which must not make it the best; pep has too few cells to take part."""
    frame = grid({"sseds": [0.80, 0.81, 0.60], "mde": [0.79, 0.80], "pep": [0.99]})
    ranking = rank_methods(frame, 0.1)
    assert [(r.method, r.auc) for r in ranking.methods] == [
        ("sseds", pytest.approx(0.805)),
        ("mde", pytest.approx(0.795)),
    ]
    assert (ranking.pairs, ranking.unranked) == (2, {"pep": 1})


def test_no_cell_in_common_gives_no_ranking() -> None:
    every = grid({"a": [0.8] * 6, "b": [0.7] * 6})
    ranking = rank_methods(every.filter((pl.col("method") == "a") == (pl.col("model") == "m0")), 0.1)
    assert (ranking.methods, ranking.best, ranking.pairs, ranking.unranked) == ([], None, 0, {"a": 3, "b": 3})
    assert rank_methods(grid({"a": [math.nan]}), 0.1).methods == []
