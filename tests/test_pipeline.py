"""The stages end to end: artefacts, budget counted from tensors, stages alone, resuming, several ranks."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml

import sseds_rec as sr
from sseds_rec.config import load_config
from sseds_rec.data.schema import Schema
from sseds_rec.distributed.runtime import Runtime
from sseds_rec.pipeline import Pipeline
from sseds_rec.run_directory import RunDirectory
from tests.command import Command, torchrun
from tests.ranks import run_ranks

Sseds = Callable[..., Command]


def _json(*path: Path | str) -> Any:
    return json.loads(Path(*path).read_text())


def _results(run: Path) -> dict[str, Any]:
    """Everything in metrics.json that must not depend on the clock."""
    clocks = ("seconds", "samples_per_second", "inference_samples_per_second")
    return {
        stage: {k: v for k, v in metrics.items() if k not in clocks}
        for stage, metrics in _json(run, "metrics.json").items()
    }


def _table_parameters(checkpoint: Path) -> int:
    """Numbers in the tables of a checkpoint, counted from the stored tensors."""
    entries = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    return sum(e.size.numel() for name, e in entries.items() if name.startswith("model.embeddings.embedding_bags."))


def test_run_directory_holds_what_the_contract_names(finished_run: Path) -> None:
    artefacts = {
        ".": ["config.yaml", "environment.json", "metrics.json"],
        "pretrain": ["checkpoint", "history.jsonl", "tensorboard", "metrics.json"],
        "search": ["saliency.npz", "plan.json"],
        "slim": ["checkpoint", "tables.json", "sharding_plan.json"],
        "retrain": ["checkpoint", "history.jsonl", "tensorboard", "metrics.json"],
        "report": ["index.html"],
    }
    for folder, names in artefacts.items():
        assert [name for name in names if not (finished_run / folder / name).exists()] == []
    metrics = _json(finished_run, "metrics.json")
    quality = {"auc", "logloss", "normalized_entropy", "calibration", "inference_samples_per_second"}
    keys = quality | {"embedding_parameters", "parameters", "seconds", "samples_per_second"}
    assert keys <= set(metrics["pretrain"]) and keys <= set(metrics["retrain"]) and quality <= set(metrics["slim"])
    assert {"seconds", "batches", "budget", "reached"} <= set(metrics["search"])
    assert not list(finished_run.rglob("*.tmp")) and not list(finished_run.rglob("checkpoints"))


def test_what_the_command_printed(finished_run: Path) -> None:
    out = (finished_run / "stdout.txt").read_text()
    for stage in ("pretrain", "search", "slim", "retrain", "report"):
        assert f"{stage}: wrote {finished_run / stage}" in out
    line = json.loads(out.strip().splitlines()[-1])
    assert line["metrics"] == _json(finished_run, "metrics.json") and line["run_dir"] == str(finished_run)
    err = (finished_run / "stderr.txt").read_text()
    assert "pretrain: epoch 3/3  validation AUC" in err
    assert "Warning" not in err and "WARNING" not in err


def test_budget_is_reached_in_the_tensors(finished_run: Path) -> None:
    full, slim = (
        _table_parameters(finished_run / "pretrain/checkpoint"),
        _table_parameters(finished_run / "slim/checkpoint"),
    )
    metrics = _json(finished_run, "metrics.json")
    assert slim <= 0.25 * full
    assert slim == _table_parameters(finished_run / "retrain/checkpoint")
    assert (metrics["pretrain"]["embedding_parameters"], metrics["retrain"]["embedding_parameters"]) == (full, slim)
    plan = sr.DimensionPlan.load(finished_run / "search/plan.json")
    assert plan.reached["parameters"] == {"kept": slim, "of": full, "fraction": slim / full}
    assert {c.name: [c.num_embeddings, c.embedding_dim] for c in plan.embedding_bag_configs()} == {
        t["name"]: [t["num_embeddings"], t["embedding_dim"]] for t in _json(finished_run, "slim/tables.json")
    }


def test_the_model_learns_and_the_slim_one_keeps_it(finished_run: Path) -> None:
    metrics = _json(finished_run, "metrics.json")
    assert metrics["pretrain"]["auc"] > 0.7
    assert metrics["retrain"]["auc"] > metrics["pretrain"]["auc"] - 0.02


def test_finished_run_does_nothing_and_says_so(finished_run: Path, config: Path, sseds: Sseds) -> None:
    def state() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in sorted(finished_run.rglob("*"))}

    before = state()
    again = sseds("run", config, "--run-dir", finished_run, "--json")
    assert again.code == 0 and "already done, nothing to do" in again.out
    assert again.json["done"] == [] and state() == before


def test_stages_alone_give_what_the_run_gave(finished_run: Path, config: Path, sseds: Sseds, tmp_path: Path) -> None:
    for verb in ("train", "search", "slim", "retrain"):
        done = sseds(verb, config, "--run-dir", tmp_path / "alone")
        assert done.code == 0, done.err
    assert _results(tmp_path / "alone") == _results(finished_run)
    assert sseds("report", config, "--run-dir", tmp_path / "alone").code == 0
    assert (tmp_path / "alone/report/index.html").exists()


def test_stages_run_again_give_the_same(finished_run: Path, config: Path, sseds: Sseds, tmp_path: Path) -> None:
    run = tmp_path / "again"
    shutil.copytree(finished_run, run)
    for verb in ("search", "slim", "retrain"):
        assert sseds(verb, config, "--run-dir", run, "--rerun").code == 0
    assert _results(run) == _results(finished_run)
    with np.load(run / "search/saliency.npz") as ours, np.load(finished_run / "search/saliency.npz") as first:
        assert set(ours) == set(first) and all(np.array_equal(ours[name], first[name]) for name in ours)


def test_evaluate_gives_the_metrics_of_the_run(finished_run: Path, config: Path, sseds: Sseds) -> None:
    for stage in ("pretrain", "retrain"):
        done = sseds("evaluate", config, "--run-dir", finished_run, "--stage", stage, "--json")
        assert done.json["auc"] == _results(finished_run)[stage]["auc"]


def test_evaluate_groups_a_finished_runs_rows_by_any_field(
    finished_run: Path, config: Path, prepared: Path, sseds: Sseds, tmp_path: Path
) -> None:
    run = tmp_path / "grouped"
    shutil.copytree(finished_run, run)
    test = Schema.load(prepared).splits["test"]
    rate = test.positives / test.rows
    entropy = -rate * np.log(rate) - (1 - rate) * np.log(1 - rate)
    gaucs = []
    for field in ("user", "ad"):
        done = sseds("evaluate", config, f"evaluation.group_field={field}", "--run-dir", run, "--json")
        assert done.code == 0, done.err
        metrics = done.json
        assert metrics["auc"] == _results(finished_run)["retrain"]["auc"] and metrics["samples"] == test.rows
        assert metrics["normalized_entropy"] == pytest.approx(metrics["logloss"] / entropy, abs=1e-12)
        assert f"GAUC by {field} {metrics['gauc']:.6f}" in done.out and f"{test.rows:,} rows" in done.out
        gaucs.append(metrics["gauc"])
    assert len({*gaucs, metrics["auc"]}) == 3 and min(gaucs) > 0.6


def test_changed_config_is_refused_until_asked_for(
    finished_run: Path, config: Path, sseds: Sseds, tmp_path: Path
) -> None:
    run = tmp_path / "changed"
    shutil.copytree(finished_run, run)
    refused = sseds("run", config, "search.budget.parameters=0.5", "--run-dir", run)
    assert refused.code == 2 and refused.err.count("\n") == 1
    assert "search.budget.parameters=0.25, now it is 0.5" in refused.err and "--rerun-from search" in refused.err
    rounded = sseds("run", config, "sharding.comm_precision=fp16", "--run-dir", run)
    assert rounded.code == 2 and "sharding.comm_precision=fp32, now it is fp16" in rounded.err
    assert _results(run) == _results(finished_run)
    done = sseds("run", config, "search.budget.parameters=0.5", "--run-dir", run, "--rerun-from", "search", "--json")
    assert done.code == 0 and done.json["done"] == ["search", "slim", "retrain", "report"]
    assert _results(run)["pretrain"] == _results(finished_run)["pretrain"]
    assert 0.25 < _results(run)["search"]["reached"]["parameters"]["fraction"] <= 0.5
    assert yaml.safe_load((run / "config.yaml").read_text())["search"]["budget"]["parameters"] == 0.5
    assert load_config(run / "config.yaml") == load_config(config, ["search.budget.parameters=0.5"])


def test_paper_mode_and_select_or_random_transforms(
    finished_run: Path, config: Path, sseds: Sseds, tmp_path: Path
) -> None:
    run = tmp_path / "paper"
    shutil.copytree(finished_run, run)
    done = sseds("run", config, "--paper", "retrain.transform=random", "--run-dir", run, "--rerun-from", "search")
    assert done.code == 0, done.err
    plan = _json(run, "search/plan.json")
    expected = {
        "criterion": "snip",
        "batches": 1,
        "split": "train",
        "exponent": 0.0,
        "order": "stop",
        "min_dim": 0,
        "samples": 256,
    }
    assert expected.items() <= plan["search"].items()
    widest = max(t["embedding_dim"] for t in plan["tables"].values())
    stored = dcp.FileSystemReader(run / "retrain/checkpoint").read_metadata().state_dict_metadata
    transforms = {
        name.rpartition(".")[2]: tuple(e.size)
        for name, e in stored.items()
        if ".transforms." in name and name.startswith("model")
    }
    assert transforms == {name: (widest, t["embedding_dim"]) for name, t in plan["tables"].items() if t["kept"]}


@pytest.mark.parametrize(
    ("appears", "settings"),
    [
        ("pretrain/checkpoints/step-00000010", []),
        ("pretrain/checkpoints/step-00000040", []),
        ("search", []),
        ("slim/.checkpoint.converting", []),
        ("retrain/checkpoints/step-00000030", []),
        ("report", []),
        (
            "pretrain/checkpoints/step-00000030",
            ["train.table_optimizer=rowwise_adagrad", "train.table_learning_rate=0.05"],
        ),
    ],
)
def test_killed_run_goes_on_to_the_same_result(
    finished_run: Path, config: Path, sseds: Sseds, tmp_path: Path, appears: str, settings: list[str]
) -> None:
    run = tmp_path / "killed"
    args = ["run", config, "train.checkpoint_steps=10", "--run-dir", run, *settings]
    expected = finished_run
    if settings:
        expected = tmp_path / "whole"
        assert sseds("run", config, "--run-dir", expected, *settings).code == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "sseds_rec", *args], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (run / appears).exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    resumed = sseds(*args)
    assert resumed.code == 0, resumed.err
    assert _results(run) == _results(expected)
    history = [json.loads(line) for line in (run / "pretrain/history.jsonl").read_text().splitlines()]
    evaluated = [event["step"] for event in history if event["kind"] == "eval"]
    assert evaluated == sorted(set(evaluated)) and len(evaluated) == 3


@pytest.mark.parametrize("file", ["pretrain/checkpoint", "search/plan.json"])
def test_damaged_artefacts_are_one_line(
    finished_run: Path, config: Path, sseds: Sseds, tmp_path: Path, file: str
) -> None:
    run = tmp_path / "damaged"
    shutil.copytree(finished_run, run)
    for path in (run / file).glob("*.distcp") if (run / file).is_dir() else [run / file]:
        path.write_bytes(path.read_bytes()[:100])
    verb = "search" if "pretrain" in file else "slim"
    done = sseds(verb, config, "--run-dir", run, "--rerun")
    assert done.code == 2 and done.err.count("\n") == 1 and file in done.err


def test_tables_of_a_plan_may_come_in_any_order(finished_run: Path, config: Path, sseds: Sseds, tmp_path: Path) -> None:
    run = tmp_path / "turned"
    shutil.copytree(finished_run, run)
    plan = _json(run, "search/plan.json")
    plan["tables"] = dict(reversed(plan["tables"].items()))
    (run / "search/plan.json").write_text(json.dumps(plan))
    assert sseds("slim", config, "--run-dir", run, "--rerun").code == 0
    assert _results(run)["slim"] == _results(finished_run)["slim"]
    plan["tables"].pop("user")
    (run / "search/plan.json").write_text(json.dumps(plan))
    done = sseds("slim", config, "--run-dir", run, "--rerun")
    assert done.code == 2 and "plan: there is a rotation of table user, which the plan does not have" in done.err


def test_what_kills_between_two_writes_leave_is_mended(
    finished_run: Path, config: Path, sseds: Sseds, tmp_path: Path
) -> None:
    run = tmp_path / "between"
    shutil.copytree(finished_run, run)
    shutil.rmtree(run / "report")
    metrics = _json(run, "metrics.json")
    metrics.pop("retrain")
    (run / "metrics.json").write_text(json.dumps(metrics))
    (run / "pretrain/checkpoints/step-00000001").mkdir(parents=True)
    (run / ".search.removed").mkdir()
    assert sseds("run", config, "--run-dir", run).code == 0
    assert _results(run) == _results(finished_run) and (run / "report/index.html").exists()
    assert not (run / "pretrain/checkpoints").exists() and not (run / ".search.removed").exists()


def test_retrain_that_stops_before_its_rates_fall_is_refused(config: Path, sseds: Sseds, tmp_path: Path) -> None:
    settings = ["train.reduce_patience=1", "retrain.patience=1"]
    done = sseds("run", config, *settings, "--run-dir", tmp_path / "run")
    assert done.code == 2 and done.err.count("\n") == 1 and not (tmp_path / "run").exists()
    assert all(setting in done.err for setting in settings)
    assert load_config(config, ["train.reduce_patience=1", "retrain.patience=2"]).retrain_as_train().patience == 2


def _evaluated(run: Path, stage: str) -> list[dict[str, Any]]:
    """The stage's validations, in order."""
    events = map(json.loads, (run / stage / "history.jsonl").read_text().splitlines())
    return [event for event in events if event["kind"] == "eval"]


