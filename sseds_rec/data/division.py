"""An epoch's rows divided over ranks; when the number of ranks changes, what is left of the epoch is divided anew.

The ranks that begin an epoch each make one *stream* of it: the rows of their part, in shuffled order. Whoever goes on with the
epoch reads these same streams, at the places where they were left. So every row comes once however often the number
of ranks changes, but for those that do not fill a last batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sseds_rec.errors import UserError


class Taken(NamedTuple):
    """Ranks that took batches together, `batches` each."""

    world_size: int
    batches: int


class Stream(NamedTuple):
    """Rows `first` to `last` of the epoch's blocks, in the order into which rank `rank` shuffles them."""

    rank: int
    first: int
    last: int


class Segment(NamedTuple):
    """Rows `first` to `last` of a stream, counted from its begin."""

    stream: Stream
    first: int
    last: int


@dataclass(frozen=True)
class Share:
    """What one rank takes.

    Attributes:
        segments: its rows, one after the other.
        starts: where in them each batch starts, and where the last ends.
    """

    segments: list[Segment]
    starts: list[int]

    def after(self, batches: int) -> list[Segment]:
        """The rows that come after so many batches."""
        return _cut(self.segments, self.starts[batches], _rows(self.segments))


def share_of(
    rank: int, world_size: int, rows: int, batch_size: int, drop_last: bool, taken: Sequence[Taken] = ()
) -> Share:
    """What rank `rank` of `world_size` takes of what is left of an epoch; all ranks get equally many batches.

    Args:
        rank: in [0, world_size).
        world_size: ranks now.
        rows: of the epoch.
        batch_size: rows a step over all ranks, of whatever number.
        drop_last: whether all batches are full.
        taken: what of the epoch was taken before, by which ranks.

    Raises:
        UserError: more was taken than there was.
    """
    streams = taken[0].world_size if taken else world_size
    bounds = [stream * rows // streams for stream in range(streams + 1)]
    left = [Segment(Stream(i, *bounds[i : i + 2]), 0, bounds[i + 1] - bounds[i]) for i in range(streams)]
    for ranks, batches in taken:
        shares = [_share(left, i, ranks, batch_size, drop_last) for i in range(ranks)]
        if not 0 <= batches < len(shares[0].starts):
            raise UserError(f"loader state: {ranks} processes cannot have had {batches} batches of {rows} rows")
        left = [segment for share in shares for segment in share.after(batches)]
    return _share(left, rank, world_size, batch_size, drop_last)


def _share(segments: list[Segment], rank: int, world_size: int, batch_size: int, drop_last: bool) -> Share:
    """The `rank`-th of `world_size` parts of the segments' rows, and its batches."""
    rows = _rows(segments)
    first, last = rank * rows // world_size, (rank + 1) * rows // world_size
    fewest, most = rows // world_size, -(-rows // world_size)
    starts = _batch_starts(last - first, fewest, most, batch_size // world_size, drop_last)
    return Share(_cut(segments, first, last), starts)


def _cut(segments: list[Segment], first: int, last: int) -> list[Segment]:
    """Rows `first` to `last` of all the segments' rows."""
    kept, offset = [], 0
    for stream, begin, end in segments:
        low, high = max(begin, begin + first - offset), min(end, begin + last - offset)
        if low < high:
            kept.append(Segment(stream, low, high))
        offset += end - begin
    return kept


def _rows(segments: list[Segment]) -> int:
    return sum(segment.last - segment.first for segment in segments)


def _batch_starts(rows: int, fewest: int, most: int, batch_size: int, drop_last: bool) -> list[int]:
    """Where a rank's batches start, and where the last ends, in its own rows; other ranks have `fewest` to `most` rows."""
    if drop_last:
        return [batch * batch_size for batch in range(fewest // batch_size + 1)]
    count = min(-(-most // batch_size), fewest)
    return [batch * rows // max(count, 1) for batch in range(count + 1)]
