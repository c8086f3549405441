"""Tables that were learned by heart: drawn anew once the cut has been measured, the others as they were, through kills too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sseds_rec as sr
import sseds_rec.pipeline
from sseds_rec.config import load_config
from sseds_rec.distributed.runtime import runtime
from sseds_rec.distributed.sharding import Placement
from sseds_rec.models import build_slim_model
from sseds_rec.models.ticket import load_ticket, restart_tables
from sseds_rec.pipeline import Pipeline
from sseds_rec.run_directory import RunDirectory
from sseds_rec.training.trainer import Trainer
from tests.command import Command
from tests.models.clicks import plan_of, schema_of
from tests.ranks import run_ranks
from tests.test_retrain_modes import DENSE, MODEL, PLAN, STD, _shard, _started, _state, _weights

Sseds = Callable[..., Command]
ANEW = ["user_id", "tags"]


def _restarted(
    rank: int, world_size: int, folder: str, placement: Placement, seeds: list[int]
) -> list[dict[str, Tensor]]:
    """This rank's weights of the ticket, and after a restart with each seed."""
    torch.manual_seed(rank)
    slim = _shard(build_slim_model(MODEL, schema_of(DENSE), plan_of(PLAN), "select"), rank, world_size, placement)
    load_ticket(Path(folder) / "slim", slim, plan_of(PLAN))
    found = [_state(slim)]
    for seed in seeds:
        torch.manual_seed(100 * rank + seed)  # of which the draw does not depend
        restart_tables(slim, plan_of(PLAN), ANEW, seed)
        found.append(_state(slim))
    return found


@pytest.mark.parametrize("placement", ["table_wise", "row_wise", "column_wise", "data_parallel"])
def test_only_the_named_tables_are_drawn_anew_and_by_the_seed(tmp_path: Path, placement: Placement) -> None:
    run_ranks(1, _started, str(tmp_path), "ticket", "kept", "select")
    ranks = run_ranks(2, _restarted, str(tmp_path), placement, [7, 7, 8])
    tables = plan_of(PLAN).tables
    assert set(ANEW) < set(tables)
    for ticket, first, again, other in ranks:
        assert ticket.keys() == first.keys()
        for name, value in ticket.items():
            same = name not in ANEW
            assert torch.equal(first[name], value) == same, name
            assert torch.equal(first[name], again[name])
            assert torch.equal(first[name], other[name]) == same
    for name in ANEW:
        table = tables[name]
        parts = [found[1][name] for found in ranks if name in found[1]]
        copies = placement == "data_parallel"
        if len(parts) == 2:
            rows = min(map(len, parts))
            assert torch.equal(parts[0][:rows], parts[1][:rows]) == copies
        whole = parts[0] if copies else torch.cat(parts, dim=int(placement == "column_wise"))
        assert whole.shape == (table.rows, table.stored_dim)
        own = whole[:, : table.embedding_dim]
        assert bool(own.all()) and not whole[:, table.embedding_dim :].any()
        assert abs(float(own.std()) - STD) < 3 * STD / (2 * own.numel()) ** 0.5
        assert len(own.unique()) == own.numel()


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A run that is about to retrain, whose plan says that `user` and `hour` were learned by heart."""
    folder: Path = shutil.copytree(finished_run, tmp_path / "run")
    shutil.rmtree(folder / "retrain")
    _set_scales(folder, {"user": 0.5, "ad": 0.75, "hour": 0.74, "noise": 1.2})
    return folder


def _set_scales(run: Path, scales: dict[str, float]) -> None:
    plan = sr.DimensionPlan.load(run / "search/plan.json")
    assert plan.search["scales"].keys() == scales.keys() == plan.tables.keys()
    plan.search["scales"] = scales
    plan.save(run / "search/plan.json")


class _Restarts:
    """What `restart_tables` was called with, which works as ever, or dies before it has done anything."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tables: list[list[str]] = []
        self.dies = False
        monkeypatch.setattr(sseds_rec.pipeline, "restart_tables", self)

    def __call__(self, model: Any, plan: sr.DimensionPlan, tables: list[str], seed: int) -> None:
        if self.dies:
            raise KeyboardInterrupt
        self.tables.append(tables)
        restart_tables(model, plan, tables, seed)


@pytest.fixture
def restarts(monkeypatch: pytest.MonkeyPatch) -> _Restarts:
    return _Restarts(monkeypatch)


def _retrain(config: Path, run: Path, *settings: str) -> dict[str, Any]:
    with runtime("cpu") as place:
        metrics = Pipeline(load_config(config, list(settings)), RunDirectory(run), place).retrain()
    return {key: value for key, value in metrics.items() if "second" not in key}


def _evaluated(run: Path) -> list[dict[str, Any]]:
    events = map(json.loads, (run / "retrain/history.jsonl").read_text().splitlines())
    return [event for event in events if event["kind"] == "eval"]


def _tables(checkpoint: Path) -> dict[str, Tensor]:
    return {name: value for name, value in _weights(checkpoint).items() if ".embedding_bags." in name}


