"""`torchx run -s local_cwd`: one process, several, and several nodes on this machine, against one plain process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sseds_rec.search.plan import DimensionPlan
from tests.command import COMPONENTS, Command, torchx
from tests.ranks import free_port

Sseds = Callable[..., Command]


def start(verb: str, shape: str, config: Path, run: Path, *more: str) -> str:
    """What the job printed."""
    launch = ["-j", shape, "--rdzv_port", free_port(), "--config", config.name, "--run_dir", run]
    command = ["run", "-s", "local_cwd", f"{COMPONENTS}:{verb}", *launch, *more]
    done = torchx(*command, cwd=config.parent, PATH="/usr/bin:/bin")  # no environment is active
    assert done.code == 0, done.err
    return done.err


def results(run: Path) -> dict[str, Any]:
    """Everything in metrics.json that must not depend on the clock."""
    metrics = json.loads((run / "metrics.json").read_text())
    return {
        stage: {key: value for key, value in found.items() if "seconds" not in key and "per_second" not in key}
        for stage, found in metrics.items()
    }


def test_one_process_gives_what_it_gives_without_torchx(config: Path, finished_run: Path, tmp_path: Path) -> None:
    shown = start("run", "1x1", config, tmp_path / "run", "--", "--json")
    assert results(tmp_path / "run") == results(finished_run)
    assert f'"run_dir": "{tmp_path / "run"}"' in shown


def test_two_processes_score_a_checkpoint_as_one_does(config: Path, finished_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    start("search", "1x2", config, run, "--", "--rerun")
    assert_same_search(run, finished_run)


def test_two_nodes_do_what_one_process_does(config: Path, finished_run: Path, tmp_path: Path, sseds: Sseds) -> None:
    run = tmp_path / "run"
    start("run", "2x2", config, run, "train.epochs=6")  # until the model has settled
    assert json.loads((run / "environment.json").read_text())["world_size"] == 4
    ours, one = results(run), results(finished_run)
    assert ours["retrain"]["auc"] == pytest.approx(one["retrain"]["auc"], abs=0.03)
    assert ours["pretrain"]["embedding_parameters"] == one["pretrain"]["embedding_parameters"]
    alone = shutil.copytree(run, tmp_path / "alone")
    assert sseds("search", config, "train.epochs=6", "--run-dir", alone, "--rerun").code == 0
    assert_same_search(run, alone)


def test_what_fails_says_so(config: Path, tmp_path: Path) -> None:
    command = ["run", "-s", "local_cwd", f"{COMPONENTS}:run", "-j", "1x2", "--config", config, "train.epoch=2"]
    done = torchx(*command, cwd=tmp_path)
    assert done.code == 1 and "state: FAILED" in done.err
    assert f"sseds: {config}: unknown key train.epoch; did you mean train.epochs?" in done.err


def assert_same_search(run: Path, other: Path) -> None:
    """Scores are equal but for float noise, and so are the widths that the budget buys."""
    with np.load(run / "search/saliency.npz") as ours, np.load(other / "search/saliency.npz") as theirs:
        assert set(ours) == set(theirs)
        for name in theirs:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-9)
    ours, theirs = (DimensionPlan.load(folder / "search/plan.json").dims() for folder in (run, other))
    assert ours == theirs
