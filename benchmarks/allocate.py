"""CPU seconds that `allocate` takes, and how much of the budget each order spends: `python benchmarks/allocate.py`.

The first table is of 1,000 tables of 512 columns, rows spread evenly over the orders of magnitude from 10 to 10^8. Scores are
"own" (each column another: its table's strength times an exponential draw), "tied" (one of five values) or "equal". The
second is of row counts of real data sets and of few random tables, over budgets from 1 to 50 % and several draws of scores.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from sseds_rec.errors import UserError
from sseds_rec.search.allocate import Order, allocate
from sseds_rec.search.budget import Budget
from sseds_rec.search.plan import DimensionPlan
from sseds_rec.search.scores import DimensionScores, Table

ORDERS: tuple[Order, ...] = ("stop", "fill", "knapsack")
BUDGETS: dict[str, dict[str, Any]] = {"parameters": {}, "dims": {}, "bytes": {"optimizer": "rowwise_adagrad"}}
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
#: Rows of Criteo's 26 fields: of the Kaggle set, and of the terabyte set with ids hashed below 40 million.
KAGGLE = (
    1461,
    584,
    10131227,
    2202608,
    306,
    24,
    12518,
    634,
    4,
    93146,
    5684,
    8351593,
    3195,
    28,
    14993,
    5461306,
    11,
    5653,
)
KAGGLE += (2173, 4, 7046547, 18, 16, 286181, 105, 142572)
TERABYTE = (40000000, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 40000000, 3067956, 405282, 10, 2209, 11938, 155, 4)
TERABYTE += (976, 14, 40000000, 40000000, 40000000, 590152, 12973, 108, 36)


def make_scores(rows: list[int], dim: int, kind: str, random: np.random.Generator) -> DimensionScores:
    """Scores of tables of so many rows and `dim` columns, "own", "tied" or "equal"."""
    shape = len(rows), dim
    strength = np.exp(random.normal(0, 2, (len(rows), 1)))
    draw = {
        "own": lambda: strength * random.exponential(size=shape),
        "tied": lambda: random.choice([0.0, 0.5, 1.0, 2.0, 7.0], shape),
        "equal": lambda: np.ones(shape),
    }
    facts = {f"t{index}": Table(own, dim) for index, own in enumerate(rows)}
    return DimensionScores(
        {name: torch.from_numpy(own) for name, own in zip(facts, draw[kind](), strict=True)}, facts, {}
    )


def random_rows(tables: int, random: np.random.Generator) -> list[int]:
    return [int(rows) for rows in 10 ** random.uniform(1, 8, tables)]


def kept_score(plan: DimensionPlan, scores: DimensionScores) -> float:
    return sum(float(scores[name][table.kept].sum()) for name, table in plan.tables.items())


def print_seconds(tables: int, dim: int, multiples: list[int], share: float) -> None:
    print(
        f"\n{tables:,} tables x {dim} columns, {share:.0%} of the budget's unit: CPU seconds (and the gap, where it is not 0)\n"
    )
    print("| scores | multiple | exponent | budget | " + " | ".join(ORDERS) + " |\n|" + "---|" * (4 + len(ORDERS)))
    for kind, multiple, exponent in itertools.product(("own", "tied", "equal"), multiples, (0.0, 0.5, 1.0)):
        random = np.random.default_rng(0)
        scores = make_scores(random_rows(tables, random), dim, kind, random)
        for unit, options in BUDGETS.items():
            cells = []
            for order in ORDERS:
                begun = time.process_time()
                budget = Budget.model_validate({unit: share, **options})
                plan = allocate(scores, budget, multiple=multiple, exponent=exponent, order=order)
                gap = plan.search.get("knapsack_gap")
                cells.append(f"{time.process_time() - begun:.2f}" + (f" ({gap:.0e})" if gap else ""))
            print(f"| {kind} | {multiple} | {exponent} | {unit} | " + " | ".join(cells) + " |", flush=True)


def spent(rows: list[int] | None, tables: int, dim: int, order: Order, seeds: int) -> Iterator[tuple[float, float]]:
    """(share of the budget spent, score kept) for every budget and draw of scores; of random rows if none are given."""
    for seed in range(seeds):
        random = np.random.default_rng(seed)
        scores = make_scores(rows or random_rows(tables, random), dim, "own", random)
        for share in SHARES:
            try:
                plan = allocate(scores, Budget(parameters=share), order=order)
            except UserError:
                yield 0.0, 0.0
                continue
            yield float(plan.reached["parameters"]["fraction"]) / share, kept_score(plan, scores)


def print_spent(seeds: int) -> None:
    print(
        f"\nshare of the budget spent: mean, lowest tenth; score kept: mean; over {len(SHARES)} budgets x {seeds} draws\n"
    )
    print("| tables | columns | " + " | ".join(ORDERS) + " |\n|" + "---|" * (2 + len(ORDERS)))
    cases: list[tuple[str, list[int] | None, int]] = [
        ("Criteo Kaggle", list(KAGGLE), 26),
        ("Criteo terabyte", list(TERABYTE), 26),
        ("30 random", None, 30),
        ("4 random", None, 4),
    ]
    for (name, rows, tables), dim in itertools.product(cases, (16, 64)):
        cells = []
        for order in ORDERS:
            shares, score = np.array(list(spent(rows, tables, dim, order, seeds))).T
            cells.append(f"{shares.mean():.3f}, {np.quantile(shares, 0.1):.3f}; {score.mean():.3f}")
        print(f"| {name} | {dim} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", type=int, default=1000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--multiple", type=int, nargs="+", default=[4, 1])
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, default=20)
    arguments = parser.parse_args()
    print_seconds(arguments.tables, arguments.dim, arguments.multiple, arguments.budget)
    print_spent(arguments.seeds)


if __name__ == "__main__":
    main()
