"""How retraining may start (Table 2 and beyond): every weight against the one it must be, and the stage without an epoch."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

import sseds_rec as sr
from sseds_rec.config import load_config
from sseds_rec.distributed.runtime import Runtime
from sseds_rec.distributed.sharding import Placement, ShardingConfig, shard
from sseds_rec.models import CtrModel, build_model, build_slim_model
from sseds_rec.models.ticket import load_ticket
from sseds_rec.pipeline import Pipeline
from sseds_rec.run_directory import RunDirectory, fingerprint
from sseds_rec.training.checkpoint import save_weights
from sseds_rec.training.optimizers import fuse_table_optimizer
from tests.command import Command
from tests.models.clicks import COUNT, KEPT, D, config_of, plan_of, randomize, schema_of
from tests.models.plain import fill_tables
from tests.ranks import run_ranks

Sseds = Callable[..., Command]
PLAN, DENSE = "mixed", 3  # kept columns are 4, 3, 1 and 8, stored 4, 4, 4 and 8
MODEL = config_of("deepfm", batch_norm=True)
STD = 0.01  # of all tables that pretraining draws


def _json(*path: Path | str) -> Any:
    return json.loads(Path(*path).read_text())


def _shard(
    model: CtrModel, rank: int = 0, world_size: int = 1, placement: Placement = "auto"
) -> DistributedModelParallel:
    fuse_table_optimizer(model, "rowwise_adagrad", 0.1, placement)
    runtime = Runtime(rank, world_size, torch.device("cpu"))
    return shard(model, ShardingConfig(type=placement), runtime, COUNT)


def _state(model: DistributedModelParallel) -> dict[str, Tensor]:
    """This rank's part of every weight, tables by their own names."""
    parts = {}
    for name, value in model.state_dict().items():
        tensors = [part.tensor for part in value.local_shards()] if hasattr(value, "local_shards") else [value]
        own = name.split(".")[-2] if ".embedding_bags." in name else name.removeprefix("over.")
        if tensors:
            parts[own] = tensors[0].clone()
    return parts


