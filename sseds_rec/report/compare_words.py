"""What a comparison says, in sentences made from its numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sseds_rec.compare.statistics import Difference, Ranked, Ranking
from sseds_rec.report.compare_artefacts import Grid
from sseds_rec.report.compare_figures import REFERENCES
from sseds_rec.report.compare_tables import CHOSEN
from sseds_rec.report.numbers import count, percent, text

RANKING_NOTE = (
    "Methods by mean test AUC. Differences are paired: within the same model and seed. p is of a two-sided paired t-test, "
    f"corrected for several comparisons (Holm): those with {CHOSEN} for the number of methods, those with the best for all "
    "pairs, since the best was picked by the same numbers. An interval holds for its own comparison. Not told apart means that "
    "these pairs do not show a difference, not that there is none; and all of them are of one data set. Models of one seed "
    "share its draws, so where there are several, their pairs are not quite as many as n counts, and p is on the small side."
)


def headline(grid: Grid, rankings: Sequence[Ranking]) -> str:
    """Which method has the best mean test AUC at which budget."""
    won: dict[str, list[float]] = {}
    for ranking in rankings:
        if ranking.best:
            won.setdefault(ranking.best.method, []).append(ranking.budget)
    if not won:
        return "No budget has a result yet" if grid.results.height else "No model is trained yet"
    if not any(map(_others, rankings)):
        return f"{_listed(list(won))} can be compared with no other method yet"
    clear = [ranking for ranking in rankings if _is_clear(ranking)]
    surely = f"told apart from all others at {len(clear) or 'none'} of {len(rankings)} budgets"
    if len(rankings) == 1:
        surely = f"{'' if clear else 'not '}told apart from all others"
    if len(won) == 1:
        method, at = next(iter(won.items()))
        where = f"all {len(at)} budgets" if len(at) == len(rankings) > 1 else _listed(map(percent, at))
        return f"{method} has the best mean test AUC at {where}, {surely}"
    winners = "; ".join(f"{method} at {_listed(map(percent, at))}" for method, at in won.items())
    return f"Best mean test AUC: {winners}; {surely}"


def _is_clear(ranking: Ranking) -> bool:
    """Whether the test tells the best from every other method that has a budget."""
    others = _others(ranking)
    return bool(others) and all(_apart(r.to_best) for r in others)


def _others(ranking: Ranking) -> list[Ranked]:
    """The methods with a budget, without the best of them."""
    return [r for r in ranking.methods if r is not ranking.best and r.method not in REFERENCES]


def summary(grid: Grid, rankings: Sequence[Ranking], missed: int) -> list[str]:
    """What was compared, and of each budget what the test tells apart."""
    about = grid.about
    took = (
        f" It took {_duration(about.seconds)} on {_numbered(about.processes, 'worker')}."
        if about.seconds is not None
        else ""
    )
    sentences = [
        f"{_listed(grid.models) or 'No model yet'} on {about.data.path}: {count(about.data.train_rows)} rows to train, "
        f"{count(about.data.validation_rows)} to validate, {count(about.data.test_rows)} to test, "
        f"{about.data.fields} fields with embeddings. {len(grid.methods)} methods, "
        f"{_numbered(len(about.seeds), 'seed')}.{took}"
    ]
    sentences += [_at_budget(ranking) for ranking in rankings]
    if missed:
        sentences.append(f"{_numbered(missed, 'model')} missed the budget and can be found by name below.")
    if about.missing:
        are = "is" if len(about.missing) == 1 else "are"
        sentences.append(f"{_numbered(len(about.missing), 'cell')} {are} not finished; the page shows what is there.")
    return sentences


def _at_budget(ranking: Ranking) -> str:
    start, best = f"At {percent(ranking.budget)}: ", ranking.best
    if best is None:
        return f"{start}no two methods can be compared yet."
    others = _others(ranking)
    words = [f"{start}{best.method} {text(best.auc, '.4f')} on average"]
    words += [_reference(ranked) for ranked in ranking.methods if ranked.method in REFERENCES]
    sentences = [", ".join(words)]
    if ranking.pairs < 2:
        return f"{sentences[0]}. This is one pair of model and seed: it tells nothing apart."
    level = [r.method for r in others if not _apart(r.to_best)]
    behind = [r.method for r in others if _apart(r.to_best)]
    if level:
        sentences.append(f"not told apart from the best: {_listed(level)}")
    if behind:
        sentences.append(f"behind it: {_listed(behind)}")
    own = next((r for r in others if r.method == CHOSEN), None)
    if own and own.to_best:
        interval = f"{text(own.to_best.low, '+.4f')} to {text(own.to_best.high, '+.4f')}"
        sentences.append(f"{CHOSEN} less the best is {text(own.to_best.mean, '+.4f')} (95 % interval {interval})")
    return f"{'; '.join(sentences)}. n = {ranking.pairs} pairs."


def _reference(ranked: Ranked) -> str:
    return f"{ranked.method} {text(ranked.auc, '.4f')}" + ("" if _apart(ranked.to_best) else " (not told apart)")


def _apart(difference: Difference | None) -> bool:
    return difference is not None and difference.told_apart


def _listed(words: Sequence[str] | map[str]) -> str:
    *first, last = list(words) or [""]
    return f"{', '.join(first)} and {last}" if first else last


def _numbered(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _duration(seconds: float) -> str:
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
