"""Reading long files once: past the page cache, which costs more than the disk does."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: What positions, lengths and memory are multiples of where there is no page cache between.
_BLOCK = 4096
_DIRECT = getattr(os, "O_DIRECT", 0)


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A handle to read from, direct if the file system can."""
    try:
        handle = os.open(path, os.O_RDONLY | _DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        handle = os.open(path, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


class Window:
    """Memory for parts of files, of at most that many bytes."""

    def __init__(self, longest: int) -> None:
        self._memory = memoryview(mmap.mmap(-1, longest + 2 * _BLOCK))

    def read(self, handle: int, position: int, size: int) -> memoryview:
        """Bytes of a file, until the next call; fewer only at its end."""
        skipped = position % _BLOCK
        target = self._memory[: -(-(skipped + size) // _BLOCK) * _BLOCK]
        done = 0
        while done < skipped + size:
            try:
                got = os.preadv(handle, [target[done:]], position - skipped + done)
            except OSError as error:
                flags = fcntl.fcntl(handle, fcntl.F_GETFL)
                if error.errno != errno.EINVAL or not flags & _DIRECT:
                    raise
                fcntl.fcntl(handle, fcntl.F_SETFL, flags & ~_DIRECT)  # larger blocks, or opened and then not done
                continue
            if not got:
                break
            done += got
        return target[skipped : min(done, skipped + size)]
