"""A plausible comparison, written as `sseds compare` leaves it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from sseds_rec.compare.contestants import CONTESTANTS
from tests.report.conftest import FLIGHTS_ROWS

MODELS = ("fm", "deepfm", "wide_deep")
#: Method -> AUC gained over the full model at a twentieth and at a half of the parameters.
GAINS = {
    "full": (0, 0), "drop_ids": (-0.006, -0.006), "uniform": (-0.003, 0.0005), "random": (-0.02, -0.004),
    "magnitude": (-0.012, -0.001), "pca_energy": (-0.004, 0.001), "mde": (-0.002, 0.0005), "autodim": (-0.001, 0.001),
    "pep": (0.0005, 0.001), "deeplight": (0.001, 0.0015), "sseds_paper": (-0.08, 0.0005), "sseds": (0.002, 0.003),
}  # fmt: skip
SEARCH_SECONDS = {"mde": 0.01, "autodim": 190.0, "pep": 75.0, "deeplight": 12.0, "sseds": 0.3, "sseds_paper": 0.1}
REFERENCES = ("full", "drop_ids")
ELEMENT_WISE = ("pep", "deeplight")
RATES, PENALTIES = (1e-3, 3e-3), (1e-5, 1e-4)
DIM = 64
NUMBERS = {
    "budget": pl.Float64, "auc": pl.Float64, "logloss": pl.Float64, "auc_before_retraining": pl.Float64,
    "csr_bytes": pl.Int64, "budget_parameters": pl.Int64,
}  # fmt: skip


class _Grid:
    def __init__(self, fields: Mapping[str, int]) -> None:
        self.rng = np.random.default_rng(11)
        self.fields = fields
        self.whole = sum(fields.values()) * DIM

    def trained(self, model: str, method: str, seed: int, budget: float | None, variant: str = "") -> dict[str, Any]:
        rng = self.rng
        gain = float(np.interp(np.log(budget or 0.5), np.log([0.05, 0.5]), GAINS[method])) - len(variant) * 1e-4
        kept = round(self.whole * (budget or (0.25 if method == "drop_ids" else 1)) * rng.uniform(0.985, 1))
        sparse = method in ELEMENT_WISE
        stored = self.whole if sparse else kept
        auc = 0.775 + 0.001 * len(model) + 0.0005 * seed + gain + rng.normal(0, 0.0003)
        early = method.startswith("sseds")
        speed = 9e4 if sparse or method == "full" else 1.6e5
        return {
            "model": model, "method": method, "variant": variant, "role": "ablation" if variant else "result",
            "budget": budget, "seed": seed, "learning_rate": RATES[0], "embedding_l2": PENALTIES[model == "fm"],
            "auc": auc, "logloss": 0.45 - gain + rng.normal(0, 0.0002), "validation_auc": auc + 0.002,
            "auc_before_retraining": auc - 0.004 if early else None,
            "embedding_parameters": kept, "stored_parameters": stored,
            "budget_parameters": round(budget * self.whole) if budget else None, "missed": False,
            "dense_bytes": 4 * stored, "csr_bytes": 8 * kept + 40_000 if sparse else None, "parameters": kept + 200_000,
            "pretrain_seconds": 0.0 if method in ("uniform", "mde") else rng.uniform(30, 33),
            "search_seconds": SEARCH_SECONDS.get(method, 0.0) * rng.uniform(0.9, 1.1),
            "retrain_seconds": 0.0 if method == "full" else rng.uniform(18, 24),
            "inference_samples_per_second": speed * rng.uniform(0.95, 1.05), "run": f"runs/{model}/{method}/{budget}/{seed}",
        }  # fmt: skip

    def trials(self, model: str, method: str, budget: float | None) -> Iterator[dict[str, Any]]:
        for rate in RATES:
            for penalty in PENALTIES:
                trial = self.trained(model, method, 0, budget) | {"role": "trial", "auc": None, "logloss": None}
                chosen = {"learning_rate": rate, "embedding_l2": penalty, "validation_auc": 0.77 - rate - penalty}
                yield trial | chosen

    def widths(self, model: str, method: str, seed: int, budget: float) -> Iterator[dict[str, Any]]:
        for name, rows in self.fields.items():
            dim = 4 * min(DIM // 4, int(self.rng.poisson(budget * DIM / 2 * (4000 / rows) ** 0.1)))
            key = {"model": model, "method": method, "budget": budget, "seed": seed, "field": name}
            yield key | {"rows": rows, "original_dim": DIM, "dim": dim}

    def saliency(self, model: str, method: str, seed: int) -> Iterator[dict[str, Any]]:
        raw = {name: self.rng.gamma(0.4, 1, DIM) ** 2 * self.rng.lognormal(0, 1.5) for name in self.fields}
        total = sum(float(scores.sum()) for scores in raw.values())
        for name, scores in raw.items():
            for column, score in enumerate(np.sort(scores)[::-1].tolist()):
                key = {"model": model, "method": method, "seed": seed, "field": name}
                yield key | {"column": column, "score": score / total}


def write_grid(
    folder: Path,
    models: Sequence[str] = MODELS,
    methods: Sequence[str] = tuple(GAINS),
    budgets: Sequence[float] = (0.5, 0.2, 0.1, 0.05),
    seeds: Sequence[int] = (0, 1, 2),
    fields: Mapping[str, int] = FLIGHTS_ROWS,
    missing: Sequence[Any] = (),
) -> Path:
    """Writes the four files, with ablations of `sseds` at a tenth."""
    grid = _Grid(fields)
    rows: list[dict[str, Any]] = []
    widths: list[dict[str, Any]] = []
    scores: list[dict[str, Any]] = []
    for model in models:
        for method in methods:
            asked: Sequence[float | None] = [None] if method in REFERENCES else budgets
            rows += [grid.trained(model, method, seed, budget) for budget in asked for seed in seeds]
            rows += grid.trials(model, method, asked[0])
            for seed in seeds:
                if 0.1 in budgets:
                    rows += [grid.trained(model, method, seed, 0.1, each) for each in CONTESTANTS[method].ablations]
                if method not in (*REFERENCES, *ELEMENT_WISE):
                    widths += [row for budget in budgets for row in grid.widths(model, method, seed, budget)]
                if method.startswith("sseds"):
                    scores += grid.saliency(model, method, seed)
    folder.mkdir(parents=True)
    keys: dict[str, Any] = {"model": pl.String, "method": pl.String, "seed": pl.Int64, "field": pl.String}
    width: dict[str, Any] = {"budget": pl.Float64, "rows": pl.Int64, "original_dim": pl.Int64, "dim": pl.Int64}
    score: dict[str, Any] = {"column": pl.Int64, "score": pl.Float64}
    pl.DataFrame(rows, schema_overrides=NUMBERS).write_parquet(folder / "results.parquet")
    pl.DataFrame(widths, keys | width).write_parquet(folder / "widths.parquet")
    pl.DataFrame(scores, keys | score).write_parquet(folder / "saliency.parquet")
    data = {"path": "data/flights", "train_rows": 269_421, "validation_rows": 33_677, "test_rows": 33_678}
    about = {
        "command": "sseds compare configs/flights_deepfm.yaml --methods all", "config": "configs/flights_deepfm.yaml",
        "data": data | {"fields": len(fields)}, "models": models, "methods": methods, "budgets": budgets, "seeds": seeds,
        "learning_rates": RATES, "embedding_l2": PENALTIES, "tune_budget": 0.1, "processes": 2, "seconds": 5130.0,
        "environment": {"python": "3.11.7", "cpu": "Example CPU", "cores": 2}, "missing": missing,
    }  # fmt: skip
    (folder / "compare.json").write_text(json.dumps(about))
    return folder


def rewrite(folder: Path, edit: Callable[[pl.DataFrame], pl.DataFrame], name: str = "results.parquet") -> None:
    """Changes a table of the comparison."""
    edit(pl.read_parquet(folder / name)).write_parquet(folder / name)
