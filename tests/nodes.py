"""Nodes of a job: torchrun agents, each with its processes, on one machine."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

_WAIT_SECONDS = 120


def elastic(port: int, nodes: str = "2", hosts: bool | None = None) -> list[str]:
    """A rendezvous that nodes may leave and join, if `nodes` is a range.

    Args:
        port: of its store.
        nodes: `--nnodes`.
        hosts: whether this node holds the store, so that the job ends with it; None if the first to come may.
    """
    where = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "job"]
    own = [] if hosts is None else [f"is_host={hosts}"]
    return ["--nnodes", nodes, *where, "--rdzv-conf", ",".join(["last_call_timeout=3", "keep_alive_interval=1", *own])]


def static(port: int, rank: int) -> list[str]:
    """One of two nodes, in a fixed place."""
    return ["--nnodes", "2", "--node-rank", str(rank), "--master-addr", "localhost", "--master-port", str(port)]


class Node:
    """One agent with its processes, which writes to `log`.

    Args:
        log: of the agent and all its processes.
        rendezvous: options of torchrun, see `elastic` and `static`.
        args: of `sseds`.
        restarts: `--max-restarts`.
        shares_store: whether its processes use the agents' store, as they do by default, or one of their own.
    """

    def __init__(
        self,
        log: Path,
        rendezvous: Sequence[str],
        *args: object,
        restarts: int = 0,
        shares_store: bool = True,
    ) -> None:
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "1", *rendezvous]
        command = [*torchrun, "--max-restarts", str(restarts), "-m", "sseds_rec", *map(str, args)]
        environment = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "0" if shares_store else "1"}
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                stdout=file,
                stderr=file,
                env={**os.environ, **environment},
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        """All that it has written."""
        return self.log.read_text()

    @property
    def lines(self) -> list[str]:
        """The errors that its processes named."""
        return re.findall(r"^(?:\[rank\d+\]: ?)?(sseds: .*)$", self.said, re.MULTILINE)

    def workers(self) -> list[int]:
        """Its processes."""
        pid = self.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def wait(self) -> int:
        """Its exit code."""
        return self.process.wait(_WAIT_SECONDS)

    def vanish(self) -> None:
        """Kills the agent and its processes at once, as on a machine that goes down."""
        for pid in [self.process.pid, *self.workers()]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def wait_until(self, happened: Callable[[], bool]) -> None:
        """Waits for something that the job does."""
        deadline = time.monotonic() + _WAIT_SECONDS
        while not happened():
            assert self.process.poll() is None and time.monotonic() < deadline, self.said
            time.sleep(0.01)


@contextmanager
def ended(*nodes: Node) -> Iterator[None]:
    """Leaves none of them behind."""
    try:
        yield
    finally:
        for node in nodes:
            if node.process.poll() is None:
                node.vanish()


def last_checkpoint(stage: Path) -> int:
    """Step of the newest whole checkpoint of a stage; 0 if there is none."""
    return max((int(path.name.removeprefix("step-")) for path in stage.glob("checkpoints/step-*")), default=0)


def resumed(node: Node) -> list[int]:
    """After which steps its job went on, in order."""
    return [int(step) for step in re.findall(r"resuming after step (\d+)", node.said)]
