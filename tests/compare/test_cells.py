"""Cells one at a time: what a failed one goes on from, and which of several trials is chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from sseds_rec.compare.cells import Cell, Rates
from sseds_rec.compare.grid import Grid
from sseds_rec.compare.pool import Pool
from sseds_rec.compare.run_cell import RESULT, run_cell
from sseds_rec.config import Config, load_config
from sseds_rec.files import read_json, write_json
from sseds_rec.harness.autodim import Autodim
from sseds_rec.harness.scratch import FromScratch
from sseds_rec.pipeline import Pipeline

RATES = Rates(0.01, 0.001)
FULL = Cell("fm", "full", None, 7, RATES)
OURS = Cell("fm", "sseds", 0.25, 7, RATES, RATES)
LEADER = Cell("fm", "autodim", 0.25, 7, RATES)
FOLLOWER = Cell("fm", "autodim", 0.5, 7, RATES)


def _fails(pipeline: Pipeline) -> None:
    raise RuntimeError("no memory left")


def _result(folder: Path, cell: Cell) -> dict[str, Any]:
    found: dict[str, Any] = read_json(folder / cell.folder / RESULT)
    return found


def test_a_cell_that_failed_goes_on_from_its_finished_stages(
    grid_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(grid_config)
    for name in ("whole", "broken"):
        run_cell(FULL, config, tmp_path / name, None)
    run_cell(OURS, config, tmp_path / "whole", None)
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "retrain", _fails)
        run_cell(OURS, config, tmp_path / "broken", None)
    own = tmp_path / "broken" / OURS.folder
    assert _result(tmp_path / "broken", OURS) == {"error": "RuntimeError: no memory left (the traceback is in logs/)"}
    plan = (own / "search/plan.json").stat().st_mtime_ns
    run_cell(OURS, config, tmp_path / "broken", None)
    assert (own / "search/plan.json").stat().st_mtime_ns == plan
    assert _result(tmp_path / "broken", OURS)["auc"] == _result(tmp_path / "whole", OURS)["auc"]
    assert not list(own.glob("*/checkpoint"))[1:]  # of the full model alone


def test_a_cell_that_has_searched_for_itself_keeps_its_search(
    grid_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both fail, the leader in its search and the other one after it, and then neither does."""
    config = load_config(grid_config, ["search.autodim.epochs=1"])
    for cell, kind, stage in ((LEADER, Autodim, "search"), (FOLLOWER, FromScratch, "retrain")):
        with monkeypatch.context() as patch:
            patch.setattr(kind, stage, _fails)
            run_cell(cell, config, tmp_path, LEADER if cell is FOLLOWER else None)
        assert "no memory left" in _result(tmp_path, cell)["error"]
    for cell in (LEADER, FOLLOWER):
        run_cell(cell, config, tmp_path, LEADER if cell is FOLLOWER else None)
        assert "error" not in _result(tmp_path, cell)
    assert not (tmp_path / FOLLOWER.folder / "search/learned").is_symlink()


class _Written(Pool):
    """Writes of each cell the result that it is told, and trains none."""

    def __init__(self, result: Callable[[Cell], dict[str, Any]]) -> None:
        self.result = result

    def run(self, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
        for call in calls:
            cell, _, folder, _ = call
            write_json(folder / cell.folder / RESULT, self.result(cell))
            yield call


@pytest.mark.parametrize(
    ("missed", "failed", "chosen"),
    [
        ({0.01}, {}, 0.003),
        ({0.01, 0.003}, {}, 0.01),
        ({}, {0.01}, 0.003),
        ({0.003}, {0.01}, 0.003),
        ({}, {}, 0.01),
    ],
)
def test_a_trial_that_kept_its_budget_comes_before_better_ones_that_missed_it(
    grid_config: Path, tmp_path: Path, missed: set[float], failed: set[float], chosen: float
) -> None:
    """Validation prefers the rate of .01."""

    def result(cell: Cell) -> dict[str, Any]:
        rate = cell.rates.learning_rate
        if cell.method == "pep" and rate in failed:
            return {"error": "no memory left"}
        kept = 101 if cell.method == "pep" and rate in missed else 100
        asked = None if cell.budget is None else 100
        return {
            "auc": 0.9 - rate,
            "validation_auc": 0.7 + rate,
            "embedding_parameters": kept,
            "budget_parameters": asked,
        }

    config: Config = load_config(grid_config, ["compare.methods=[uniform,pep]", "compare.seeds=1"])
    grid = Grid(config, tmp_path)
    grid.run(_Written(result), lambda *phase: None, lambda: None)
    assert grid.chosen["fm", "pep", ""].learning_rate == chosen
    assert grid.chosen["fm", "uniform", ""].learning_rate == grid.chosen["fm", "full", ""].learning_rate == 0.01
    used = {cell.rates.learning_rate for cell, role in grid.roles if cell.method == "pep" and role == "result"}
    assert used == {chosen}
