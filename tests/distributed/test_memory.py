"""Freed memory is not given back to the system: counted in page faults, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

_FAULTS = """
import ctypes, resource, sys, torch
from sseds_rec.distributed.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a huge page would be one fault for 512 pages
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(*[faults() for _ in range(60)])
"""


def test_keeps_freed_memory() -> None:
    def faults(how: str) -> list[int]:
        done = subprocess.run([sys.executable, "-c", _FAULTS, how], capture_output=True, text=True, check=True)
        return [int(count) for count in done.stdout.split()]

    assert sum(faults("keep")[-20:]) < 100  # the first few leave holes that are a little too small
    assert min(faults("do not")) > 5_000  # of 16,384 pages: or this test would say nothing
