"""What the user sees while a source is read: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time
from collections.abc import Iterator

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from sseds_rec.data.cells import Read
from sseds_rec.output import LINE_SECONDS, progress_console


def shown(title: str, reads: Iterator[Read]) -> Iterator[Read]:
    """Passes the reads on, and shows rows, rows/s and the share of the source as they come."""
    begun = last_line = time.monotonic()
    rows = 0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[info]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=progress_console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(title, total=None, info="")
        for read in reads:
            yield read
            rows += read.rows.height
            info = f"{rows:,} rows  {rows / (time.monotonic() - begun):,.0f} rows/s"
            bar.update(task, total=None if read.done is None else 1.0, completed=read.done or 0.0, info=info)
            if bar.disable and time.monotonic() - last_line >= LINE_SECONDS:
                last_line = time.monotonic()
                progress_console.print(f"{title}: {info}" + ("" if read.done is None else f"  {read.done:.0%}"))
