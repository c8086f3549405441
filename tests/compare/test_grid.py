"""`sseds compare` on a small set: the same trials for all, choices by validation alone, budgets counted, killed and gone on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from sseds_rec.compare.accounting import count_tables
from sseds_rec.compare.cells import Cell, Rates
from sseds_rec.compare.contestants import CONTESTANTS
from sseds_rec.compare.grid import Grid
from sseds_rec.config import load_config
from sseds_rec.search.plan import DimensionPlan
from tests.command import Command

Sseds = Callable[..., Command]


@pytest.fixture(scope="module")
def compared(grid_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished comparison."""
    folder = tmp_path_factory.mktemp("compare") / "grid"
    subprocess.run(_command(grid_config, folder), check=True, capture_output=True)
    return folder


def _command(config: Path, folder: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "sseds_rec", "compare", str(config), "--run-dir", str(folder), *options]


def _results(folder: Path) -> pl.DataFrame:
    return pl.read_parquet(folder / "results.parquet")


def _reached(run: Path) -> int:
    """The parameters that a cell's search says it keeps."""
    return DimensionPlan.load(run / "search/plan.json").reached["parameters"]["kept"]


def test_every_method_has_the_same_trials(compared: Path) -> None:
    trials = _results(compared).filter(role="trial")
    for (method,), own in trials.group_by("method"):
        assert sorted(own["learning_rate"]) == [0.003, 0.01], method
        assert set(own["seed"]) == {7} and set(own["budget"]) <= {0.25, None}


def test_what_is_used_is_what_validation_chose(compared: Path) -> None:
    results = _results(compared)
    for (method,), trials in results.filter(role="trial").group_by("method"):
        (used,) = set(results.filter(pl.col("method") == method, role="result")["learning_rate"])
        assert trials.filter(learning_rate=used)["validation_auc"].item() == trials["validation_auc"].max(), method


def test_all_cells_are_there_and_within_their_budget(compared: Path) -> None:
    results = _results(compared).filter(role="result")
    expected = {
        (m, b, s) for m in ("uniform", "mde", "random", "sseds_paper", "sseds") for b in (0.5, 0.25) for s in (7, 8)
    }
    expected |= {(m, None, s) for m in ("full", "drop_ids") for s in (7, 8)}
    assert set(results.select("method", "budget", "seed").iter_rows()) == expected
    assert json.loads((compared / "compare.json").read_text())["missing"] == []
    (whole,) = set(results.filter(method="full")["embedding_parameters"])
    for row in results.drop_nulls("budget").iter_rows(named=True):
        assert row["budget_parameters"] == int(whole * row["budget"])
        assert row["missed"] == (row["embedding_parameters"] > row["budget_parameters"]) is False
        assert row["embedding_parameters"] == _reached(compared / row["run"]), row["run"]


def test_methods_that_start_from_a_trained_model_share_the_tuned_one(compared: Path) -> None:
    results = _results(compared).filter(role="result")
    full = {row["seed"]: row for row in results.filter(method="full").iter_rows(named=True)}
    for row in results.filter(pl.col("method").is_in(["random", "sseds", "sseds_paper"])).iter_rows(named=True):
        trained = full[row["seed"]]
        assert (compared / row["run"] / "pretrain").resolve() == (compared / trained["run"] / "pretrain").resolve()
        assert row["pretrain_seconds"] == trained["pretrain_seconds"] > 0
    assert set(results.filter(pl.col("method").is_in(["uniform", "mde"]))["pretrain_seconds"]) == {0.0}
    checkpoint = compared / full[7]["run"] / "pretrain/checkpoint"
    assert count_tables(checkpoint).columns == full[7]["embedding_parameters"]


def test_only_weights_that_cells_start_from_stay(compared: Path) -> None:
    results = _results(compared)
    (used,) = set(results.filter(method="full", role="result")["learning_rate"])
    for row in results.filter(method="full").iter_rows(named=True):
        assert (compared / row["run"] / "pretrain/checkpoint").exists() == (row["learning_rate"] == used)
    left = {path.parent.name for path in compared.glob("cells/*/*/*/*/*/*/checkpoint")}
    assert left == {"pretrain"}


