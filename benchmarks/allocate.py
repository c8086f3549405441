"""Seconds that `allocate` takes, whole, for each order and kind of budget: `python benchmarks/allocate.py`.

Rows are spread evenly over the orders of magnitude from 10 to 10^8. The scores are of one of three kinds: every column of its own
(a table's strength times an exponential draw), "tied" (one of five values), "equal" (all the same).
"""

from __future__ import annotations

import argparse
import itertools
import time

import numpy as np
import torch

from sseds_rec.search.allocate import Order, allocate
from sseds_rec.search.budget import Budget
from sseds_rec.search.plan import DimensionPlan
from sseds_rec.search.scores import DimensionScores, Table

ORDERS: tuple[Order, ...] = ("stop", "fill", "knapsack")


def make_scores(tables: int, dim: int, kind: str, seed: int = 0) -> DimensionScores:
    """Scores of `tables` tables of `dim` columns, "own", "tied" or "equal"."""
    random = np.random.default_rng(seed)
    rows = (10 ** random.uniform(1, 8, tables)).astype(int)
    strength = np.exp(random.normal(0, 2, (tables, 1)))
    draw = {
        "own": lambda: strength * random.exponential(size=(tables, dim)),
        "tied": lambda: random.choice([0.0, 0.5, 1.0, 2.0, 7.0], (tables, dim)),
        "equal": lambda: np.ones((tables, dim)),
    }
    values = draw[kind]()
    names = [f"t{index}" for index in range(tables)]
    facts = {name: Table(int(own), dim) for name, own in zip(names, rows, strict=True)}
    return DimensionScores({name: torch.from_numpy(own) for name, own in zip(names, values, strict=True)}, facts, {})


def kept_score(plan: DimensionPlan, scores: DimensionScores) -> float:
    return sum(float(scores[name][table.kept].sum()) for name, table in plan.tables.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", type=int, default=1000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--multiple", type=int, nargs="+", default=[4])
    parser.add_argument("--budget", type=float, nargs="+", default=[0.1])
    parser.add_argument("--exponent", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    arguments = parser.parse_args()
    kinds = {
        "parameters": {},
        "dims": {},
        "bytes": {"optimizer": "rowwise_adagrad"},
    }
    print(f"{arguments.tables} tables x {arguments.dim} columns; seconds, share of the budget's unit kept, score kept")
    for kind, multiple, share, p in itertools.product(
        ("own", "tied", "equal"), arguments.multiple, arguments.budget, arguments.exponent
    ):
        scores = make_scores(arguments.tables, arguments.dim, kind)
        for unit, options in kinds.items():
            budget = Budget.model_validate({unit: share, **options})
            cells = []
            for order in ORDERS:
                begun = time.perf_counter()
                plan = allocate(scores, budget, multiple=multiple, exponent=p, order=order)
                seconds = time.perf_counter() - begun
                gap = plan.search.get("knapsack_gap")
                cells.append(
                    f"{order} {seconds:5.2f} s {plan.reached[unit]['fraction']:.5f} {kept_score(plan, scores):.5f}"
                    + (f" (gap {gap:.0e})" if gap else "")
                )
            print(f"{kind:5} m={multiple} p={p:<4} {unit:10} {share:<5} | " + " | ".join(cells), flush=True)


if __name__ == "__main__":
    main()
