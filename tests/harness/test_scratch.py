"""Methods that train from scratch, as `sseds` runs them: what is trained, on one process and on two."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import torch

from sseds_rec.compare.accounting import count_tables
from sseds_rec.config import load_config
from sseds_rec.data.dataset import open_dataset
from sseds_rec.distributed.runtime import Runtime
from sseds_rec.harness import pipeline_for
from sseds_rec.harness.traffic import sharing_evenly
from sseds_rec.run_directory import RunDirectory
from tests.command import Command
from tests.ranks import run_ranks

Sseds = Callable[..., Command]
SHORT = ["train.epochs=1"]


def _searched(rank: int, world_size: int, config: Path, settings: list[str], run: Path) -> dict[str, dict[str, float]]:
    runtime = Runtime(rank, world_size, torch.device("cpu"))
    own = load_config(config, settings)
    directory = RunDirectory(run)
    directory.open(own, runtime)
    pipeline = pipeline_for(own, directory, runtime)
    return {"search": pipeline.search(), "retrain": pipeline.retrain()}


@pytest.mark.parametrize("method", ["uniform", "mde", "drop_fields"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_searches_and_trains_without_pretraining(config: Path, tmp_path: Path, method: str, ranks: int) -> None:
    settings = [*SHORT, f"search.method={method}", "search.drop_fields=[user]", "model.embedding_dim=24"]
    settings += ["train.table_optimizer=adagrad", "sharding.type=row_wise"] if ranks == 2 else []
    found = run_ranks(ranks, _searched, config, settings, tmp_path / "run")
    assert all(one["retrain"]["auc"] == found[0]["retrain"]["auc"] for one in found)
    reached = json.loads((tmp_path / "run/search/plan.json").read_text())["reached"]
    counts = count_tables(tmp_path / "run/retrain/checkpoint")
    assert counts.columns == reached["parameters"]["kept"]
    assert counts.stored == reached["stored_parameters"]["kept"] == found[0]["retrain"]["embedding_parameters"]
    if method != "drop_fields":
        assert counts.columns <= 0.25 * reached["parameters"]["of"]


def test_a_uniform_model_is_the_plain_one_of_that_width(config: Path, tmp_path: Path) -> None:
    """No transform matrices, and to the last digit what training the model with narrower tables gives."""
    settings = [*SHORT, "search.method=uniform", "search.budget.parameters=0.5", "model.dropout=0"]
    (slim,) = run_ranks(1, _searched, config, settings, tmp_path / "slim")
    full = run_ranks(1, _pretrained, config, ["model.embedding_dim=8", "model.dropout=0", *SHORT], tmp_path / "plain")[
        0
    ]
    for key in ("auc", "logloss", "validation_auc", "parameters", "embedding_parameters"):
        assert slim["retrain"][key] == full[key], key


def _pretrained(rank: int, world_size: int, config: Path, settings: list[str], run: Path) -> dict[str, float]:
    runtime = Runtime(rank, world_size, torch.device("cpu"))
    return pipeline_for(load_config(config, settings), RunDirectory(run), runtime).pretrain()


def test_run_does_all_stages_and_reports(sseds: Sseds, config: Path, tmp_path: Path) -> None:
    done = sseds("run", config, "search.method=mde", *SHORT, "--run-dir", tmp_path, "--json")
    assert done.code == 0, done.err
    assert (tmp_path / "report/index.html").exists()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["retrain"]["embedding_parameters"] < metrics["pretrain"]["embedding_parameters"] / 2
    assert sseds("evaluate", config, "search.method=mde", *SHORT, "--run-dir", tmp_path).code == 0


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("search.method=mdee", "search.method='mdee'"),
        ("search.drop_fields=[usr]", "has no field usr with a table; it has user, ad, hour, noise"),
        ("search.drop_fields=[user,ad,hour,noise]", "search.drop_fields drops every table; leave one"),
        ("search.budget.fits=1x8xH100-80GB", "search.method=drop_fields with search.budget.fits"),
    ],
)
def test_refusals(sseds: Sseds, config: Path, tmp_path: Path, setting: str, line: str) -> None:
    done = sseds("run", config, "search.method=drop_fields", setting, "--run-dir", tmp_path / "run")
    assert done.code == 2
    assert line in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_traffic_counts_the_rows_that_would_share_it(prepared: Path, config: Path) -> None:
    hours = pl.read_parquet(prepared / "train")["hour"].value_counts()["count"].cast(pl.Float64)
    found = sharing_evenly(open_dataset(load_config(config).data))
    assert found["hour"] == pytest.approx(float(hours.sum()) ** 2 / float((hours**2).sum()))
    assert found["hour"] < hours.len() <= 24 < found["user"] < 60


def test_verbs_alone_do_without_what_the_method_does_not_need(sseds: Sseds, config: Path, tmp_path: Path) -> None:
    for verb in ("search", "retrain"):
        done = sseds(verb, config, "search.method=uniform", *SHORT, "--run-dir", tmp_path / "run")
        assert done.code == 0, done.err
        assert (tmp_path / "run" / verb / "metrics.json").exists()
    assert not (tmp_path / "run" / "pretrain").exists()
    refused = sseds("search", config, "search.method=deeplight", "--run-dir", tmp_path / "other")
    assert refused.code == 2 and "needs the pretrain stage" in refused.err
