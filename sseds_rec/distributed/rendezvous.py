"""How the processes of a job find each other, those of this start and no others."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from uuid import uuid4

import torch.distributed as dist

from sseds_rec.errors import Lost

#: How long processes wait for each other at a start: agents start them together, but imports may come from a slow disk.
JOIN_SECONDS = 300.0
_POLL_SECONDS = 0.05
_ADVICE = (
    "look for what ended it above; where nodes come and go (--nnodes MIN:MAX), set "
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun on all of them"
)


def meet(rank: int, world_size: int, seconds: float = JOIN_SECONDS) -> dist.Store:
    """A store of this start of the job, once all its processes are there.

    torchrun keeps one store over its restarts, in which those who died have left their addresses, and neither the restart
    count (each agent has its own) nor anything else in the environment tells one start from the next. So rank 0 draws a
    name, and tells it to every process that says it is here. Those that died before cannot answer to a new name.

    Args:
        rank: of this process.
        world_size: processes that must come.
        seconds: how long to wait for them.

    Raises:
        Lost: they did not come.
    """
    if "WORLD_SIZE" not in os.environ:
        return dist.HashStore()
    own, deadline = uuid4().hex, time.monotonic() + seconds
    try:
        connection = next(dist.rendezvous("env://", rank, world_size, timeout=timedelta(seconds=seconds)))[0]
        hall = dist.PrefixStore("sseds", connection)
        if rank == 0:
            _welcome(hall, world_size, own, deadline)
            return dist.PrefixStore(own, hall)
        hall.set(f"here/{rank}", own)
        hall.wait([f"name/{own}"], timedelta(seconds=max(deadline - time.monotonic(), 1)))
        store = dist.PrefixStore(hall.get(f"name/{own}").decode(), hall)
        store.set(f"joined/{rank}", "")
        return store
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        raise Lost(f"rank {rank} of {world_size} has not met the others ({reason}); {_ADVICE}") from None


def _welcome(hall: dist.Store, world_size: int, name: str, deadline: float) -> None:
    """Tells all others the name, also those that come again in the place of one that died, until each rank has taken it."""
    store, told = dist.PrefixStore(name, hall), set[bytes]()
    missing = list(range(1, world_size))
    while missing := [rank for rank in missing if not store.check([f"joined/{rank}"])]:
        for rank in missing:
            if hall.check([f"here/{rank}"]) and (guest := hall.get(f"here/{rank}")) not in told:
                hall.set(f"name/{guest.decode()}", name)
                told.add(guest)
        if time.monotonic() > deadline:
            raise Lost(f"rank {missing[0]} of {world_size} has not come; {_ADVICE}")
        time.sleep(_POLL_SECONDS)
