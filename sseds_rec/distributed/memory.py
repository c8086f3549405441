"""Memory of a process that does the same again and again."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_NEVER = -1


def keep_freed_memory() -> None:
    """Has glibc keep what is freed for the next step, instead of giving it back to the system.

    A training step on a CPU makes and frees tensors of tens of megabytes. By default each is mapped anew, and the kernel
    clears every page of it on first touch (`benchmarks/training.md` has what that costs). The process then stays as large
    as it ever was. Without glibc nothing is changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)  # large blocks come from the heap as well
        mallopt(_M_TRIM_THRESHOLD, _NEVER)
