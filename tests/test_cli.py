"""The command line's contract: verbs, overrides, --json, and one clear line for bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from tests.command import Command

Sseds = Callable[..., Command]


def _refused(done: Command, *words: str) -> None:
    """Exit code 2, one line on stderr that holds the words, nothing on stdout."""
    assert done.code == 2
    assert done.err.count("\n") == 1 and "Traceback" not in done.err, done.err
    for word in words:
        assert word in done.err, done.err
    assert done.out == ""


def test_help_names_the_verbs(sseds: Sseds) -> None:
    out = sseds("--help").out
    for verb in ("prepare", "train", "search", "slim", "retrain", "run", "evaluate", "report", "export"):
        assert f" {verb} " in out
        assert "Usage" in sseds(verb, "--help").out


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("search.budgets.parameters=0.1", ("unknown key search.budgets", "did you mean search.budget?")),
        ("trian.epochs=2", ("unknown key trian", "did you mean train?")),
        ("train.learning-rate=0.1", ("unknown key train.learning-rate", "did you mean train.learning_rate?")),
        ("search.budget.parameters=0", ("search.budget", "parameters=0 is not a share in (0, 1]")),
        ("search.budget.parameters=-0.1", ("parameters=-0.1 is not a share in (0, 1]",)),
        ("search.budget.parameters=1.5", ("parameters=1.5 is not a share in (0, 1]",)),
        ("search.budget.parameters=2", ("the budget of 2 keeps no column",)),
        ("search.budget.parameters=a", ("search.budget.parameters",)),
        ("search.min_dim=16", ("a floor of 16 columns in each of 4 tables",)),
        ("model.embedding_dim=10", ("model.embedding_dim=10", "not a multiple of 4")),
        ("model.name=deepfn", ("no model named 'deepfn'", "deepfm")),
        ("search.criterion=spin", ("no criterion named 'spin'", "snip, snip_batch_abs")),
        ("search.budget.parameters=.nan", ("search.budget.parameters", "finite")),
        ("model.hidden=[0]", ("model.hidden.0=0", "greater than 0")),
        ("train.learning_rate=.inf", ("train.learning_rate=inf", "finite")),
        ("train.batch_size=true", ("train.batch_size=True", "integer")),
        ("train.batch_size=100000", ("train.batch_size=100000 is more than the 6,400 rows",)),
        ("seed=99999999999999999999999", ("seed", "less than")),
        ("train.epochs=0", ("train.epochs=0", "greater than or equal to 1")),
        ("train.epochs", ("'train.epochs' is not key=value",)),
        (
            "sharding.type=table_wise",
            ("sharding.type=table_wise with train.table_optimizer=adam", "no fused Adam on CPU"),
        ),
        ("evaluation.group_field=usr", ("evaluation.group_field=usr", "one id a row", "user, ad, hour, noise")),
        ("evaluation.group_field=price", ("evaluation.group_field=price", "one id a row", "user, ad, hour, noise")),
        ("device=cuda", ("device=cuda, but torch sees no GPU",)),
        ("data.path=nowhere", ("nowhere", "no such file", "sseds prepare")),
    ],
)
def test_bad_config_values_are_one_line_and_leave_nothing(
    config: Path, sseds: Sseds, tmp_path: Path, override: str, words: tuple[str, ...]
) -> None:
    _refused(sseds("run", config, override, "--run-dir", tmp_path / "run"), *words)
    assert not (tmp_path / "run").exists()


def test_bad_config_files(sseds: Sseds, tmp_path: Path) -> None:
    _refused(sseds("run", tmp_path / "none.yaml"), "none.yaml: no such config file")
    (tmp_path / "list.yaml").write_text("- 1\n")
    _refused(sseds("run", tmp_path / "list.yaml"), "list.yaml: a config is a mapping")
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    _refused(sseds("run", tmp_path / "bad.yaml"), "bad.yaml: not valid YAML")
    (tmp_path / "empty.yaml").write_text("")
    _refused(sseds("run", tmp_path / "empty.yaml"), "empty.yaml: name is missing")


def test_usage_errors_are_one_line(sseds: Sseds, config: Path) -> None:
    _refused(sseds("run"), "CONFIG")
    _refused(sseds("prune", config), "prune")
    _refused(sseds("run", config, "--rerun-from", "nothing"), "nothing")
    _refused(sseds("evaluate", config, "--stage", "search"), "search")


def test_stages_out_of_order_name_what_to_run_first(config: Path, sseds: Sseds, tmp_path: Path) -> None:
    for verb, first in (
        ("search", "train"),
        ("slim", "search"),
        ("retrain", "slim"),
        ("report", "retrain"),
        ("evaluate", "retrain"),
    ):
        _refused(sseds(verb, config, "--run-dir", tmp_path / verb), f"run `sseds {first}` first")
        assert not (tmp_path / verb).exists()


def test_nan_loss_names_step_and_learning_rate_and_a_lower_rate_goes_on(
    config: Path, sseds: Sseds, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    _refused_late = sseds("run", config, "train.learning_rate=1e20", "--run-dir", run)
    assert _refused_late.code == 2 and "Traceback" not in _refused_late.err
    last = _refused_late.err.strip().splitlines()[-1]
    assert "the loss is nan at step" in last and "train.learning_rate=1e+20" in last
    done = sseds("train", config, "train.epochs=1", "--run-dir", run, "--rerun")
    assert done.code == 0, done.err


def test_damaged_data_is_refused_before_training(prepared: Path, config: Path, sseds: Sseds, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(prepared, data)
    part = data / "train/part-00000.parquet"
    frame = pl.read_parquet(part)
    frame.with_columns(
        pl.when(pl.int_range(pl.len()) == 3).then(10**6).otherwise(pl.col("user")).cast(pl.Int32).alias("user")
    ).write_parquet(part)
    _refused_late = sseds("run", config, f"data.path={data}", "--run-dir", tmp_path / "run")
    assert _refused_late.code == 2
    last = _refused_late.err.strip().splitlines()[-1]
    assert "part-00000.parquet" in last and "user" in last and "1000000" in last
    part.unlink()
    done = sseds("run", config, f"data.path={data}", "--run-dir", tmp_path / "run2")
    assert done.code == 2 and "part-00000.parquet" in done.err


def test_labels_of_one_class_are_refused_before_training(
    click_log: Path, config: Path, sseds: Sseds, tmp_path: Path
) -> None:
    part = pl.when(pl.int_range(pl.len()) < 7000).then(pl.lit("train")).otherwise(pl.lit("val"))
    frame = pl.read_csv(click_log).with_columns(part=part)
    rest = frame.head(50).with_columns(part=pl.lit("test"), click=pl.lit(1))
    pl.concat([frame, rest.select(frame.columns).cast(frame.schema)]).write_csv(tmp_path / "split.csv")
    columns = ["--label", "click", "--categorical", "user,ad", "--split-by", "column:part"]
    assert (
        sseds("prepare", "table", "--input", tmp_path / "split.csv", "--output", tmp_path / "set", *columns).code == 0
    )
    done = sseds("run", config, f"data.path={tmp_path / 'set'}", "--run-dir", tmp_path / "run")
    _refused(done, "labels of the test split are all the same")
    assert not (tmp_path / "run").exists()


def test_rows_are_not_grouped_by_a_sequence(click_log: Path, config: Path, sseds: Sseds, tmp_path: Path) -> None:
    pl.read_csv(click_log).with_columns(tags=pl.format("{} {}", "ad", "noise")).write_csv(tmp_path / "tags.csv")
    columns = ["--label", "click", "--categorical", "user", "--sequence", "tags"]
    prepare = sseds("prepare", "table", "--input", tmp_path / "tags.csv", "--output", tmp_path / "set", *columns)
    assert prepare.code == 0, prepare.err
    settings = [f"data.path={tmp_path / 'set'}", "evaluation.group_field=tags"]
    _refused(sseds("run", config, *settings, "--run-dir", tmp_path / "run"), "group_field=tags", "choose one of user\n")
    assert not (tmp_path / "run").exists()


def test_any_column_name_makes_a_table(click_log: Path, config: Path, sseds: Sseds, tmp_path: Path) -> None:
    """Names that torch modules, numpy archives or paths have a meaning for."""
    names = {"user": "user.id", "ad": "type", "hour": "file", "noise": "t_type"}
    pl.read_csv(click_log).rename(names).write_csv(tmp_path / "odd.csv")
    columns = ["--label", "click", "--categorical", ",".join(names.values())]
    assert sseds("prepare", "table", "--input", tmp_path / "odd.csv", "--output", tmp_path / "set", *columns).code == 0
    run = tmp_path / "run"
    settings = [f"data.path={tmp_path / 'set'}", "train.epochs=1", "search.min_dim=4", "search.budget.parameters=0.5"]
    done = sseds("run", config, *settings, "--run-dir", run)
    assert done.code == 0, done.err
    plan = json.loads((run / "search/plan.json").read_text())
    fields = {name: table["feature_names"] for name, table in plan["tables"].items()}
    assert fields == {"user_id": ["user.id"], "t_t_type": ["type"], "file": ["file"], "t_type": ["t_type"]}


def test_prepare_table_by_command_line(click_log: Path, sseds: Sseds, tmp_path: Path) -> None:
    output = tmp_path / "set"
    columns = ["--label", "click", "--categorical", "user, ad,hour", "--numeric", "price"]
    how = ["--split", "0.6,0.2,0.2", "--min-count", "5", "--json"]
    done = sseds("prepare", "table", "--input", click_log, "--output", output, *columns, *how)
    assert done.code == 0, done.err
    assert done.json["rows"] == {"train": 4800, "validation": 1600, "test": 1600} and str(output) in done.out
    schema = json.loads((output / "schema.json").read_text())
    assert [(f["name"], f["kind"], f["transform"]) for f in schema["fields"]] == [
        ("user", "categorical", "vocabulary"),
        ("ad", "categorical", "vocabulary"),
        ("hour", "categorical", "vocabulary"),
        ("price", "numeric", "log2_bucket"),
    ]


def test_prepare_refuses_bad_tables(click_log: Path, sseds: Sseds, tmp_path: Path) -> None:
    output = tmp_path / "set"

    def table(path: Path, *args: str) -> Command:
        return sseds("prepare", "table", "--input", path, "--output", output, *args)

    good = ("--label", "click", "--categorical", "user")
    frame = pl.read_csv(click_log)
    _refused(table(tmp_path / "none.csv", *good), "none.csv")
    _refused(table(click_log, "--label", "clik", "--categorical", "user"), "clik", "click")
    _refused(table(click_log, "--label", "hour", "--categorical", "user"), "hour", "clicks.csv")
    _refused(table(click_log, *good, "--split", "0.5,0.5"), "0.5,0.5")
    _refused(table(click_log, *good, "--split", "a,b"), "a,b")
    _refused(table(click_log, *good, "--split-by", "weekday"), "weekday")
    frame.head(0).write_csv(tmp_path / "empty.csv")
    _refused(table(tmp_path / "empty.csv", *good), "empty.csv")
    frame.with_columns(
        pl.when(pl.int_range(pl.len()) == 6).then(pl.lit("abc")).otherwise(pl.col("price").cast(str)).alias("price")
    ).write_csv(tmp_path / "text.csv")
    _refused(table(tmp_path / "text.csv", *good, "--numeric", "price"), "text.csv", "price", "abc", "8")
    assert not output.exists() and not list(tmp_path.glob(".set*"))


def test_a_verb_that_joins_no_job_waits_for_no_rank() -> None:
    environment = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "WORLD_SIZE": "2", "RANK": "1"}
    command = [sys.executable, "-m", "sseds_rec", "export", "nothing-here", "--format", "torchrec"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=20, check=False
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "nothing-here" in done.stderr
