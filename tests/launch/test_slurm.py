"""`torchx run`, `status` and `log` on a real Slurm cluster of two nodes on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.command import COMPONENTS, Command, torchx
from tests.launch.slurm import missing, slurm_cluster
from tests.launch.test_local import free_port

Torchx = Callable[..., Command]


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    if missing():
        pytest.fail(f"no {', '.join(missing())} found: install what `make tools` installs", pytrace=False)
    with tempfile.TemporaryDirectory() as folder, slurm_cluster(Path(folder) / "slurm") as variables:
        yield variables


@pytest.fixture
def on_cluster(cluster: dict[str, str], tmp_path: Path) -> Torchx:
    """TorchX in the folder in which Slurm writes its logs."""
    return lambda *args: torchx(*args, cwd=tmp_path, **cluster)


def submit(on_cluster: Torchx, verb: str, *args: object) -> str:
    """The job's handle."""
    done = on_cluster("run", "-s", "slurm", f"{COMPONENTS}:{verb}", "--memMB", 2000, *args)
    assert done.code == 0, done.err
    handle = done.out.strip()
    assert handle.startswith("slurm://torchx/")
    return handle


def wait_for(what: str, happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 180
    while not happened():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.2)


def succeeded(on_cluster: Torchx, handle: str) -> bool:
    status = on_cluster("status", handle).out
    assert "FAILED" not in status and "CANCELLED" not in status, status
    return "State: SUCCEEDED" in status


def last_line(log: str) -> Any:
    return json.loads(log[log.rindex('{"verb"') :].splitlines()[0])


def test_job_that_is_preempted_goes_on_from_its_checkpoint(
    on_cluster: Torchx, cluster: dict[str, str], config: Path, finished_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    launch = ["-j", "1x2", "--max_retries", 1, "--config", config, "--run_dir", run]
    handle = submit(on_cluster, "run", *launch, "train.checkpoint_steps=5", "--json")
    wait_for("a checkpoint", lambda: any(run.glob("pretrain/checkpoints/step-*")))
    job = handle.rpartition("/")[2]
    subprocess.run(["scancel", "--signal=TERM", job], env={**os.environ, **cluster}, check=True)
    wait_for("the end of the job", lambda: succeeded(on_cluster, handle))

    attempts = ["sacct", "--duplicates", "--allocations", "--noheader", "--parsable2", "--format", "State", "-j", job]
    states = subprocess.run(
        attempts, env={**os.environ, **cluster}, check=True, capture_output=True, text=True
    ).stdout.split()
    assert states == ["REQUEUED", "COMPLETED"]
    assert "pretrain: resuming after step" in on_cluster("log", handle).out
    printed = last_line(on_cluster("log", "--streams", "stdout", f"{handle}/run/0").out)
    assert printed["metrics"] == json.loads((run / "metrics.json").read_text())
    expected = json.loads((finished_run / "metrics.json").read_text())
    assert printed["metrics"]["retrain"]["auc"] == pytest.approx(expected["retrain"]["auc"], abs=0.03)


def test_job_on_two_nodes(
    on_cluster: Torchx, cluster: dict[str, str], config: Path, finished_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    launch = ["-j", "2x1", "--cpu", 2, "--rdzv_port", free_port(), "--config", config, "--run_dir", run]
    handle = submit(on_cluster, "run", *launch)
    wait_for("the end of the job", lambda: succeeded(on_cluster, handle))
    status = on_cluster("status", handle).out
    assert "run[0]:SUCCEEDED" in status and "run[1]:SUCCEEDED" in status
    job = handle.rpartition("/")[2]
    asked = ["sacct", "--allocations", "--noheader", "--parsable2", "--format", "NodeList,AllocCPUS,ReqMem", "-j", job]
    nodes = subprocess.run(
        asked, env={**os.environ, **cluster}, check=True, capture_output=True, text=True
    ).stdout.split()
    assert sorted(nodes) == ["127.0.0.1|2|2000M", "127.0.0.2|2|2000M"]
    assert json.loads((run / "environment.json").read_text())["world_size"] == 2
    ours, expected = (json.loads((folder / "metrics.json").read_text()) for folder in (run, finished_run))
    assert ours["retrain"]["auc"] == pytest.approx(expected["retrain"]["auc"], abs=0.03)
