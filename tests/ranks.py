"""Runs functions on N gloo processes that stay up for the whole test session: starting them costs more than most tests."""

from __future__ import annotations

import atexit
import io
import socket
import traceback
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`[function(rank, world_size, *args) of each rank]`; the function is found by its name, so it is a module's own."""
    return _pool(world_size).run(function, *args)


@cache
def _pool(world_size: int) -> _Pool:
    return _Pool(world_size)


class _Pool:
    def __init__(self, world_size: int) -> None:
        context = mp.get_context("spawn")
        self.results = context.Queue()
        self.tasks = [context.Queue() for _ in range(world_size)]
        port = free_port()
        self.processes = [
            context.Process(target=_work, args=(rank, world_size, port, tasks, self.results), daemon=True)
            for rank, tasks in enumerate(self.tasks)
        ]
        for process in self.processes:
            process.start()
        atexit.register(self.stop)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        for tasks in self.tasks:
            tasks.put((function, args))
        answers = sorted((self.results.get(timeout=180) for _ in self.processes), key=lambda answer: answer[0])
        failures = [failure for _, _, failure in answers if failure]
        if failures:
            self.stop()  # ranks that failed apart may wait for each other for ever
            _pool.cache_clear()
            raise AssertionError(failures[0])
        return [torch.load(io.BytesIO(value), weights_only=False) for _, value, _ in answers]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _work(rank: int, world_size: int, port: int, tasks: Any, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=world_size)
    while True:
        function, args = tasks.get()
        try:
            answer = io.BytesIO()  # bytes, not tensors: those would be shared memory of this process
            torch.save(function(rank, world_size, *args), answer)
            results.put((rank, answer.getvalue(), None))
        except BaseException:
            results.put((rank, None, traceback.format_exc()))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])
