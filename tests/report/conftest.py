"""A plausible finished run, written file by file as the other stages leave it, and a browser to look at its page."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from playwright.sync_api import Browser, sync_playwright

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
FLIGHTS_ROWS = {
    "tailnum": 4044, "flight": 3845, "dest": 106, "origin": 4, "carrier": 17, "month": 13, "day": 32, "weekday": 8,
    "hour": 21, "minute": 61, "sched_dep_time": 1022, "plane_model": 128, "plane_manufacturer": 36, "plane_engines": 5,
    "plane_seats": 49, "plane_year": 47, "plane_type": 4, "weather_temp": 33, "weather_dewp": 31, "weather_humid": 37,
    "weather_wind_dir": 38, "weather_wind_speed": 27, "weather_precip": 15, "weather_visib": 19, "weather_pressure": 22,
}  # fmt: skip


FAINT = 1e-6  # below this, the plan leaves a group of dims even where it would fit


def _plan(saliency: Mapping[str, np.ndarray], rows: Mapping[str, int], dim: int, budget: float) -> dict[str, Any]:
    """Columns in groups of four by saliency / rows^0.5, taken while they fit the budget."""
    total = sum(rows.values()) * dim
    groups = []
    for name, scores in saliency.items():
        order = np.argsort(-scores)
        groups += [(scores[g].sum() / rows[name] ** 0.5, name, g.tolist()) for g in order.reshape(-1, 4)]
    kept: dict[str, list[int]] = {name: [] for name in saliency}
    used = 0
    for score, name, columns in sorted(groups, key=lambda group: -group[0]):
        if score > FAINT and used + 4 * rows[name] <= budget * total:
            used += 4 * rows[name]
            kept[name] += columns
    of_dims, dims = len(rows) * dim, sum(map(len, kept.values()))
    return {
        "version": 1,
        "tables": {
            name: {
                "rows": rows[name],
                "original_dim": dim,
                "kept": sorted(columns),
                "embedding_dim": len(columns),
                "stored_dim": len(columns),
            }
            for name, columns in kept.items()
        },
        "budget": {"parameters": budget},
        "reached": {
            "parameters": {"kept": used, "of": total, "fraction": used / total},
            "dims": {"kept": dims, "of": of_dims, "fraction": dims / of_dims},
        },
        "search": {"method": "sseds", "criterion": "ggn", "batches": 32, "seed": 7},
    }


def _history(rng: np.random.Generator, best_auc: float, seconds: float) -> str:
    events: list[dict[str, Any]] = []
    for step in range(10, 5 * 131 + 1, 10):
        loss = 0.455 + 0.12 * np.exp(-step / 90) - 0.00004 * step + rng.normal(0, 0.006)
        events.append({"kind": "train", "step": step, "epoch": step / 131, "loss": loss, "samples_per_second": 2e4})
    for epoch in range(1, 6):
        auc = best_auc - 0.03 * np.exp(-epoch) - 0.002 * max(0, epoch - 3)
        step = 131 * epoch
        events.append({"kind": "eval", "split": "validation", "step": step, "epoch": float(epoch), "auc": auc})
        events[-1]["logloss"] = 0.46
    for event in events:
        event["seconds"] = seconds * event["epoch"] / 5
    return "".join(json.dumps(event) + "\n" for event in sorted(events, key=lambda event: event["step"]))


def write_run(run_dir: Path, rows: Mapping[str, int], dim: int = 64, budget: float = 0.1) -> Path:
    rng = np.random.default_rng(7)
    for folder in ("pretrain", "retrain", "search"):
        (run_dir / folder).mkdir(parents=True)
    faint = set(list(rows)[3::9])  # fields without a say, which the plan drops
    raw = {
        name: rng.gamma(0.5, 1, dim) ** 2 * rng.lognormal(0, 1.2) * n**0.3 * (1e-4 if name in faint else 1)
        for name, n in rows.items()
    }
    total = sum(scores.sum() for scores in raw.values())
    saliency = {name: scores / total for name, scores in raw.items()}
    plan = _plan(saliency, rows, dim, budget)
    np.savez(run_dir / "search" / "saliency.npz", **saliency)
    (run_dir / "search" / "plan.json").write_text(json.dumps(plan))

    reached = plan["reached"]["parameters"]
    base = {
        "auc": 0.74213,
        "logloss": 0.45612,
        "embedding_parameters": reached["of"],
        "parameters": reached["of"] + 2_736_129,
    }
    base |= {"seconds": 96.4, "samples_per_second": 21_034.2, "inference_samples_per_second": 60_112.7}
    base |= {"calibration": 1.01274, "gauc": 0.71127, "group_field": "carrier"}
    slim = {
        "auc": 0.74331,
        "logloss": 0.45533,
        "embedding_parameters": reached["kept"],
        "parameters": reached["kept"] + 1_301_505,
    }
    slim |= {"seconds": 61.7, "samples_per_second": 33_810.9, "inference_samples_per_second": 130_459.1}
    slim |= {"calibration": 0.99718, "gauc": 0.71384, "group_field": "carrier"}
    search = {"seconds": 1.24, "batches": 32, "budget": plan["budget"], "reached": plan["reached"]}
    metrics = {"pretrain": base, "retrain": slim, "slim": {"auc": 0.73642, "logloss": 0.45991}, "search": search}
    (run_dir / "metrics.json").write_text(json.dumps(metrics))
    (run_dir / "pretrain" / "history.jsonl").write_text(_history(rng, 0.745, 96.4))
    (run_dir / "retrain" / "history.jsonl").write_text(_history(rng, 0.7465, 61.7))

    config = {
        "name": run_dir.name,
        "seed": 7,
        "data": {"path": "data/flights"},
        "model": {"name": "deepfm", "embedding_dim": dim, "hidden": [1024, 1024]},
        "train": {"batch_size": 2048, "epochs": 5, "learning_rate": 1e-3, "embedding_l2": 1e-5},
        "search": {"criterion": "ggn", "num_batches": 32, "budget": {"parameters": budget}},
        "retrain": {"init": "random", "epochs": 5},
    }
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    versions = {"sseds_rec": "0.1.0", "torch": "2.13.0", "torchrec": "1.8.0", "fbgemm": "1.8.0", "python": "3.11.7"}
    machine = {"platform": "Linux-6.1-x86_64", "cpu": "Example CPU", "cores": 2, "device": "cpu", "world_size": 1}
    (run_dir / "environment.json").write_text(json.dumps(versions | machine))
    return run_dir


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Write a run directory `runs/NAME` with the given tables (default: the fields of the flights data)."""

    def make(rows: Mapping[str, int] = FLIGHTS_ROWS, name: str = "flights_deepfm") -> Path:
        return write_run(tmp_path / "runs" / name, rows)

    return make


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next(filter(None, map(shutil.which, names)), None)
    if executable is None:
        pytest.fail("no browser found: install Debian's package `chromium` (or google-chrome)", pytrace=False)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        yield chromium
        chromium.close()
