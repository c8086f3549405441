"""SIGTERM and kill -9: all ranks stop after the same step, and what goes on gives what nothing would have interrupted."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from sseds_rec.distributed.runtime import Runtime
from sseds_rec.training.preemption import preemption
from tests.command import Command
from tests.ranks import run_ranks

Sseds = Callable[..., Command]

#: Long enough to be interrupted: 75 steps in each training; the last model is the one that is kept.
SETTINGS = ["train.checkpoint_steps=10", "train.async_checkpoints=true", "train.keep_checkpoints=2"]


def _ask(rank: int, world_size: int, victim: int | None) -> tuple[list[bool], bool]:
    """Answers of 6 steps, in the third of which one rank gets SIGTERM; and whether the outer handler got it, too."""
    outer: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: outer.append(number))
    try:
        with preemption(Runtime(rank, world_size, torch.device("cpu"))) as requested:
            answers = []
            for step in range(6):
                if step == 2 and rank == victim:
                    os.kill(os.getpid(), signal.SIGTERM)
                answers.append(requested())
    finally:
        signal.signal(signal.SIGTERM, before)
    return answers, outer == [signal.SIGTERM]


def test_all_ranks_hear_of_a_signal_at_the_same_step() -> None:
    ranks = run_ranks(3, _ask, 1)
    assert [answers for answers, _ in ranks] == [[False, False, False, True, True, True]] * 3
    assert [again for _, again in ranks] == [False, True, False]  # nobody stopped for it, so it is raised again
    assert run_ranks(3, _ask, None) == [([False] * 6, False)] * 3
    assert run_ranks(1, _ask, 0) == [([False, False, True, True, True, True], True)]


def _start(ranks: int, run: Path, config: Path, *settings: str, restarts: int = 0) -> subprocess.Popen[str]:
    """`sseds run` as one process, or under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    launcher = [*torchrun, "--max-restarts", str(restarts)] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "sseds_rec", "run", str(config), *settings, "--run-dir", str(run)]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def _wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.001)


def _children(process: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def _events(run: Path, kind: str, stage: str = "pretrain") -> list[dict[str, Any]]:
    events = [json.loads(line) for line in (run / stage / "history.jsonl").read_text().splitlines()]
    return [event for event in events if event["kind"] == kind]


def _results(run: Path) -> dict[str, Any]:
    """The metrics that do not depend on the clock."""
    metrics = json.loads((run / "metrics.json").read_text())
    return {
        stage: {key: value for key, value in of_stage.items() if "seconds" not in key and "per_second" not in key}
        for stage, of_stage in metrics.items()
    }


def _weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    entries = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    return state


def _assert_identical(run: Path, expected: Path) -> None:
    assert _results(run) == _results(expected)
    for stage in ("pretrain", "retrain"):
        ours, theirs = _weights(run / stage / "checkpoint"), _weights(expected / stage / "checkpoint")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], values) for name, values in theirs.items())


def test_one_process_stops_with_143_and_goes_on_bit_for_bit(finished_run: Path, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for stage in ("pretrain", "retrain"):
        process = _start(1, run, config, *SETTINGS)
        _wait_for(run / stage / "checkpoints/step-00000010", process)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 143
        (said,) = [line for line in err.splitlines() if "SIGTERM" in line]
        step = int(said.split("after step ")[1].split(";")[0])
        assert said.startswith(f"{stage}: ") and "Traceback" not in err and 10 < step < 75
        assert (run / stage / f"checkpoints/step-{step:08d}").exists()
    process = _start(1, run, config, *SETTINGS)
    assert f"retrain: resuming after step {step}" in process.communicate(timeout=120)[1] and process.returncode == 0
    _assert_identical(run, finished_run)


def test_kills_at_random_moments_change_no_bit(finished_run: Path, config: Path, tmp_path: Path) -> None:
    run, moment = tmp_path / "run", random.Random(0)
    for stage in ("pretrain", "pretrain", "retrain", "retrain"):
        process = _start(1, run, config, *SETTINGS)
        _wait_for(run / stage / "history.jsonl", process)
        time.sleep(moment.uniform(0, 0.8))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    process = _start(1, run, config, *SETTINGS)
    assert process.communicate(timeout=120) and process.returncode == 0
    _assert_identical(run, finished_run)


@pytest.mark.parametrize("table_optimizer", ["adam", "rowwise_adagrad"])
def test_torchrun_restarts_all_ranks_when_one_is_preempted(config: Path, tmp_path: Path, table_optimizer: str) -> None:
    run = tmp_path / "run"
    own = [f"train.table_optimizer={table_optimizer}", "retrain.epochs=1"]
    process = _start(2, run, config, *SETTINGS, *own, restarts=1)
    _wait_for(run / "pretrain/checkpoints/step-00000010", process)
    os.kill(_children(process)[-1], signal.SIGTERM)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    (said,) = [line for line in err.splitlines() if "stopped by SIGTERM" in line]
    step = int(said.split("after step ")[1].split(";")[0])
    assert f"pretrain: resuming after step {step}" in err
    assert [event["step"] for event in _events(run, "eval")] == [25, 50, 75]
    assert "(exitcode: 143)" in err


def test_a_preempted_job_goes_on_with_fewer_ranks(config: Path, sseds: Sseds, tmp_path: Path) -> None:
    run, own = tmp_path / "run", ["train.table_optimizer=rowwise_adagrad", "train.table_learning_rate=0.05"]
    process = _start(2, run, config, *SETTINGS, *own)
    _wait_for(run / "pretrain/checkpoints/step-00000010", process)
    process.send_signal(signal.SIGTERM)  # the agent hands it on to its workers
    _, err = process.communicate(timeout=120)
    assert process.returncode not in (0, None) and "stopped by SIGTERM after step" in err
    state = json.loads(max((run / "pretrain/checkpoints").glob("step-*/progress.json")).read_text())
    assert 10 < state["step"] < 75 and state["loader"]["world_size"] == 2
    done = sseds("run", config, *SETTINGS, *own, "sharding.type=row_wise", "--run-dir", run)
    assert done.code == 0, done.err
    assert f"resuming after step {state['step']}" in done.err
    assert [event["step"] for event in _events(run, "eval")] == [25, 50, 75]
    assert _results(run)["pretrain"]["auc"] > 0.6