def test_early_stopping_keeps_the_best_step_and_retrain_has_its_own_settings(
    config: Path, sseds: Sseds, tmp_path: Path
) -> None:
    run = tmp_path / "stopped"
    settings = [
        "train.epochs=12",
        "train.patience=1",
        "train.learning_rate=0.05",
        "retrain.epochs=1",
        "train.embedding_l2=0.001",
    ]
    assert sseds("run", config, *settings, "--run-dir", run).code == 0
    pretrain, retrain = _results(run)["pretrain"], _results(run)["retrain"]
    aucs = [event["auc"] for event in _evaluated(run, "pretrain")]
    assert pretrain["epochs"] == len(aucs) < 12 and aucs[-1] <= aucs[-2] == max(aucs) == pretrain["validation_auc"]
    best = sseds(
        "evaluate", config, *settings, "--run-dir", run, "--stage", "pretrain", "--split", "validation", "--json"
    )
    assert best.json["auc"] == max(aucs)
    assert retrain["epochs"] == 1


def test_retraining_that_only_harms_keeps_the_start(
    finished_run: Path, config: Path, sseds: Sseds, tmp_path: Path
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    assert sseds("retrain", config, "retrain.learning_rate=0.5", "--run-dir", run, "--rerun").code == 0
    start, *epochs = _evaluated(run, "retrain")
    assert (start["step"], start["epoch"]) == (0, 0) and [event["epoch"] for event in epochs] == [1, 2, 3]
    assert all(event["auc"] < start["auc"] for event in epochs)
    slim, retrain = _results(run)["slim"], _results(run)["retrain"]
    assert retrain["validation_auc"] == start["auc"]
    assert (retrain["auc"], retrain["logloss"]) == (slim["auc"], slim["logloss"])


def test_the_start_of_a_retraining_does_not_stop_it(
    finished_run: Path, config: Path, sseds: Sseds, tmp_path: Path
) -> None:
    """With a patience of one it ends with the first epoch that is no better than one before, however good the start was."""
    run = shutil.copytree(finished_run, tmp_path / "run")
    settings = ["retrain.learning_rate=0.5", "retrain.patience=1"]
    assert sseds("retrain", config, *settings, "--run-dir", run, "--rerun").code == 0
    start, *aucs = [event["auc"] for event in _evaluated(run, "retrain")]
    assert max(aucs) < start
    fell = [number for number in range(1, len(aucs)) if aucs[number] <= max(aucs[:number])]
    assert len(aucs) >= 2 and fell in ([], [len(aucs) - 1]) and (fell or len(aucs) == 3)


def _pretrain_on_rank(rank: int, world_size: int, config: Path, settings: list[str], run: Path) -> None:
    runtime = Runtime(rank, world_size, torch.device("cpu"))
    Pipeline(load_config(config, settings), RunDirectory(run), runtime).pretrain()


def _losses(run: Path) -> list[float]:
    events = [json.loads(line) for line in (run / "pretrain/history.jsonl").read_text().splitlines()]
    return [event["loss"] for event in events if event["kind"] == "train"]


@pytest.mark.parametrize("table_optimizer", ["adam", "rowwise_adagrad"])
def test_two_ranks_give_the_same_metrics_as_one_within_noise_and_as_two_exactly(
    config: Path, sseds: Sseds, tmp_path: Path, table_optimizer: str
) -> None:
    own = ["train.epochs=6"]  # until the model has settled: before that, its AUC is a matter of the order of the rows
    if table_optimizer != "adam":
        own += [f"train.table_optimizer={table_optimizer}", "train.table_learning_rate=0.05"]
    one = tmp_path / "one"
    assert sseds("run", config, *own, "--run-dir", one).code == 0
    torchrun(2, "run", config, *own, "--run-dir", tmp_path / "two")
    ours, expected = _results(tmp_path / "two"), _results(one)
    for stage in ("pretrain", "retrain"):
        assert ours[stage]["auc"] == pytest.approx(expected[stage]["auc"], abs=0.03)
    assert ours["pretrain"]["embedding_parameters"] == expected["pretrain"]["embedding_parameters"]
    assert _table_parameters(tmp_path / "two/slim/checkpoint") <= 0.25 * _table_parameters(
        tmp_path / "two/pretrain/checkpoint"
    )
    placed = (tmp_path / "two/pretrain/sharding_plan.json").read_text()
    assert ("data_parallel" if table_optimizer == "adam" else "table_wise") in placed
    run_ranks(2, _pretrain_on_rank, config, own, tmp_path / "again")
    assert _results(tmp_path / "again")["pretrain"] == ours["pretrain"]  # the same ranks: to the last bit
    assert _losses(tmp_path / "again") == _losses(tmp_path / "two")


def test_two_ranks_score_a_checkpoint_of_one_as_one_does(finished_run: Path, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "scored"
    shutil.copytree(finished_run, run)
    torchrun(2, "search", config, "--run-dir", run, "--rerun")
    with np.load(run / "search/saliency.npz") as ours, np.load(finished_run / "search/saliency.npz") as one:
        for name in one:
            np.testing.assert_allclose(ours[name], one[name], rtol=1e-5, atol=1e-9)
    assert _json(run, "search/plan.json")["tables"].keys() == _json(finished_run, "search/plan.json")["tables"].keys()
