"""Two nodes: processes are killed, a node leaves and comes back, and the job goes on from the last checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.jobs import Agent, damaged, sseds
from tests.nodes import Node, elastic, ended, last_checkpoint, resumed, static
from tests.ranks import free_port

#: Long enough to be disturbed: 75 steps in each training.
SETTINGS = ["train.table_optimizer=rowwise_adagrad", "train.checkpoint_steps=10", "train.async_checkpoints=true"]


def _auc(run: Path, stage: str) -> float:
    return float(json.loads((run / stage / "metrics.json").read_text())["auc"])


def _steps(run: Path, stage: str) -> list[int]:
    """Steps at which it was validated."""
    events: list[dict[str, Any]] = [
        json.loads(line) for line in (run / stage / "history.jsonl").read_text().splitlines()
    ]
    return [event["step"] for event in events if event["kind"] == "eval" and event["step"]]


@pytest.fixture(scope="module")
def undisturbed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of two ranks that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    command = ["run", str(config), *SETTINGS, "--run-dir", str(folder / "run")]
    assert Agent(folder).run([partial(sseds, *command)] * 2).codes == [0, 0]
    return folder / "run"


@pytest.mark.parametrize("kind", ["elastic", "static"])
def test_a_killed_process_costs_the_steps_since_the_last_checkpoint(
    config: Path, undisturbed: Path, tmp_path: Path, kind: str
) -> None:
    run, port = tmp_path / "run", free_port()
    command = ["run" if kind == "elastic" else "train", config, *SETTINGS, "--run-dir", run]
    rendezvous = [elastic(port)] * 2 if kind == "elastic" else [static(port, rank) for rank in (0, 1)]
    nodes = [Node(tmp_path / f"{i}.log", rendezvous[i], *command, restarts=4) for i in (0, 1)]
    stages = ["pretrain", "retrain"] if kind == "elastic" else ["pretrain"]
    with ended(*nodes):
        for count, stage in enumerate(stages):
            nodes[0].wait_until(lambda stage=stage: last_checkpoint(run / stage) >= 10)  # type: ignore[misc]
            victim = nodes[1 - count]  # then that of rank 0
            os.kill(victim.workers()[0], signal.SIGKILL)
            before = last_checkpoint(run / stage)
            nodes[0].wait_until(lambda count=count: len(resumed(nodes[0])) > count)  # type: ignore[misc]
            assert 10 <= before <= resumed(nodes[0])[-1] < 75
        assert [node.wait() for node in nodes] == [0, 0], nodes[0].said
    for stage in stages:
        assert _steps(run, stage) == [25, 50, 75]
        assert abs(_auc(run, stage) - _auc(undisturbed, stage)) < 1e-3
    assert "Traceback" not in nodes[0].said + nodes[1].said
    assert all("lost another" in line for node in nodes for line in node.lines)


def test_a_node_leaves_and_comes_back(config: Path, tmp_path: Path) -> None:
    run, port = tmp_path / "run", free_port()
    own = ["train.epochs=200", "train.patience=200", "train.keep_checkpoints=1000"]  # ends when we have seen enough

    def start(name: str) -> Node:
        command = ["train", config, *SETTINGS, *own, "--run-dir", run]
        rendezvous = elastic(port, "1:2", hosts=name == "stays")
        return Node(tmp_path / f"{name}.log", rendezvous, *command, restarts=1, shares_store=False)

    def ranks() -> int:
        """How many have trained up to the newest checkpoint."""
        folder = run / "pretrain/checkpoints"
        newest = json.loads((folder / f"step-{last_checkpoint(run / 'pretrain'):08d}" / "progress.json").read_text())
        return int(newest["loader"].get("world_size", 0))  # there is none between epochs

    stays, leaves = start("stays"), start("leaves")
    with ended(stays, leaves):
        stays.wait_until(lambda: last_checkpoint(run / "pretrain") >= 10 and ranks() == 2)
        leaves.vanish()
        before = last_checkpoint(run / "pretrain")
        stays.wait_until(lambda: len(resumed(stays)) == 1 and ranks() == 1)
        assert resumed(stays)[0] >= before
        comes = start("comes")
        with ended(comes):
            stays.wait_until(lambda: len(resumed(stays)) == 2 and ranks() == 2)
            stopped = stays.said.split("stopped by SIGTERM after step ")[1].split(";")[0]
            assert resumed(stays)[1] == int(stopped)  # who comes costs no step


def test_what_can_only_fail_again_is_tried_by_no_restart(config: Path, prepared: Path, tmp_path: Path) -> None:
    data, port = damaged(prepared, tmp_path / "data"), free_port()
    command = ["train", config, *SETTINGS, f"data.path={data}", "--run-dir", tmp_path / "run"]
    nodes = [Node(tmp_path / f"{i}.log", elastic(port), *command, restarts=1) for i in (0, 1)]
    with ended(*nodes):
        nodes[0].wait_until(lambda: bool(nodes[0].lines))
        begun = time.monotonic()
        nodes[1].wait_until(lambda: bool(nodes[1].lines))
        assert time.monotonic() - begun < 30
        shutil.rmtree(data)
        shutil.copytree(prepared, data)  # too late: nobody looks again
        assert [node.wait() for node in nodes] == [1, 1]
    for node in nodes:
        first, again = node.lines  # one a start
        assert first == again and first.startswith(f"sseds: {data}/train/part-00000.parquet: cannot be read")
        assert f"traceback : {first.removeprefix('sseds: ')}" in node.said  # torchrun's summary
