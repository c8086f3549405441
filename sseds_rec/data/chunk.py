"""Consecutive rows of a source, as they are read."""

import bisect
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import polars as pl

CHUNK_ROWS = 1 << 18  # at most


@dataclass(frozen=True)
class Malformed:
    """A row of a text file that has too many or too few cells.

    Attributes:
        row: Its number as people count them: from 1, the header included.
        reason: What is wrong with it.
    """

    row: int
    reason: str


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of one file.

    Attributes:
        frame: The columns asked for, without the malformed rows; may be empty.
        file: Path, or another name for people.
        first_row: Number of the first row, malformed or not: from 1, the header included.
        malformed: The rows in between that could not be read, in order.
        done: Share of the source that has been read, up to and including this chunk; None if that is unknown.
        padded: Text columns in which a cell may begin or end with a blank; None if that is unknown.
        missing: Texts that mean an empty cell.
    """

    frame: pl.DataFrame
    file: str
    first_row: int
    malformed: Sequence[Malformed] = ()
    done: float | None = None
    padded: Collection[str] | None = None
    missing: Collection[str] = ()

    def numbers(self, indices: Sequence[int]) -> list[int]:
        """The row numbers of indices into the frame."""
        good_before = [other.row - self.first_row - place for place, other in enumerate(self.malformed)]
        return [self.first_row + index + bisect.bisect_right(good_before, index) for index in indices]
