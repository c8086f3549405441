"""The `sharding` section on the command line: single tables, and plans of earlier runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.command import Command

Sseds = Callable[..., Command]
ADAGRAD = ["train.table_optimizer=adagrad", "train.epochs=1"]


def _types(run: Path, stage: str) -> dict[str, str]:
    modules = json.loads((run / stage / "sharding_plan.json").read_text())["modules"]
    return {name: table["sharding_type"] for name, table in modules["embeddings"].items()}


def test_tables_go_where_the_config_or_the_plan_of_another_run_says(config: Path, sseds: Sseds, tmp_path: Path) -> None:
    tables = "sharding.tables={user: {types: [row_wise]}, hour: {types: [data_parallel]}}"
    first, second = tmp_path / "first", tmp_path / "second"
    assert sseds("run", config, *ADAGRAD, tables, "--run-dir", first).code == 0
    expected = {"user": "row_wise", "ad": "table_wise", "hour": "data_parallel", "noise": "table_wise"}
    assert _types(first, "pretrain") == expected
    slim = _types(first, "slim")
    assert slim.items() <= expected.items() and slim == _types(
        first, "retrain"
    )  # a plan of its own, without dropped ones

    plans = [
        f"sharding.{kind}_plan={first}/{stage}/sharding_plan.json"
        for kind, stage in (("base", "pretrain"), ("slim", "slim"))
    ]
    free = "sharding.tables={hour: {types: [data_parallel]}}"  # of which optimizer trains it
    shutil.copytree(first, second, ignore=shutil.ignore_patterns("config.yaml"))
    assert sseds("run", config, *ADAGRAD, free, *plans, "--run-dir", second, "--rerun-from", "pretrain").code == 0
    assert (_types(second, "pretrain"), _types(second, "retrain")) == (expected, slim)

    wrong = f"sharding.slim_plan={first}/pretrain/sharding_plan.json"
    done = sseds("slim", config, *ADAGRAD, free, wrong, "--run-dir", second, "--rerun")
    assert done.code == 2
    assert done.err.startswith(f"sseds: {first}/pretrain/sharding_plan.json: table ") and done.err.count("\n") == 1


def test_keys_of_no_table_and_no_kernel_are_refused_before_training(config: Path, sseds: Sseds, tmp_path: Path) -> None:
    for key, message in (
        (
            "sharding.tables={usr: {types: [row_wise]}}",
            "sharding.tables.usr: there is no such table; did you mean user?",
        ),
        (
            "sharding.tables={user: {type: row_wise}}",
            "unknown key sharding.tables.user.type; did you mean sharding.tables.user.types?",
        ),
        ("sharding.tables={user: {kernels: [fast]}}", "sharding.tables.user.kernels.0='fast': Input should be"),
        ("sharding.base_plan=none.json", "none.json: "),
        ("sharding.device=H100-80GB", "sharding.device=H100-80GB is of kind cuda"),
    ):
        done = sseds("train", config, *ADAGRAD, key, "--run-dir", tmp_path / "run")
        assert done.code == 2 and message in done.err and done.err.count("\n") == 1, done.err
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
