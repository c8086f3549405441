"""PEP and DeepLight as runs: budgets in tensors, masks that hold, starts, shared and killed searches, one rank and two."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

import sseds_rec as sr
from sseds_rec.config import Config, load_config
from sseds_rec.data.table import prepare_table
from sseds_rec.distributed.hardware import show_size
from sseds_rec.distributed.runtime import Runtime, runtime
from sseds_rec.harness import pipeline_for
from sseds_rec.harness.masked import Masked
from sseds_rec.harness.pep import Passing
from sseds_rec.models import build_model
from sseds_rec.report.html import write_report
from sseds_rec.run_directory import RunDirectory
from sseds_rec.search.methods.deeplight import Pruning
from sseds_rec.training.trainer import Trainer
from tests.ranks import run_ranks

_TABLE = "model.embeddings.embedding_bags."
#: Fast enough for a few dozen steps.
PEP = [
    "search.method=pep",
    "search.pep={start: -7, learning_rate: 0.1, weight_decay: 0.01, epochs: 10, budgets: [0.5]}",
]
DEEPLIGHT = ["search.method=deeplight", "search.deeplight={damping_steps: 0.2, every: 7}"]
ADAGRAD = ["train.table_optimizer=adagrad", "train.table_learning_rate=0.05"]
RUNS = {
    "pep-adam": PEP,
    "pep-adagrad": [*PEP, *ADAGRAD],
    "deeplight-adam": DEEPLIGHT,
    "deeplight-adagrad": [*DEEPLIGHT, *ADAGRAD],
}


def _pipeline(folder: Path, config: Config, place: Runtime) -> Masked:
    pipeline = pipeline_for(config, RunDirectory(folder), place)
    pipeline.run.open(config, place)
    assert isinstance(pipeline, Masked)
    return pipeline


def _stages(rank: int, world_size: int, folder: Path, config: Config, stages: list[str]) -> None:
    pipeline = _pipeline(folder, config, Runtime(rank, world_size, torch.device("cpu")))
    for stage in stages:
        getattr(pipeline, stage)()


def _do(folder: Path, config: Config, *stages: str) -> dict[str, Any]:
    with runtime("cpu") as place:
        pipeline = _pipeline(folder, config, place)
        for stage in stages:
            getattr(pipeline, stage)()
    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return metrics


def _tables(checkpoint: Path) -> dict[str, Tensor]:
    """The whole tables of a checkpoint, read with torch alone."""
    reader = dcp.FileSystemReader(checkpoint)
    entries = reader.read_metadata().state_dict_metadata
    state = {name: torch.empty(entry.size) for name, entry in entries.items() if name.startswith(_TABLE)}
    dcp.load(state, storage_reader=reader)
    return {name.split(".")[-2]: value for name, value in state.items()}


def _validations(folder: Path) -> list[str]:
    lines = (folder / "retrain/history.jsonl").read_text().splitlines()
    return [line for line in lines if '"kind": "eval"' in line]


def _nonzeros(tables: dict[str, Tensor]) -> int:
    return sum(int((table != 0).sum()) for table in tables.values())


@pytest.fixture(scope="module")
def runs(config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Config]]:
    """Finished runs; tests only read them."""
    folder, found = tmp_path_factory.mktemp("masked"), {}
    for name, overrides in RUNS.items():
        own = load_config(config, overrides)
        pretrain = ["pretrain"] if "deeplight" in name else []
        _do(folder / name, own, *pretrain, "search", "slim", "retrain")
        found[name] = folder / name, own
    return found


@pytest.mark.parametrize("name", RUNS)
def test_what_is_masked_stays_zero_and_the_rest_is_counted_in_the_tensors(
    name: str, runs: dict[str, tuple[Path, Config]]
) -> None:
    folder, _ = runs[name]
    searched, retrained = _tables(folder / "search/checkpoint"), _tables(folder / "retrain/checkpoint")
    total = sum(table.numel() for table in searched.values())
    left = _nonzeros(searched)
    for table, values in searched.items():
        assert (retrained[table][values == 0] == 0).all()
    assert _nonzeros(retrained) == left  # and what is not masked, is not zero

    plan = sr.DimensionPlan.load(folder / "search/plan.json")
    assert plan.reached["parameters"] == {"kept": left, "of": total, "fraction": left / total}
    assert all(table.kept == list(range(16)) for table in plan.tables.values())  # dense tables hold their zeros
    limit = total // 4
    assert left == limit if "deeplight" in name else 0.6 * limit < left <= limit

    metrics = json.loads((folder / "metrics.json").read_text())
    rows = sum(len(table) + 1 for table in searched.values())
    for stage in ("slim", "retrain"):
        found = metrics[stage]
        assert found["nonzero_embedding_parameters"] == left and found["embedding_parameters"] == total
        assert (found["dense_bytes"], found["csr_bytes"]) == (4 * total, 8 * left + 4 * rows)
    elements = plan.search["elements"]
    assert {key: elements["tables"]["user"][key] for key in ("nonzeros", "dense_bytes")} == {
        "nonzeros": int((searched["user"] != 0).sum()),
        "dense_bytes": 4 * searched["user"].numel(),
    }
    assert metrics["search"]["reached"] == plan.reached and metrics["search"]["batches"] == 0
    assert metrics["retrain"]["auc"] > 0.6
    assert not list(folder.rglob("checkpoints")) and not list(folder.rglob("*.tmp"))


def test_evaluate_gives_what_the_stage_measured(runs: dict[str, tuple[Path, Config]]) -> None:
    folder, config = runs["pep-adagrad"]
    with runtime("cpu") as place:
        found = _pipeline(folder, config, place).evaluate("retrain", "test")
    assert found["auc"] == json.loads((folder / "metrics.json").read_text())["retrain"]["auc"]


@pytest.mark.parametrize("name", ["pep-adam", "pep-adagrad"])
def test_pep_retrains_from_the_weights_its_search_began_with(
    name: str, runs: dict[str, tuple[Path, Config]], tmp_path: Path
) -> None:
    folder, config = runs[name]
    with runtime("cpu") as place:
        pipeline = _pipeline(folder, config, place)
        pipeline._seed()
        drawn = pipeline._shard(build_model(config.model, pipeline.schema), config.train)  # no thresholds, another time
        state = drawn.state_dict()
        whole = {name: torch.empty(value.size()) for name, value in state.items()}
        for key, value in state.items():
            if hasattr(value, "local_shards"):
                value.gather(0, whole[key])
            else:
                whole[key].copy_(value)
    own = tmp_path / "start"
    shutil.copytree(folder, own)
    shutil.rmtree(own / "retrain")
    _do(own, config.model_copy(update={"retrain": config.retrain.model_copy(update={"epochs": 0})}), "retrain")
    searched, started = _tables(own / "search/checkpoint"), _tables(own / "retrain/checkpoint")
    for table, values in started.items():
        expected = whole[f"embeddings.embedding_bags.{table}.weight"] * (searched[table] != 0)
        assert torch.equal(values, expected)
    entries = {name: torch.empty(value.shape) for name, value in whole.items() if name.startswith("over.")}
    dcp.load({"model": entries}, checkpoint_id=own / "retrain/checkpoint")
    assert entries and all(torch.equal(value, whole[name]) for name, value in entries.items())


def test_deeplight_retrains_from_what_it_pruned(runs: dict[str, tuple[Path, Config]], tmp_path: Path) -> None:
    folder, config = runs["deeplight-adagrad"]
    own = tmp_path / "start"
    shutil.copytree(folder, own)
    shutil.rmtree(own / "retrain")
    metrics = _do(
        own, config.model_copy(update={"retrain": config.retrain.model_copy(update={"epochs": 0})}), "retrain"
    )
    assert metrics["retrain"]["auc"] == metrics["slim"]["auc"]


def test_a_search_serves_the_other_budgets_it_was_learned_for(
    runs: dict[str, tuple[Path, Config]], config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = runs["pep-adam"]
    (tmp_path / "half/search").mkdir(parents=True)
    (tmp_path / "half/search/learned").symlink_to(folder / "search/learned")
    monkeypatch.setattr(Trainer, "fit", lambda self: pytest.fail("it learns again"))
    swapped = PEP[1].replace("0.5]", "0.25]")
    metrics = _do(tmp_path / "half", load_config(config, [PEP[0], swapped, "search.budget.parameters=0.5"]), "search")
    assert 0.4 < metrics["search"]["reached"]["parameters"]["fraction"] <= 0.5
    seconds = json.loads((folder / "metrics.json").read_text())["search"]["seconds"]
    assert metrics["search"]["seconds"] == seconds > 0  # of the learning, though it was elsewhere
    for overrides, message in (
        (["search.budget.parameters=0.1"], "it was learned for 0.5, 0.25 of the parameters, not for 0.1"),
        (["search.pep.granularity=global"], "it was learned under another config"),
    ):
        other = tmp_path / overrides[0]
        (other / "search").mkdir(parents=True)
        (other / "search/learned").symlink_to(folder / "search/learned")
        with pytest.raises(sr.UserError, match=message):
            _do(other, load_config(config, [*PEP, *overrides]), "search")


def test_a_budget_that_is_never_reached_is_reported_as_missed(config: Path, tmp_path: Path) -> None:
    low = PEP[1].replace("-7", "-9").replace("epochs: 10", "epochs: 1")
    own = load_config(config, [PEP[0], low, "search.budget.parameters=0.01"])
    metrics = _do(tmp_path / "missed", own, "search", "slim")
    plan = sr.DimensionPlan.load(tmp_path / "missed/search/plan.json")
    left = _nonzeros(_tables(tmp_path / "missed/search/checkpoint"))
    assert plan.search["missed"] is True and plan.budget == {"parameters": 0.01}
    assert plan.reached["parameters"]["kept"] == left == metrics["slim"]["nonzero_embedding_parameters"]
    assert plan.reached["parameters"]["fraction"] > 0.01


class _Killed(Exception):
    """As of kill -9: nothing of the search is tidied up."""


@pytest.mark.parametrize(("name", "step"), [("deeplight-adam", 30), ("pep-adam", 37), ("pep-adagrad", 3)])
def test_a_killed_search_goes_on_to_the_same_end(
    name: str, step: int, runs: dict[str, tuple[Path, Config]], tmp_path: Path
) -> None:
    folder, config = runs[name]
    own = tmp_path / "killed"
    own.mkdir()
    if "deeplight" in name:
        (own / "pretrain").symlink_to(folder / "pretrain")
    config = config.model_copy(update={"train": config.train.model_copy(update={"checkpoint_steps": 10})})
    between = Pruning if "deeplight" in name else Passing
    unharmed = between.__call__

    def kill(self: Any, now: int) -> bool:
        if now == step:
            raise _Killed
        return unharmed(self, now)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(between, "__call__", kill)
        with pytest.raises(_Killed):
            _do(own, config, "search")
    _do(own, config, "search")
    killed, whole = _tables(own / "search/checkpoint"), _tables(folder / "search/checkpoint")
    assert all(torch.equal(killed[table], values) for table, values in whole.items())
    ours, theirs = (sr.DimensionPlan.load(run / "search/plan.json") for run in (own, folder))
    assert ours == theirs


@pytest.mark.parametrize("overrides", [PEP, DEEPLIGHT], ids=["pep", "deeplight"])
def test_two_ranks_prune_exactly_and_one_retrains_what_they_left(
    overrides: list[str], config: Path, tmp_path: Path
) -> None:
    settings = [*overrides, *ADAGRAD, "sharding.type=row_wise", "search.budget.parameters=0.5"]
    own, run = load_config(config, settings), tmp_path / "run"
    run_ranks(2, _stages, run, own, ["pretrain", "search", "slim"] if overrides is DEEPLIGHT else ["search", "slim"])
    searched = _tables(run / "search/checkpoint")
    left, limit = _nonzeros(searched), sum(table.numel() for table in searched.values()) // 2
    assert left == limit if overrides is DEEPLIGHT else 0.6 * limit < left <= limit
    reached = sr.DimensionPlan.load(run / "search/plan.json").reached["parameters"]
    slim = json.loads((run / "slim/metrics.json").read_text())
    assert reached["kept"] == slim["nonzero_embedding_parameters"] == left
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    run_ranks(2, _stages, run, own, ["retrain"])
    _do(copy, own, "retrain")
    two, one = _tables(run / "retrain/checkpoint"), _tables(copy / "retrain/checkpoint")
    for table, values in searched.items():
        assert torch.equal(two[table] != 0, values != 0) and torch.equal(one[table] != 0, values != 0)
    starts = [json.loads(_validations(folder)[0]) for folder in (run, copy)]
    assert [start["step"] for start in starts] == [0, 0]
    assert starts[0]["auc"] == pytest.approx(
        starts[1]["auc"], abs=1e-6
    )  # later ones differ: ranks shuffle their own rows


@pytest.mark.parametrize("method", ["pep", "deeplight"])
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["search.budget.dims=0.1"], "keeps no budget of dims; set search.budget.parameters"),
        (["search.budget.bytes=0.1"], "keeps no budget of bytes; set search.budget.parameters"),
        (
            [*ADAGRAD, "sharding.tables.user.kernels=[fused_uvm_caching]"],
            "sharding.tables.user.kernels=.* changes tables in place, in their device's memory; use fused",
        ),
    ],
)
def test_what_cannot_be_masked_is_refused_in_one_line(
    method: str, overrides: list[str], message: str, config: Path, tmp_path: Path
) -> None:
    own = load_config(config, [f"search.method={method}", *overrides])
    with runtime("cpu") as place, pytest.raises(sr.UserError, match=f"(?s)^[^\n]*{message}[^\n]*$"):
        pipeline_for(own, RunDirectory(tmp_path / "run"), place)


def test_pep_refuses_fields_of_several_ids(click_log: Path, config: Path, tmp_path: Path) -> None:
    prepare_table([click_log], tmp_path / "set", label="click", categorical=["user", "ad"], sequence=["hour"])
    for method, refused in (("deeplight", False), ("pep", True)):
        own = load_config(config, [f"search.method={method}", f"data.path={tmp_path / 'set'}"])
        with runtime("cpu") as place:
            if refused:
                with pytest.raises(sr.UserError, match="^search.method=pep: field hour has several ids a row"):
                    pipeline_for(own, RunDirectory(tmp_path / "run"), place)
            else:
                pipeline_for(own, RunDirectory(tmp_path / "run"), place)


def test_budgets_on_the_way_are_checked_with_the_config(config: Path) -> None:
    with pytest.raises(sr.UserError, match="search.pep.budgets"):
        load_config(config, ["search.pep.budgets=[0.1, -3]"])


def test_its_report_says_what_is_really_stored(runs: dict[str, tuple[Path, Config]]) -> None:
    folder, _ = next(run for name, run in runs.items() if "deeplight" in name)
    elements = json.loads((folder / "search/plan.json").read_text())["search"]["elements"]
    page = " ".join(write_report(folder).read_text().split())
    dense, sparse = (show_size(elements[key]) for key in ("dense_bytes", "csr_bytes"))
    assert f"Single elements are pruned, {elements['nonzeros']:,} are left." in page
    assert f"in {dense}; as compressed sparse rows they would take {sparse}" in page
