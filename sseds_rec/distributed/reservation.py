"""What of a device's memory the planner leaves to others than tables."""

from __future__ import annotations

import warnings

from torchrec.distributed.planner.storage_reservations import HeuristicalStorageReservation

from sseds_rec.distributed.hardware import MARGIN

#: Numbers that a dense parameter takes: itself, its gradient and Adam's two moments.
_COPIES = 4.0


def storage_reservation(dense_bytes: int | None = None) -> HeuristicalStorageReservation:
    """The margin, the dense part, and (as TorchRec counts them) the ids of two batches in the pipeline.

    Args:
        dense_bytes: of one rank, for all but the tables; None for what the planned module's own dense parameters take with Adam.
    """
    with warnings.catch_warnings():
        # It warns of its own default, six numbers a dense parameter.
        warnings.simplefilter("ignore", FutureWarning)
        return HeuristicalStorageReservation(MARGIN, _COPIES, None if dense_bytes is None else max(1, dense_bytes))
