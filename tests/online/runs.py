"""Runs of `sseds online` in processes of their own, and what they leave."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl


def command(stream: Path, run: Path, *settings: str) -> list[str]:
    return [sys.executable, "-m", "sseds_rec", "online", str(stream), "--run-dir", str(run), "--json", *settings]


def follow(stream: Path, run: Path, *settings: str) -> str:
    """What it prints."""
    done = subprocess.run(command(stream, run, *settings), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def table(run: Path) -> pl.DataFrame:
    return pl.read_csv(run / "online" / "windows.csv")


def results(run: Path) -> list[dict[str, Any]]:
    """All that does not depend on the clock."""
    return table(run).drop("seconds").to_dicts()
