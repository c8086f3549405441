"""Rows in order of time to windows: prepared sets beside each other, each with the ids of the one before and new ones."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sseds_rec.data.parts import new_folder
from sseds_rec.data.prepare import prepare_source
from sseds_rec.data.schema import Schema
from sseds_rec.data.sources import Source
from sseds_rec.data.splits import SplitSpec
from sseds_rec.errors import UserError
from sseds_rec.files import is_local, write_json

#: Marks a folder whose windows were prepared together, and which may be replaced.
MARKER = "windows.json"


def prepare_windows(
    windows: Iterable[tuple[str, Source]],
    output: str | Path,
    *,
    by: str,
    seed: int = 0,
    overwrite: bool = False,
    **options: Any,
) -> dict[str, Schema]:
    """Prepares every window as a set of its own, all rows in its train split, with the vocabulary grown from the one before.

    It is what `prepare_table(..., split=(1, 0, 0), vocabulary=PREVIOUS, grow=True)` makes of one window after the other, but the
    folder appears when all are there.

    Args:
        windows: Name and rows of each, in order of time, in which the names must sort.
        output: Folder to make; gets a folder for each window, and `windows.json`.
        by: What a window is, for people.
        seed: Of the stored order of the rows.
        overwrite: Replace earlier windows that were prepared so.
        options: Of `prepare_source`.

    Raises:
        UserError: Bad input, or `output` is not of this machine's file system. Nothing is left in it.
    """
    if not is_local(output):
        raise UserError(f"{output}: windows are prepared together on a local disk only; prepare one after the other")
    everything = SplitSpec("random", (1, 0, 0), seed)
    made: dict[str, Schema] = {}
    with new_folder(output, overwrite, MARKER) as folder:
        for name, source in windows:
            previous = next(reversed(made), None)
            grown: dict[str, Any] = {"vocabulary": folder / previous, "grow": True} if previous else {}
            schema = prepare_source(source, folder / name, splits=everything, **grown, **options)
            if previous:
                schema = schema.model_copy(update={"source": {**schema.source, "vocabulary": f"../{previous}"}})
                schema.save(folder / name)
            made[name] = schema
        write_json(folder / MARKER, {"by": by, "windows": len(made)})
    return made
