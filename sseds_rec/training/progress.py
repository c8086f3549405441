"""What the user sees while a model trains: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from sseds_rec.files import write_text
from sseds_rec.output import LINE_SECONDS, progress_console

#: What an event says of itself; the rest are numbers to draw over steps.
_NOT_CURVES = {"kind", "split", "step", "epoch", "seconds", "samples"}


class StepReporter:
    """Reports steps of one epoch; use as `with reporter.epoch(...)`.

    Args:
        enabled: only the main rank reports.
        stage: "pretrain" or "retrain", the first word of every line.
    """

    def __init__(self, stage: str, enabled: bool) -> None:
        self.stage = stage
        self.enabled = enabled
        self._bar: Progress | None = None
        self._task: Any = None
        self._last_line = time.monotonic()

    @contextmanager
    def epoch(self, epoch: int, epochs: int, first: int, steps: int) -> Iterator[None]:
        """Shows an epoch of `steps` steps, of which `first` are done already."""
        self._title, self._steps, self._begun, self._first = (
            f"{self.stage} epoch {epoch + 1}/{epochs}",
            steps,
            time.monotonic(),
            first,
        )
        if not (self.enabled and sys.stderr.isatty()):
            yield
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[info]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=progress_console, transient=True) as self._bar:
            self._task = self._bar.add_task(self._title, total=steps, completed=first, info="")
            yield
        self._bar = None

    def step(self, done: int, loss: float, samples_per_second: float) -> None:
        """Shows that `done` steps of the epoch are done."""
        if not self.enabled:
            return
        info = f"loss {loss:.4f}  {samples_per_second:,.0f} samples/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, info=info)
        elif time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            eta = (self._last_line - self._begun) / max(done - self._first, 1) * (self._steps - done)
            progress_console.print(f"{self._title}: {done}/{self._steps} steps  {info}  ETA {eta:.0f} s")

    def line(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self.enabled:
            (self._bar.console if self._bar else progress_console).print(f"{self.stage}: {text}")


class History:
    """What happened, in order of steps: `history.jsonl`, one JSON object a line, and the same as curves for TensorBoard.

    Both are written out with every event, so that what comes after a kill goes on where they stop.

    Args:
        folder: of the stage; gets `history.jsonl` and `tensorboard/`.
        step: where training goes on; events after it are removed, since they will happen again.
        enabled: only the main rank writes.
    """

    def __init__(self, folder: Path, step: int, enabled: bool) -> None:
        self.path = folder / "history.jsonl"
        self.enabled = enabled
        if enabled:
            lines = self.path.read_text().splitlines() if self.path.exists() else []
            kept = [line for line in lines if _step_of(line) <= step]
            write_text(self.path, "".join(f"{line}\n" for line in kept))
            self._curves = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def add(self, event: dict[str, Any]) -> None:
        """Appends an event: its `step`, `split` if it is an evaluation, and numbers."""
        if not self.enabled:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
        for name in event.keys() - _NOT_CURVES:
            self._curves.add_scalar(f"{event.get('split', 'train')}/{name}", event[name], event["step"])
        self._curves.flush()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):  # the half-written last line of a killed run
        return float("inf")