def _started(
    rank: int, world_size: int, folder: str, tables: Any, dense: Any, transform: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Weights of a full model, of the slim one before the ticket, and after."""
    plan, schema = plan_of(PLAN), schema_of(DENSE)
    full = _shard(build_model(MODEL, schema))
    randomize(full.module.over, seed=3)
    random = torch.Generator().manual_seed(4)
    fill_tables(full, {name: torch.randn(table.rows, D, generator=random) for name, table in plan.tables.items()})
    save_weights(Path(folder) / "full", full, Runtime(0, 1, torch.device("cpu")))
    sr.slim_checkpoint(Path(folder) / "full", Path(folder) / "slim", plan)
    torch.manual_seed(5)
    slim = _shard(build_slim_model(MODEL, schema, plan, transform))
    before = _state(slim)
    load_ticket(Path(folder) / "slim", slim, plan, tables, dense)
    return _state(full), before, _state(slim)


@pytest.mark.parametrize("transform", ["select", "random"])
@pytest.mark.parametrize("dense", ["kept", "fresh"])
@pytest.mark.parametrize("tables", ["ticket", "random"])
def test_every_weight_starts_as_it_was_asked_to(tables: str, dense: str, transform: str, tmp_path: Path) -> None:
    ((full, before, slim),) = run_ranks(1, _started, str(tmp_path), tables, dense, transform)
    kept = dict(zip(plan_of(PLAN).tables, KEPT[PLAN].values(), strict=True))
    transforms = {f"fields.alignment.transforms.{name}" for name in kept}
    assert slim.keys() == full.keys() | transforms and slim.keys() == before.keys()
    for name, columns in kept.items():
        matrix = slim[f"fields.alignment.transforms.{name}"]
        if transform == "select":
            assert torch.equal(matrix, torch.eye(D)[:, columns])
        else:
            torch.testing.assert_close(matrix.T @ matrix, torch.eye(len(columns)), rtol=0, atol=1e-5)
            assert not torch.equal(matrix, torch.eye(D)[:, columns])
        own, padding = slim[name][:, : len(columns)], slim[name][:, len(columns) :]
        assert padding.shape[1] == -len(columns) % 4 and not padding.any()
        assert torch.equal(own, full[name][:, columns]) == (tables == "ticket")
        assert torch.equal(own, before[name][:, : len(columns)]) == (tables == "random")
    if tables == "random":
        drawn = torch.cat([slim[name][:, : len(columns)].flatten() for name, columns in kept.items()])
        assert abs(float(drawn.std()) - STD) < 0.1 * STD and abs(float(drawn.mean())) < 0.15 * STD
    inputs = list(range(DENSE)) + [DENSE + i * D + c for i, columns in enumerate(kept.values()) for c in columns]
    others = full.keys() - kept.keys()
    assert {"deep.1.running_mean", "deep.1.running_var", "deep.4.weight", "first_order.bias"} <= others
    for name in others - {"deep.1.num_batches_tracked", "deep.4.num_batches_tracked"}:
        over_raw = name in ("first_order.weight", "deep.0.weight")
        pretrained = full[name][:, inputs] if over_raw else full[name]
        assert torch.equal(slim[name], pretrained) == (dense == "kept"), name
        assert torch.equal(slim[name], before[name]) == (dense == "fresh"), name


def _drawn(rank: int, world_size: int, folder: str, placement: Placement) -> dict[str, Tensor]:
    torch.manual_seed(7)
    model = build_slim_model(MODEL, schema_of(DENSE), plan_of(PLAN), "select")
    torch.manual_seed(7 + rank)
    slim = _shard(model, rank, world_size, placement)
    load_ticket(Path(folder) / "slim", slim, plan_of(PLAN), "random")
    return _state(slim)


@pytest.mark.parametrize("placement", ["table_wise", "row_wise", "column_wise", "data_parallel"])
def test_ranks_draw_their_own_shards_and_copies_are_the_same(tmp_path: Path, placement: Placement) -> None:
    run_ranks(1, _started, str(tmp_path), "ticket", "kept", "select")
    first, second = run_ranks(2, _drawn, str(tmp_path), placement)
    tables = plan_of(PLAN).tables
    shared = first.keys() & second.keys() & tables.keys()
    assert bool(shared) == (placement != "table_wise")
    for name in shared:
        rows = min(len(first[name]), len(second[name]))
        equal = torch.equal(first[name][:rows], second[name][:rows])
        assert equal == (placement == "data_parallel"), name
    for name, table in tables.items():
        parts = [own[name] for own in (first, second) if name in own]
        joined = parts[0] if placement == "data_parallel" else torch.cat(parts, dim=int(placement == "column_wise"))
        assert joined.shape == (table.rows, table.stored_dim)
        assert not joined[:, table.embedding_dim :].any() and bool(joined[:, : table.embedding_dim].all())


def _retrain_on_rank(rank: int, world_size: int, config: Path, settings: list[str], run: Path) -> None:
    runtime = Runtime(rank, world_size, torch.device("cpu"))
    Pipeline(load_config(config, settings), RunDirectory(run), runtime).retrain()


def _weights(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole."""
    entries = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state = {name: torch.empty(e.size, dtype=e.properties.dtype) for name, e in entries.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it is one process
        dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    return {name.removeprefix("model."): value for name, value in state.items()}


def test_random_tables_of_a_run_are_pretrainings_draw_by_the_seed(
    finished_run: Path, config: Path, tmp_path: Path
) -> None:
    sharded = ["train.table_optimizer=rowwise_adagrad", "sharding.type=row_wise"]
    start = [*sharded, "retrain.tables=random", "retrain.epochs=0"]
    found = []
    for i, seed in enumerate((7, 7, 8)):
        run = shutil.copytree(finished_run, tmp_path / f"run{i}")
        shutil.rmtree(run / "retrain")
        run_ranks(2, _retrain_on_rank, config, [*start, f"seed={seed}"], run)
        weights = _weights(run / "retrain/checkpoint")
        found.append({name: value for name, value in weights.items() if ".embedding_bags." in name})
    same, again, other = found
    assert len(same) >= 2
    values = torch.cat([value.flatten() for value in same.values()])
    assert abs(float(values.std()) - STD) < 0.1 * STD and abs(float(values.mean())) < 0.15 * STD
    for name, table in same.items():
        half = -(-len(table) // 2)  # a rank's rows
        assert not torch.equal(table[: len(table) - half], table[half:])
        assert torch.equal(table, again[name]) and not torch.equal(table, other[name])


def test_without_an_epoch_the_stage_measures_and_leaves_the_start(
    finished_run: Path, config: Path, sseds: Sseds, tmp_path: Path
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    done = sseds("run", config, "retrain.epochs=0", "--run-dir", run, "--rerun-from", "retrain", "--json")
    assert done.code == 0, done.err
    assert done.json["done"] == ["retrain", "report"]
    metrics = _json(run, "metrics.json")
    assert done.json["metrics"] == metrics
    slim, retrain = metrics["slim"], metrics["retrain"]
    for key in ("auc", "logloss", "normalized_entropy", "calibration", "embedding_parameters", "parameters"):
        assert retrain[key] == slim[key]
    assert (retrain["epochs"], retrain["steps"], retrain["samples_per_second"]) == (0, 0, None)
    assert retrain.keys() == metrics["pretrain"].keys() and retrain["seconds"] > 0
    left = {path.name for path in (run / "retrain").iterdir()}
    assert left == {"checkpoint", "history.jsonl", "tensorboard", "sharding_plan.json", "metrics.json"}
    tables = {name: value for name, value in _weights(run / "slim/checkpoint").items() if ".embedding_bags." in name}
    kept = _weights(run / "retrain/checkpoint")
    assert tables and all(torch.equal(kept[name], value) for name, value in tables.items())
    (event,) = [json.loads(line) for line in (run / "retrain/history.jsonl").read_text().splitlines()]
    assert (event["kind"], event["step"], event["auc"]) == ("eval", 0, retrain["validation_auc"])
    assert "samples/s in inference" in done.out and "samples/s in training" not in done.out
    page = (run / "report/index.html").read_text()
    assert f"{retrain['auc']:.4f}" in page and "None" not in page and ">nan" not in page
    for split, auc in (("test", retrain["auc"]), ("validation", retrain["validation_auc"])):
        again = sseds("evaluate", config, "retrain.epochs=0", "--run-dir", run, "--split", split, "--json")
        assert again.json["auc"] == auc
    own = ["retrain.epochs=0", "retrain.transform=random"]
    assert sseds("retrain", config, *own, "--run-dir", run, "--rerun").code == 0
    assert _json(run, "metrics.json")["retrain"]["auc"] != slim["auc"]


def _rerun(sseds: Sseds, config: Path, run: Path, *own: str) -> dict[str, Any]:
    done = sseds("retrain", config, *own, "--run-dir", run, "--rerun", "--json")
    assert done.code == 0, done.err
    metrics: dict[str, Any] = done.json["metrics"]["retrain"]
    return {key: value for key, value in metrics.items() if "second" not in key}


def test_every_start_trains_and_repeats(finished_run: Path, config: Path, sseds: Sseds, tmp_path: Path) -> None:
    """The plan is a rotated one."""
    run = shutil.copytree(finished_run, tmp_path / "run")
    assert _json(run, "search/plan.json")["rotations"]
    ticket = _rerun(sseds, config, run)
    assert ticket == {key: value for key, value in _json(finished_run, "retrain/metrics.json").items() if key in ticket}
    found = [ticket]
    modes = [
        ["tables=random"],
        ["dense=fresh"],
        ["tables=random", "transform=random"],
        ["tables=random", "dense=fresh"],
    ]
    for mode in modes:
        own = [f"retrain.{key}" for key in mode]
        found.append(_rerun(sseds, config, run, *own))
        assert found[-1]["epochs"] == 3 and found[-1]["auc"] > 0.6, mode
        start, *_ = [json.loads(line) for line in (run / "retrain/history.jsonl").read_text().splitlines()]
        assert (start["kind"], start["step"]) == ("eval", 0) and start["auc"] < found[-1]["validation_auc"]
    assert _rerun(sseds, config, run, *own) == found[-1]
    assert len({metrics["auc"] for metrics in found}) == len(found)


def test_changed_starts_are_refused_until_asked_for(
    finished_run: Path, config: Path, sseds: Sseds, tmp_path: Path
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    changes = {"tables": ("ticket", "random"), "dense": ("kept", "fresh"), "epochs": (None, 0)}
    for key, (old, new) in changes.items():
        refused = sseds("run", config, f"retrain.{key}={new}", "--run-dir", run)
        assert refused.code == 2 and refused.err.count("\n") == 1
        assert f"retrain.{key}={old}, now it is {new}" in refused.err and "--rerun-from retrain" in refused.err
    (run / "retrain/metrics.json").unlink()  # begun, but not finished
    assert sseds("run", config, "retrain.tables=random", "--run-dir", run).code == 2


def test_only_retraining_depends_on_its_start(config: Path) -> None:
    default = load_config(config)
    changed = ["retrain.tables=random", "retrain.dense=fresh", "retrain.epochs=0", "retrain.transform=random"]
    marks = {fingerprint(load_config(config, [change]), "retrain") for change in changed}
    assert len(marks | {fingerprint(default, "retrain")}) == len(changed) + 1
    for stage in ("pretrain", "search", "slim"):
        assert fingerprint(load_config(config, changed), stage) == fingerprint(default, stage)
    same = load_config(config, ["retrain.tables=ticket", "retrain.dense=kept", "retrain.transform=select"])
    assert fingerprint(same, "retrain") == fingerprint(default, "retrain")


@pytest.mark.parametrize(
    "override", ["train.epochs=0", "retrain.epochs=-1", "retrain.tables=fresh", "retrain.dense=random"]
)
def test_what_is_no_start_is_refused_by_name(config: Path, override: str) -> None:
    with pytest.raises(sr.UserError, match=override.partition("=")[0]) as refused:
        load_config(config, [override])
    assert "\n" not in str(refused.value)