def _same_tables(first: Path, second: Path) -> bool:
    found, expected = _tables(first), _tables(second)
    assert found.keys() == expected.keys()
    return all(torch.equal(value, expected[name]) for name, value in found.items())


def test_a_search_says_the_scales_and_one_of_the_paper_has_none(
    finished_run: Path, config: Path, sseds: Sseds, tmp_path: Path
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    scaled = sr.DimensionPlan.load(run / "search/plan.json")
    scales = scaled.search["scales"]
    assert scales.keys() == scaled.tables.keys() and all(0 <= scale <= 2 for scale in scales.values())
    for options in (["search.rescale_batches=0"], ["search.criterion=ggn"], ["--paper"]):
        assert sseds("search", config, *options, "--run-dir", run, "--rerun").code == 0
        plan = sr.DimensionPlan.load(run / "search/plan.json")
        assert "scales" not in plan.search
        if "search.rescale_batches=0" in options:
            assert plan.rotations.keys() == scaled.rotations.keys()
            for name, rotation in plan.rotations.items():
                shared = [c for c in plan.tables[name].kept if c in scaled.tables[name].kept]
                columns = [plan.tables[name].kept.index(c) for c in shared]
                others = [scaled.tables[name].kept.index(c) for c in shared]
                expected = rotation.forward[:, columns] * scales[name]
                torch.testing.assert_close(scaled.rotations[name].forward[:, others], expected)


def test_the_cut_is_measured_first_and_the_tables_below_are_drawn_anew(
    run: Path, config: Path, restarts: _Restarts
) -> None:
    found = _retrain(config, run)
    assert restarts.tables == [["user", "hour"]]
    start, *epochs = _evaluated(run)
    assert (start["step"], len(epochs)) == (0, 3)
    shutil.rmtree(run / "retrain")
    cut = _retrain(config, run, "retrain.epochs=0")
    assert restarts.tables == [["user", "hour"]]  # nothing is drawn anew where nothing is trained
    assert cut["validation_auc"] == start["auc"] <= found["validation_auc"]
    assert _same_tables(run / "retrain/checkpoint", run / "slim/checkpoint")


def test_the_cut_is_kept_if_no_epoch_is_better(run: Path, config: Path, restarts: _Restarts) -> None:
    """At such a rate the tables stay as they were drawn."""
    found = _retrain(config, run, "retrain.learning_rate=1e-9", "retrain.restart_below=2")
    assert restarts.tables == [["user", "ad", "hour", "noise"]]
    start, *epochs = _evaluated(run)
    assert len(epochs) == 3 and all(event["auc"] < start["auc"] - 0.05 for event in epochs)
    assert found["validation_auc"] == start["auc"]
    assert _same_tables(run / "retrain/checkpoint", run / "slim/checkpoint")


@pytest.mark.parametrize("settings", [["retrain.restart_below=0"], ["retrain.tables=random"], []])
def test_nothing_is_drawn_anew_unless_it_was_learned_by_heart(
    run: Path, config: Path, restarts: _Restarts, settings: list[str]
) -> None:
    if not settings:  # a plan that says no scales
        plan = sr.DimensionPlan.load(run / "search/plan.json")
        del plan.search["scales"]
        plan.save(run / "search/plan.json")
    _retrain(config, run, "retrain.learning_rate=1e-9", *settings)
    assert not any(restarts.tables)
    if settings != ["retrain.tables=random"]:
        start, *epochs = _evaluated(run)
        assert all(event["auc"] == pytest.approx(start["auc"], abs=1e-4) for event in epochs)


def test_a_kill_after_the_first_measurement_restarts_the_tables_all_the_same(
    run: Path, config: Path, restarts: _Restarts
) -> None:
    expected = _retrain(config, run)
    shutil.rmtree(run / "retrain")
    restarts.dies = True
    with pytest.raises(KeyboardInterrupt):
        _retrain(config, run)
    assert [event["step"] for event in _evaluated(run)] == [0]
    restarts.dies = False
    assert _retrain(config, run) == expected
    assert restarts.tables == [["user", "hour"]] * 2
    assert [event["step"] for event in _evaluated(run)] == sorted({event["step"] for event in _evaluated(run)})


@pytest.mark.parametrize("looks", [1, 3])
def test_a_later_kill_does_not_restart_them_again(
    run: Path, config: Path, restarts: _Restarts, monkeypatch: pytest.MonkeyPatch, looks: int
) -> None:
    settings = "train.checkpoint_steps=5"
    expected = _retrain(config, run, settings)
    shutil.rmtree(run / "retrain")
    look_at, left = Trainer._look_at, looks

    def mortal(*args: Any) -> float:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        return look_at(*args)

    monkeypatch.setattr(Trainer, "_look_at", mortal)
    with pytest.raises(KeyboardInterrupt):
        _retrain(config, run, settings)
    monkeypatch.setattr(Trainer, "_look_at", look_at)
    assert list((run / "retrain/checkpoints").glob("step-*5"))
    assert _retrain(config, run, settings) == expected
    assert restarts.tables == [["user", "hour"]] * 2  # of the whole run, and of the one that was killed
