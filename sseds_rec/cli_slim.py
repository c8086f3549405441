"""`sseds slim SRC DST --plan plan.json`: a checkpoint of any model, converted offline."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sseds_rec.errors import UserError
from sseds_rec.output import LINE_SECONDS, console, print_json, progress_console

if TYPE_CHECKING:
    from sseds_rec.slim.offline.figures import Figures


def convert_checkpoint(
    places: Sequence[str], plan: Path, processes: int | None, as_json: bool, not_these: Mapping[str, bool]
) -> None:
    """Converts and says what was done; under torchrun on all ranks, of which the first speaks.

    Args:
        places: SRC and DST.
        plan: file of the plan.
        processes: how many, without torchrun.
        as_json: whether to print one machine-readable line last.
        not_these: option -> whether it was given, of options that go with a config.

    Raises:
        UserError: see `slim_checkpoint`, or the command line is not of this form.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    for option in (option for option, given in not_these.items() if given):
        raise UserError(f"{option} goes with a config, not with --plan: sseds slim SRC DST --plan plan.json")
    if len(places) != 2:
        raise UserError(f"--plan takes SRC and DST, and {len(places)} were given: sseds slim SRC DST --plan plan.json")
    if processes and ranks > 1:
        raise UserError("--processes goes without torchrun, whose ranks convert; leave it out")
    from sseds_rec.distributed.memory import keep_freed_memory
    from sseds_rec.distributed.runtime import ALONE, runtime
    from sseds_rec.search.plan import DimensionPlan
    from sseds_rec.slim.checkpoint import convert

    src, dst = places
    keep_freed_memory()
    with runtime("cpu") if ranks > 1 else nullcontext(ALONE) as place:
        own = place.on_all(lambda: DimensionPlan.load(plan))
        with _progress(place.is_main) as show:
            figures = convert(src, dst, own, processes, ranks > 1, show)
        if place.is_main:
            _print(dst, figures)
            print_json(as_json, {"verb": "slim", "src": src, "dst": dst, "plan": str(plan), **asdict(figures)})


def _print(dst: str, figures: Figures) -> None:
    before = f" ({figures.parts_before} more were made before)" if figures.parts_before else ""
    console.print(
        f"slim: wrote {dst}: {figures.parts} parts{before}, {figures.bytes_read:,} bytes read and "
        f"{figures.bytes_written:,} written in {figures.seconds:.1f} s, {figures.rows_verified:,} rows verified"
    )


@contextmanager
def _progress(visible: bool) -> Iterator[Callable[[int, int], None]]:
    """Shows how many parts are done: a bar on a terminal, a line every few seconds elsewhere."""
    last_line = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = not (visible and sys.stderr.isatty())
    with Progress(*columns, console=progress_console, transient=True, disable=hidden) as bar:
        task = bar.add_task("slim", total=None)

        def show(done: int, of: int) -> None:
            nonlocal last_line
            bar.update(task, completed=done, total=of)
            if hidden and visible and time.monotonic() - last_line >= LINE_SECONDS:
                last_line = time.monotonic()
                progress_console.print(f"slim: {done} of {of} parts")

        yield show
