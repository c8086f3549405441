"""What a command left behind."""

from __future__ import annotations

import json
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
