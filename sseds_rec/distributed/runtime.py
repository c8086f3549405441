"""One process or many: the same code runs under `python` and under `torchrun`."""

from __future__ import annotations

import os
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from sseds_rec.distributed.failures import Watch
from sseds_rec.distributed.memory import keep_freed_memory
from sseds_rec.distributed.rendezvous import meet
from sseds_rec.errors import Preempted, UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Runtime:
    """This process's place in the job.

    Attributes:
        rank: of this process, in [0, world_size).
        world_size: processes in the job.
        device: where this process computes.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and talks to the user."""
        return self.rank == 0

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` returns on the main rank, while the others wait for it; all raise what it raises."""
        answer: list[Any] = [None, None]  # value, failure
        if self.is_main:
            try:
                answer[0] = make()
            except Exception as error:
                answer[1] = error
        if self.world_size > 1:
            dist.broadcast_object_list(answer)
        value, failure = answer
        if failure is not None:
            raise failure
        return typing.cast("T", value)

    def on_main(self, action: Callable[[], object]) -> None:
        """Runs `action` on the main rank while the others wait; all raise what it raises."""

        def run() -> None:
            action()

        self.from_main(run)

    def on_all(self, action: Callable[[], T]) -> T:
        """What `action` returns on this rank, when it has ended on all; if it raises on any, all raise what it raises there."""
        answer: list[Any] = [None, None]  # value, failure
        try:
            answer[0] = action()
        except Exception as error:
            answer[1] = error
        failures = [answer[1]]
        if self.world_size > 1:
            failures *= self.world_size
            dist.all_gather_object(failures, answer[1])
        for failure in failures:
            if failure is not None:
                raise failure
        return typing.cast("T", answer[0])

    def mean(self, values: Tensor) -> Tensor:
        """The mean over ranks of a tensor of any shape, the same on all."""
        if self.world_size > 1:
            dist.all_reduce(values)
            values /= self.world_size
        return values

    def gather_rows(self, values: Tensor) -> Tensor:
        """Concatenates tensors [rows_of_rank] of all ranks, in rank order, on every rank."""
        if self.world_size == 1:
            return values
        sizes = [torch.zeros(1, dtype=torch.int64, device=values.device) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(values)], dtype=torch.int64, device=values.device))
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=values.dtype, device=values.device)
        padded[: len(values)] = values
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded)
        return torch.cat([part[: int(size)] for part, size in zip(gathered, sizes, strict=True)])


#: A process that is in no job.
ALONE = Runtime(0, 1, torch.device("cpu"))


@contextmanager
def runtime(device: str = "auto") -> Iterator[Runtime]:
    """Joins the job that torchrun describes, or makes a job of one process; leaves it on exit.

    Of several processes, an exception in the block ends all, with one line and one exit code: see `failures`.

    Args:
        device: "cpu", "cuda" or "auto" (CUDA where there is one).

    Raises:
        Lost: not all processes of the job came.
        UserError: CUDA is asked for and absent, or this machine has fewer GPUs than local ranks.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if dist.is_initialized():
        yield Runtime(rank, world_size, _prepare(device))
        return
    store = meet(rank, world_size)
    watch = Watch(store, rank, world_size) if world_size > 1 else None
    try:
        if watch is not None:
            watch.start()
        where = _prepare(device)
        backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
        yield Runtime(rank, world_size, where)
    except Preempted:  # on all ranks
        raise
    except (Exception, CheckpointException) as error:
        if watch is not None:
            watch.end(error)  # before this rank leaves the group, of which the others would only hear that it is gone
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        if watch is not None:
            watch.leave()


def _prepare(device: str) -> torch.device:
    """Chooses where this process computes, and sets it up."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch sees no GPU; install the cuda extra on a GPU machine or set device=cpu")
    where = torch.device("cpu")
    if device != "cpu" and torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}; "
                "start fewer processes per node"
            )
        where = torch.device("cuda", local_rank)
        torch.cuda.set_device(where)
    keep_freed_memory()
    return where
