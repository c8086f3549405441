"""Pre-emption: SIGTERM lets the step under way end, and all ranks stop after the same one."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.distributed as dist

from sseds_rec.distributed.runtime import Runtime


class Requested(Protocol):
    """Whether a rank got SIGTERM; the same on all ranks, which call it equally often."""

    def __call__(self, wait: bool = False) -> bool:
        """Asks.

        Args:
            wait: for all ranks, so that a signal that came before this call counts.
        """


@contextmanager
def preemption(runtime: Runtime) -> Iterator[Requested]:
    """Catches SIGTERM, and tells all ranks that one of them got it.

    A rank that asks begins an all-reduce on the CPU and gets the answer of the one begun when it asked last. So no rank waits
    for a GPU or, as a rule, for another rank, and the answer is one step late. A signal after which nobody asked any more is
    raised again at the end of the block.

    Args:
        runtime: of this process, whose main thread this is.

    Yields:
        `requested(wait=False)`: call it once a step.
    """
    received = False
    group = dist.new_group(backend="gloo") if runtime.world_size > 1 else None
    under_way: tuple[dist.Work, torch.Tensor] | None = None

    def receive(*_: object) -> None:
        nonlocal received
        received = True

    def requested(wait: bool = False) -> bool:
        nonlocal under_way
        if group is None:
            return received
        before, flag = under_way, torch.tensor(int(received))
        under_way = dist.all_reduce(flag, dist.ReduceOp.MAX, group, async_op=True), flag
        asked = under_way if wait else before
        if asked is None:
            return False
        asked[0].wait()
        return bool(asked[1])

    outer = signal.signal(signal.SIGTERM, receive)
    try:
        yield requested
    finally:
        signal.signal(signal.SIGTERM, outer)
    if received:
        signal.raise_signal(signal.SIGTERM)
