"""Commands, and what they left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
COMPONENTS = ROOT / "torchx_components" / "sseds.py"


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
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def torchx(*args: object, cwd: Path, **environment: str) -> Command:
    """What TorchX's command line does in a folder, with this `sseds_rec` in reach of its jobs."""
    everything = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", "torchx.cli.main", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=everything, check=False)
    return Command(done.returncode, done.stdout, done.stderr)
