"""What a conversion did."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figures:
    """What one call read, wrote and compared.

    Attributes:
        bytes_read: of the old checkpoint, without headers and metadata.
        bytes_written: of the new one, without its metadata.
        rows_verified: rows of the new checkpoint that were compared with the old.
        parts: files that were made, by all processes; of a file of weights, 1.
        parts_before: files that a killed call had made already, which count in nothing else.
        seconds: from the call to the end.
    """

    bytes_read: int
    bytes_written: int
    rows_verified: int
    parts: int = 1
    parts_before: int = 0
    seconds: float = 0.0
