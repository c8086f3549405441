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
from tests.ranks import free_port


class Cluster:
    """The user's side of a cluster, in the folder in which Slurm writes its logs."""

    def __init__(self, variables: dict[str, str], folder: Path) -> None:
        self.variables = variables
        self.folder = folder

    def torchx(self, *args: object) -> str:
        done = torchx(*args, cwd=self.folder, **self.variables)
        assert done.code == 0, done.err
        return done.out

    def slurm(self, *command: str) -> list[str]:
        """The lines that a program of Slurm prints."""
        environment = {**os.environ, **self.variables}
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()

    def submit(self, verb: str, *args: object) -> tuple[str, str]:
        """The job's handle and its number."""
        handle = self.torchx("run", "-s", "slurm", f"{COMPONENTS}:{verb}", "--memMB", 2000, *args).strip()
        assert handle.startswith("slurm://torchx/")
        return handle, handle.rpartition("/")[2]

    def accounts(self, job: str, fields: str) -> list[str]:
        """One line for each time that each part of the job was started."""
        flags = ["--duplicates", "--allocations", "--noheader", "--parsable2"]
        return self.slurm("sacct", *flags, "--format", fields, "-j", job)

    def wait(self, handle: str) -> str:
        """What TorchX says of the job when it has ended."""
        wait_for("the end of the job", lambda: not self.slurm("squeue", "--noheader"))
        wait_for("its account", lambda: "RUNNING" not in self.torchx("status", handle))
        return self.torchx("status", handle)


def wait_for(what: str, happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 180
    while not happened():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def daemons() -> Iterator[dict[str, str]]:
    if missing():
        pytest.fail(f"no {', '.join(missing())} found: install what `make tools` installs", pytrace=False)
    with tempfile.TemporaryDirectory() as folder, slurm_cluster(Path(folder) / "slurm") as variables:
        yield variables


@pytest.fixture
def cluster(daemons: dict[str, str], tmp_path: Path) -> Cluster:
    return Cluster(daemons, tmp_path)


def metrics(run: Path) -> Any:
    return json.loads((run / "metrics.json").read_text())


def test_job_that_is_preempted_goes_on_from_its_checkpoint(
    cluster: Cluster, config: Path, tmp_path: Path, sseds: Callable[..., Command]
) -> None:
    run = tmp_path / "run"
    settings = ["train.epochs=8", "train.checkpoint_steps=10"]
    launch = ["-j", "1x2", "--max_retries", 1, "--config", config, "--run_dir", run]
    handle, job = cluster.submit("train", *launch, *settings, "--json")
    wait_for("a checkpoint", lambda: any(run.glob("pretrain/checkpoints/step-*")))
    cluster.slurm("scancel", "--signal=TERM", job)
    assert "train[0]:SUCCEEDED" in cluster.wait(handle)
    assert cluster.accounts(job, "State") == ["REQUEUED", "COMPLETED"]
    assert "pretrain: resuming after step" in cluster.torchx("log", handle)
    printed = cluster.torchx("log", "--streams", "stdout", f"{handle}/train/0").splitlines()[-1]
    trained = json.loads(printed[printed.index("{") :])["metrics"]["pretrain"]
    assert trained == metrics(run)["pretrain"] and trained["auc"] > 0.75
    alone = sseds("evaluate", config, *settings, "--run-dir", run, "--stage", "pretrain", "--json")
    assert alone.json["auc"] == pytest.approx(trained["auc"], abs=1e-6)


def test_job_on_two_nodes(cluster: Cluster, config: Path, finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launch = ["-j", "2x1", "--cpu", 2, "--rdzv_port", free_port(), "--config", config, "--run_dir", run]
    handle, job = cluster.submit("run", *launch)
    status = cluster.wait(handle)
    assert "run[0]:SUCCEEDED" in status and "run[1]:SUCCEEDED" in status
    nodes = cluster.accounts(job, "NodeList,AllocCPUS,ReqMem,State")
    assert sorted(nodes) == ["127.0.0.1|2|2000M|COMPLETED", "127.0.0.2|2|2000M|COMPLETED"]
    assert json.loads((run / "environment.json").read_text())["world_size"] == 2
    assert metrics(run)["retrain"]["auc"] == pytest.approx(metrics(finished_run)["retrain"]["auc"], abs=0.03)
