"""Jobs of a few processes as torchrun starts them, but forked from one that has imported everything: each takes a second."""

from __future__ import annotations

import multiprocessing as mp
import os
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import polars as pl
import pyarrow.parquet as pq
import torch.distributed as dist

from sseds_rec.cli import main
from tests.ranks import free_port

_context = mp.get_context("forkserver")
_context.set_forkserver_preload(["sseds_rec.pipeline", "sseds_rec.cli"])
_WAIT_SECONDS = 120


@dataclass(frozen=True)
class Ended:
    """How the processes of a job ended.

    Attributes:
        codes: of each rank.
        wrote: of each rank.
        seconds: from the first error that one named, or the first that ended, to the end of the last.
    """

    codes: list[int | None]
    wrote: list[str]
    seconds: float

    def errors(self, rank: int) -> list[str]:
        """The errors that a rank named."""
        return re.findall(r"^sseds: (.*)$", self.wrote[rank], re.MULTILINE)


class Agent:
    """Where processes of one or more starts meet: the store of a torchrun agent, and its folder of logs.

    Args:
        folder: of the logs.
        shares_store: whether the processes use the agent's store, as they do by default, or one of their own.
    """

    def __init__(self, folder: Path, shares_store: bool = True) -> None:
        self.folder, self.shares_store = folder, shares_store
        self.store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False, multi_tenant=True)
        self._starts = 0

    def run(self, ranks: list[Callable[[], object]], nodes: list[int] | None = None) -> Ended:
        """Starts one process a function, and waits until all have ended; those stopped by a signal are killed then.

        Args:
            ranks: what each rank does.
            nodes: the node of each rank; all are on one if not given.
        """
        begun, first, world = time.monotonic(), None, len(ranks)
        attempt, self._starts = self.folder / f"attempt_{self._starts}", self._starts + 1
        port = self.store.port if self.shares_store else free_port()
        processes, logs = [], []
        for rank, (function, node) in enumerate(zip(ranks, nodes or [0] * world, strict=True)):
            folder = attempt / str(rank)
            folder.mkdir(parents=True)
            logs.append(folder / "log")
            logs[-1].touch()
            variables = {
                "RANK": rank,
                "WORLD_SIZE": world,
                "GROUP_RANK": node,
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": port,
                "TORCHELASTIC_USE_AGENT_STORE": self.shares_store,
                "TORCHELASTIC_ERROR_FILE": folder / "error.json",
            }
            process = _context.Process(target=_work, args=(function, variables, logs[-1]))
            process.start()
            processes.append(process)
        with _killed(processes):
            while alive := [process for process in processes if process.is_alive() and not _is_stopped(process.pid)]:
                assert time.monotonic() < begun + _WAIT_SECONDS, [log.read_text() for log in logs]
                if first is None and (len(alive) < world or any("sseds: " in log.read_text() for log in logs)):
                    first = time.monotonic()
                time.sleep(0.02)
            seconds = time.monotonic() - (first or time.monotonic())
        return Ended([process.exitcode for process in processes], [log.read_text() for log in logs], seconds)


def _work(function: Callable[[], object], variables: dict[str, Any], log: Path) -> None:
    os.environ.update({name: str(value) for name, value in variables.items()})
    with log.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    function()


@contextmanager
def _killed(processes: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def _is_stopped(pid: int | None) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return False


def stop_myself() -> None:
    """Leaves this process without a sign of life, its connections open: as a machine that is gone."""
    os.kill(os.getpid(), signal.SIGSTOP)


def sseds(*args: str, file_limit: int | None = None) -> NoReturn:
    """`sseds ARGS`, which may write files of `file_limit` bytes only."""
    if file_limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.argv = ["sseds", *args]
    main()
    raise AssertionError


def damaged(prepared: Path, folder: Path) -> Path:
    """A set with a block that cannot be read: one rank meets it, in the middle of training."""
    shutil.copytree(prepared, folder)
    file = folder / "train/part-00000.parquet"
    pl.read_parquet(file).write_parquet(file, row_group_size=800)
    begin = pq.ParquetFile(file).metadata.row_group(7).column(0).dictionary_page_offset
    content = bytearray(file.read_bytes())
    content[begin : begin + 100] = bytes(100)
    file.write_bytes(content)
    return folder
