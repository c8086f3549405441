"""One pool of processes for all cells, as many as the machine can keep busy; importing TorchRec is paid once in each."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sseds_rec.errors import UserError
from sseds_rec.output import silence_libraries

if TYPE_CHECKING:
    from sseds_rec.config import Config


class Pool:
    """Worker processes that write what they have to say to `logs/` and end with their parent, however it ends.

    Args:
        processes: how many.
        folder: gets `logs/`.
        gpus: names of those that workers take in turn, one each.
    """

    def __init__(self, processes: int, folder: Path, gpus: Sequence[str] = ()) -> None:
        context = get_context("spawn")
        numbers = context.SimpleQueue()
        for number in range(processes):
            numbers.put(number)
        logs = folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        threads = max(1, cores() // processes)
        gpus = list(gpus)
        self._executor = ProcessPoolExecutor(processes, context, _begin, (numbers, logs, threads, gpus))
        # Of the workers, which import torch before they are told anything.
        os.environ["OMP_NUM_THREADS"] = str(threads)

    def run(self, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
        """Calls a function of a module with each of the arguments, and gives those back as they are done.

        Raises:
            UserError: a worker was killed.
        """
        pending: dict[Future[Any], tuple[Any, ...]] = {self._executor.submit(function, *call): call for call in calls}
        try:
            while pending:
                done, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    call = pending.pop(future)
                    future.result()
                    yield call
        except BrokenProcessPool:
            raise UserError(
                "a process of the comparison was killed, by the system for want of memory as a rule; "
                "run the same command again, with a smaller compare.processes if so"
            ) from None

    def close(self) -> None:
        """Ends the workers, without waiting for what they are at."""
        workers = list((self._executor._processes or {}).values())
        self._executor.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.terminate()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus_of(config: Config) -> list[str]:
    """The GPUs that runs may use, as CUDA_VISIBLE_DEVICES names them; none on a CPU."""
    count = torch.cuda.device_count() if config.device != "cpu" else 0
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return [name.strip() for name in named.split(",")][:count] if named else [str(number) for number in range(count)]


def processes_of(config: Config) -> int:
    """How many runs at a time: as asked, or one a GPU, or one a core."""
    return config.compare.processes or len(gpus_of(config)) or cores()


def _begin(numbers: Any, logs: Path, threads: int, gpus: list[str]) -> None:
    number = numbers.get()
    log = os.open(logs / f"worker{number}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log, stream.fileno())
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]  # before anything asks CUDA
    threading.Thread(target=_end_with, args=(parent_process(),), daemon=True).start()

    torch.set_num_threads(threads)
    silence_libraries()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)  # what is on disk is whole at any moment
