"""Two nodes of two processes, whose processes are killed at random: `python benchmarks/kill_nodes.py [KEY=VALUE ...]`.

Two torchrun agents on one machine stand for two nodes. One run is left alone. In another, single processes, drawn at random,
get kill -9 at random moments of both trainings. In a third, a whole node does, agent and processes, and comes back. Prints a
Markdown table: AUCs on the test split, and for each kill after which step the run went on and how many it did again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STAGES = ("pretrain", "retrain")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--config", default="configs/flights_deepfm.yaml")
    parser.add_argument("--processes", type=int, default=2, help="of each of the two nodes")
    parser.add_argument("--kills", type=int, default=20, help="of single processes, half of them in each training")
    parser.add_argument("--losses", type=int, default=2, help="of whole nodes, half of them in each training")
    parser.add_argument("--checkpoint-steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=2022)
    parser.add_argument("--output", type=Path, default=Path("runs/kill_nodes"))
    arguments = parser.parse_args()
    jobs = {
        "left alone": Job(arguments, "alone", "2"),
        "processes killed": Job(arguments, "killed", "2"),
        "nodes lost": Job(arguments, "lost", "1:2"),
    }
    seconds = {}
    with jobs["left alone"].running() as job:
        job.wait()
    for stage in STAGES:
        seconds[stage] = job.metrics()[stage]["seconds"]
    for kind, times in (("processes killed", arguments.kills), ("nodes lost", arguments.losses)):
        with jobs[kind].running() as job:
            for stage in STAGES:
                apart = seconds[stage] / max(times // 2, 6)  # a node that leaves must have time to come back
                job.disturb(stage, times // 2, apart, whole_node=kind == "nodes lost")
            job.wait()
    print("| run | training | test AUC | steps | kill -9 | went on after step | steps done again, each time |")
    print("|---|---|---|---|---|---|---|")
    for name, job in jobs.items():
        for stage in STAGES:
            metrics, kills = job.metrics()[stage], job.kills[stage]
            again = [max(kill["reached"] - kill["resumed"], 0) for kill in kills if "resumed" in kill]
            resumed = ", ".join(str(kill["resumed"]) for kill in kills if "resumed" in kill)
            print(
                f"| {name} | {stage} | {metrics['auc']:.4f} | {metrics['steps']} | {len(kills)} | {resumed} | "
                f"{', '.join(map(str, again))} |"
            )
            for kill in kills:  # nothing that was whole on disk is lost
                assert kill.get("resumed", kill["checkpoint"]) >= kill["checkpoint"], kill


class Job:
    """One run on two nodes.

    Args:
        arguments: of the command line.
        name: of its folder.
        nodes: `--nnodes`.
    """

    def __init__(self, arguments: argparse.Namespace, name: str, nodes: str) -> None:
        self.folder, self.nodes, self.arguments = arguments.output / name, nodes, arguments
        self.kills: dict[str, list[dict[str, int]]] = {stage: [] for stage in STAGES}
        self._moment = random.Random(arguments.seed)
        self._agents: list[subprocess.Popen[bytes]] = []
        self._logs: list[Path] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[Job]:
        """Starts it, and leaves none of its processes behind."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            self._port = probe.getsockname()[1]
        self._agents = [self._start(), self._start()]
        try:
            yield self
        finally:
            for agent in self._agents:
                if agent.poll() is None:
                    self._kill_node(agent)

    def _start(self) -> subprocess.Popen[bytes]:
        """Starts a node; the rendezvous is with the first, which stays."""
        own = self.arguments
        settings = [
            f"seed={own.seed}",
            f"train.checkpoint_steps={own.checkpoint_steps}",
            "train.async_checkpoints=true",
        ]
        torchrun = ["-m", "torch.distributed.run", "--nnodes", self.nodes, "--nproc-per-node", str(own.processes)]
        torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{self._port}", "--rdzv-id", "kill"]
        torchrun += ["--rdzv-conf", "last_call_timeout=5", "--max-restarts", "100"]
        command = [
            *torchrun,
            "-m",
            "sseds_rec",
            "run",
            own.config,
            *settings,
            *own.overrides,
            "--run-dir",
            str(self.folder),
        ]
        elastic = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if ":" in self.nodes else {}
        self._logs.append(self.folder / f"node{len(self._logs)}.log")
        with self._logs[-1].open("wb") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", **elastic}
            agent = subprocess.Popen([sys.executable, *command], stdout=log, stderr=log, env=environment)
        time.sleep(2)  # the first makes the rendezvous
        return agent

    def wait(self) -> None:
        """Waits for its end; a node that has come too late for it ends otherwise."""
        if code := self._agents[0].wait():
            raise SystemExit(f"exit code {code}, see {self.folder}/node*.log")

    def metrics(self) -> dict[str, Any]:
        metrics: dict[str, Any] = json.loads((self.folder / "metrics.json").read_text())
        return metrics

    def disturb(self, stage: str, times: int, seconds: float, whole_node: bool) -> None:
        """Kills a process, or the second node, at random moments of a training, at most `seconds` after it went on."""
        history, checkpoints = self.folder / stage / "history.jsonl", self.folder / stage / "checkpoints"
        for _ in range(times):
            if not self._trains(stage, len(self.kills[stage])):
                return
            time.sleep(self._moment.uniform(0, seconds))
            if (self.folder / stage / "metrics.json").exists():
                return
            before = sum(len(self._resumed(each)) for each in STAGES)
            newest = max((int(path.name[5:]) for path in checkpoints.glob("step-*")), default=-1)
            lines = history.read_text().splitlines()
            kill = {"reached": json.loads(lines[-1])["step"] if lines else 0, "checkpoint": newest}
            if whole_node:
                self._kill_node(self._agents.pop())
            else:
                agent = self._moment.choice(self._agents)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._moment.choice(_children(agent.pid)), signal.SIGKILL)
            self.kills[stage].append(kill)
            if newest >= 0:
                while sum(len(self._resumed(each)) for each in STAGES) == before:
                    self._check()
                kill["resumed"] = self._resumed(stage)[-1]
            print(f"{self.folder.name} {stage}: {kill}", file=sys.stderr, flush=True)
            if whole_node:
                time.sleep(self._moment.uniform(0, seconds))
                self._agents.append(self._start())

    def _trains(self, stage: str, kills: int) -> bool:
        """Waits until a stage trains, since the last kill; returns whether it does so."""
        begun, history = time.time() if kills else 0, self.folder / stage / "history.jsonl"
        while not (history.exists() and history.stat().st_mtime > begun):
            if (self.folder / stage / "metrics.json").exists():
                return False
            self._check()
        return True

    def _check(self) -> None:
        time.sleep(0.02)
        if any(agent.poll() not in (None, 0) for agent in self._agents):
            raise SystemExit(f"the job ended, see {self.folder}/node*.log")

    def _resumed(self, stage: str) -> list[int]:
        """After which steps it went on, in order; said by rank 0, which may be on any node."""
        said = [re.findall(rf"{stage}: resuming after step (\d+)", log.read_text()) for log in self._logs]
        return [int(step) for steps in said for step in steps]

    def _kill_node(self, agent: subprocess.Popen[bytes]) -> None:
        for pid in [agent.pid, *_children(agent.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        agent.wait()


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


if __name__ == "__main__":
    main()
