"""The search stage and the audit as a user runs them: every criterion, rules, rounds, what is written and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sseds_rec as sr
from sseds_rec.search.criteria import CRITERIA
from tests.command import Command

Sseds = Callable[..., Command]


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that may be changed."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def _search(sseds: Sseds, config: Path, run: Path, *overrides: str) -> tuple[sr.DimensionPlan, dict[str, Any]]:
    done = sseds("search", config, *overrides, "--run-dir", run, "--rerun", "--json")
    assert done.code == 0, done.err
    metrics = json.loads(done.out.splitlines()[-1])["metrics"]["search"]
    return sr.DimensionPlan.load(run / "search/plan.json"), metrics


@pytest.mark.parametrize("criterion", list(CRITERIA))
def test_every_criterion_makes_a_plan_within_the_budget(criterion: str, run: Path, config: Path, sseds: Sseds) -> None:
    plan, metrics = _search(
        sseds, config, run, f"search.criterion={criterion}", "search.num_batches=2", "search.batch_size=256"
    )
    assert 0 < plan.reached["parameters"]["fraction"] <= 0.25
    assert plan.search["criterion"] == criterion and metrics["batches"] == 2
    assert bool(plan.rotations) == (criterion == "ggn_rotated")
    with np.load(run / "search/saliency.npz") as saliency, np.load(run / "search/saliency_errors.npz") as errors:
        assert sum(saliency[name].sum() for name in plan.tables) == pytest.approx(1)
        assert all(errors[name].shape == saliency[name].shape == (16,) for name in plan.tables)
    assert 0 <= metrics["expected_overlap"] <= 1


def test_rotated_tables_go_through_slim_and_retrain(run: Path, config: Path, sseds: Sseds) -> None:
    done = sseds("run", config, "search.criterion=ggn_rotated", "--run-dir", run, "--rerun-from", "search", "--json")
    assert done.code == 0, done.err
    metrics = json.loads(done.out.splitlines()[-1])["metrics"]
    assert metrics["retrain"]["embedding_parameters"] <= 0.25 * metrics["pretrain"]["embedding_parameters"]
    # A quarter of the parameters in the right basis is as good as all, before any retraining.
    assert metrics["slim"]["auc"] > metrics["pretrain"]["auc"] - 0.005
    assert metrics["retrain"]["validation_auc"] > metrics["pretrain"]["validation_auc"] - 0.005


def test_rules_rounds_and_auto(run: Path, config: Path, sseds: Sseds) -> None:
    overrides = ("search.tables.noise.fixed=0", "search.tables.hour.drop=never", "search.tables.user.max_dim=4")
    plan, metrics = _search(sseds, config, run, *overrides, "search.rounds=2", "search.num_batches=auto")
    dims = plan.dims()
    assert dims["noise"] == 0 and dims["hour"] >= 4 and dims["user"] <= 4
    assert plan.search["rounds"] == 2 and metrics["batches"] <= 2  # of 800 validation rows
    assert plan.search["tables"] == {"noise": {"fixed": 0}, "hour": {"drop": "never"}, "user": {"max_dim": 4}}


def test_one_batch_has_no_errors(run: Path, config: Path, sseds: Sseds) -> None:
    _, metrics = _search(sseds, config, run, "search.num_batches=1")
    assert metrics["expected_overlap"] is None
    assert not (run / "search/saliency_errors.npz").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("search.tables.hours.fixed=0", "a rule for table hours: there is no such table; did you mean hour?"),
        ("search.tables.hour.fixed=3", "table hour: fixed=3 is not a multiple of 4"),
        ("search.tables.hour.fix=4", "unknown key search.tables.hour.fix; did you mean"),
        ("search.num_batches=0", "search.num_batches=0: it is a number from 1 on, or auto"),
        ("search.num_batches=some", "search.num_batches"),
        ("search.rounds=0", "search.rounds=0"),
        ("search.floor_share=2", "search.floor_share=2"),
    ],
)
def test_what_cannot_be_is_refused_before_the_search(
    override: str, message: str, finished_run: Path, config: Path, sseds: Sseds
) -> None:
    done = sseds("search", config, override, "--run-dir", finished_run, "--rerun")
    assert done.code == 2 and len(done.err.splitlines()) == 1
    assert message in done.err
    assert (finished_run / "search/plan.json").exists()


def test_models_that_cannot_be_rotated_are_refused_before_training(config: Path, sseds: Sseds, tmp_path: Path) -> None:
    done = sseds("run", config, "model.name=dcnv2", "search.criterion=ggn_rotated", "--run-dir", tmp_path / "run")
    assert done.code == 2 and "model.name=dcnv2 multiplies raw columns one by one" in done.err
    assert not (tmp_path / "run").exists()


def test_audit_compares_the_scores_with_what_columns_cost(run: Path, config: Path, sseds: Sseds) -> None:
    done = sseds("audit", config, "--run-dir", run, "--columns", 20, "--batches", 2, "--json")
    assert done.code == 0, done.err
    assert "audit: 20 columns left out one at a time, 400 rows" in done.out
    printed = json.loads(done.out.splitlines()[-1])
    assert printed["verb"] == "audit" and -1 <= printed["rank_correlation"] <= 1
    found = json.loads((run / "search/audit.json").read_text())
    assert len(found["columns"]) == 20 and found["samples"] == 400
    assert {key: printed[key] for key in ("regret", "loss")} == {key: found[key] for key in ("regret", "loss")}
    done = sseds("report", config, "--run-dir", run)
    assert done.code == 0, done.err
    page = (run / "report/index.html").read_text()
    assert "Left out one at a time, 20 dims" in page and "of the kept dims would be the same" in page


def test_audit_needs_a_search(config: Path, sseds: Sseds, tmp_path: Path) -> None:
    done = sseds("audit", config, "--run-dir", tmp_path / "run")
    assert done.code == 2 and "audit needs the search stage" in done.err