def test_killed_it_goes_on_to_the_same_numbers(compared: Path, grid_config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "grid"
    options = ["--methods", "uniform,sseds", "--budgets", "0.25", "--seeds", "1"]
    with subprocess.Popen(_command(grid_config, folder, *options), stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while len(done := list(folder.glob("cells/**/result.json"))) < 2:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    while any(_is_worker_of(folder, pid) for pid in _processes()):
        assert time.monotonic() < deadline  # workers end with their parent
        time.sleep(0.1)
    before = {path: path.stat().st_mtime_ns for path in done}
    subprocess.run(_command(grid_config, folder, *options), check=True, capture_output=True)
    assert {path: path.stat().st_mtime_ns for path in done} == before
    key = ["method", "budget", "seed", "learning_rate"]
    columns = [*key, "auc", "logloss", "embedding_parameters"]
    found = _results(folder).filter(role="trial").select(columns).sort(key)
    whole = _results(compared).filter(pl.col("method").is_in(found["method"].unique().implode()), role="trial")
    assert found.equals(whole.select(columns).sort(key))


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _is_worker_of(folder: Path, pid: int) -> bool:
    try:
        return any(str(folder) in os.readlink(link) for link in Path("/proc", str(pid), "fd").iterdir())
    except OSError:
        return False


def test_a_cell_that_fails_is_named_and_the_others_go_on(grid_config: Path, tmp_path: Path) -> None:
    """Half a percent is less than one column of every table: `uniform` cannot keep it, nor AutoDim, whose trials are there."""
    options = ["--methods", "uniform,mde,autodim", "--budgets", "0.25,0.005", "--seeds", "1"]
    options += ["compare.learning_rates=[0.01]", "search.autodim.epochs=1"]
    done = subprocess.run(
        _command(grid_config, tmp_path / "grid", *options, "--json"),
        check=True,
        capture_output=True,
        text=True,
    )
    missing = json.loads(done.stdout.splitlines()[-1])["missing"]
    assert {cell["run"].split("/")[2] for cell in missing} == {"uniform", "mde", "autodim"}
    assert all("of every table" in cell["why"] and "the budget is" in cell["why"] for cell in missing)
    found = _results(tmp_path / "grid").filter(role="result").select("method", "budget")
    assert set(found.iter_rows()) == {("full", None), ("uniform", 0.25), ("mde", 0.25), ("autodim", 0.25)}


def test_what_other_methods_keep_is_counted_and_a_missed_budget_is_said_to_be(
    grid_config: Path, tmp_path: Path
) -> None:
    """PEP's thresholds start too low to get anywhere in one epoch."""
    options = ["--methods", "magnitude,pca_energy,autodim,pep,deeplight", "--budgets", "0.25", "--seeds", "1"]
    options += ["compare.learning_rates=[0.01]", "search.autodim.epochs=1", "search.deeplight.epochs=1"]
    options += ["search.pep={start: -9, learning_rate: 0.1, weight_decay: 0.01, epochs: 1}"]
    done = subprocess.run(
        _command(grid_config, tmp_path / "grid", *options), check=True, capture_output=True, text=True
    )
    results = _results(tmp_path / "grid").filter(role="result")
    (whole,) = results.filter(method="full")["embedding_parameters"]
    results = results.drop_nulls("budget")
    assert set(results["method"]) == {"magnitude", "pca_energy", "autodim", "pep", "deeplight"}
    for row in results.iter_rows(named=True):
        kept = _reached(tmp_path / "grid" / row["run"])
        assert row["embedding_parameters"] == kept and row["budget_parameters"] == whole // 4, row["method"]
        assert row["missed"] == (kept > whole // 4) == (row["method"] == "pep")
        single = row["method"] in ("pep", "deeplight")  # elements, of tables as large as they were
        assert (row["stored_parameters"] >= whole) == (row["csr_bytes"] is not None) == single
    assert "*" in next(line for line in done.stdout.splitlines() if "pep" in line)


def test_budgets_that_are_asked_for_later_are_added(grid_config: Path, tmp_path: Path) -> None:
    """Also of PEP, whose one search has kept the masks of the budgets that it was told."""
    options = ["--methods", "pep", "--seeds", "1", "compare.learning_rates=[0.01]", "compare.tune_budget=0.5"]
    options += ["search.pep={start: -7, learning_rate: 0.1, weight_decay: 0.01, epochs: 2}"]
    for budgets in ("0.5", "0.5,0.25"):
        command = _command(grid_config, tmp_path / "grid", *options, "--budgets", budgets)
        subprocess.run(command, check=True, capture_output=True)
    assert json.loads((tmp_path / "grid/compare.json").read_text())["missing"] == []
    assert set(_results(tmp_path / "grid").filter(method="pep", role="result")["budget"]) == {0.5, 0.25}


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--methods", "mdee"], "no method named 'mdee'; choose some of full, drop_ids, uniform"),
        (["--budgets", "2"], "compare.budgets.0=2"),
        (["--models", "fmm"], "no model named 'fmm'"),
        (["compare.tune_budget=0.3"], "it is none of the budgets 0.5, 0.25"),
        (["compare.id_fields=[usr]"], "has no field usr"),
    ],
)
def test_refusals(sseds: Sseds, grid_config: Path, tmp_path: Path, options: list[str], line: str) -> None:
    done = sseds("compare", grid_config, "--run-dir", tmp_path / "grid", *options)
    assert done.code == 2
    assert line in done.err and done.err.count("\n") == 1
    assert not (tmp_path / "grid").exists()


def test_another_experiment_needs_another_folder(sseds: Sseds, grid_config: Path, compared: Path) -> None:
    done = sseds("compare", grid_config, "--run-dir", compared, "train.epochs=2")
    assert done.code == 2
    assert "compares with train.epochs=1, now it is 2; choose another --run-dir" in done.err
    done = sseds("compare", grid_config, "--run-dir", compared, "--budgets", "0.5")
    assert done.code == 2 and done.err.count("\n") == 1
    assert "tunes its methods at a budget of 0.25, so that has to be one of compare.budgets" in done.err


def test_ablations_start_otherwise_and_only_where_there_are_transforms(grid_config: Path) -> None:
    config = load_config(grid_config, ["compare.ablations=true", "compare.models=[fm,wide_deep]"])
    grid = Grid(config, Path("none"))
    found = {}
    for method, variant in grid.entries("fm"):
        if method in ("sseds", "sseds_paper"):
            made = Cell("fm", method, 0.25, 7, grid.tried[0], grid.tried[1], variant).config(config)
            retrain = made.retrain
            found[method, variant] = (retrain.transform, retrain.tables, retrain.epochs)
            rescales = method == "sseds" and variant != "without_rescaling"
            assert made.search.rescale_batches == (config.search.rescale_batches if rescales else 0)
    assert found == {
        ("sseds", ""): ("select", "ticket", None),
        ("sseds", "without_ticket"): ("select", "random", None),
        ("sseds", "without_rescaling"): ("select", "ticket", None),
        ("sseds", "random_transform"): ("random", "ticket", None),
        ("sseds", "random_transform_without_ticket"): ("random", "random", None),
        ("sseds", "random_transform_without_retraining"): ("random", "ticket", 0),
        ("sseds_paper", ""): ("random", "ticket", None),
        ("sseds_paper", "without_ticket"): ("random", "random", None),
        ("sseds_paper", "without_retraining"): ("random", "ticket", 0),
        ("sseds_paper", "select_transform"): ("select", "ticket", None),
        ("sseds_paper", "select_transform_without_ticket"): ("select", "random", None),
    }
    assert not any("_transform" in variant for _, variant in grid.entries("wide_deep"))
    plain = Grid(load_config(grid_config, ["compare.ablations=true", "search.rescale_batches=0"]), Path("none"))
    assert ("sseds", "without_rescaling") not in plain.entries("fm")


@pytest.mark.parametrize("method", CONTESTANTS)
def test_a_cell_is_trained_at_the_rates_that_it_is_tuned_by(grid_config: Path, method: str) -> None:
    """What comes before its search is the full model's, at the rates of that."""
    config = load_config(grid_config)
    own, base = Rates(0.02, 0.5), Rates(0.04, 0.25)
    pretrained = CONTESTANTS[method].pretrained and method != "full"
    made = Cell("fm", method, 0.25, 7, own, base if pretrained else None).config(config)
    before = base if pretrained else own
    assert (made.train.learning_rate, made.train.embedding_l2) == (before.learning_rate, before.embedding_l2)
    if method != "full":
        after = made.retrain_as_train()
        assert (after.learning_rate, after.embedding_l2) == (own.learning_rate, own.embedding_l2)
    if method == "deeplight":
        assert (made.search.deeplight.learning_rate, made.search.deeplight.embedding_l2) == (0.02, 0.5)
