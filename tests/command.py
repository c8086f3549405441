"""Commands, and what they left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Command:
    """Exit code, stdout and stderr of a finished command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The machine-readable last line of stdout."""
        return json.loads(self.out.strip().splitlines()[-1])


def torchrun(ranks: int, *args: object) -> str:
    """What `sseds` prints under torchrun, on that many processes of one thread each."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*launcher, "-m", "sseds_rec", *map(str, args)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
