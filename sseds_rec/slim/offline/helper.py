"""One more process of a conversion: `python -m sseds_rec.slim.offline.helper FOLDER SHARE SHARES`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from sseds_rec.distributed.memory import keep_freed_memory
from sseds_rec.errors import UserError
from sseds_rec.slim.offline.job import Job


def main(folder: str, share: str, shares: str) -> None:
    """Makes its share; ends, as soon as the part under way is done, if the process that started it has ended."""
    parent = os.getppid()
    keep_freed_memory()

    def stop_alone() -> None:
        if os.getppid() != parent:
            sys.exit(1)

    try:
        Job.join(Path(folder)).work(int(share), int(shares), stop_alone)
    except UserError as error:
        sys.exit(str(error))  # to stderr, code 1
    except OSError as error:
        sys.exit(f"{error.filename or folder}: {error.strerror}")


if __name__ == "__main__":
    main(*sys.argv[1:])
