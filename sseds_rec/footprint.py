"""What a row of an embedding table takes in training memory, as FBGEMM stores it; imports nothing heavy."""

from __future__ import annotations

from typing import Literal

Optimizer = Literal[
    "sgd", "lars_sgd", "adagrad", "rowwise_adagrad", "adam", "partial_rowwise_adam", "lamb", "partial_rowwise_lamb"
]
Precision = Literal["fp32", "fp16", "bf16"]

#: FBGEMM's optimizer states: (as wide as the row, one number a row). They are float32 whatever the weights are.
STATES: dict[Optimizer, tuple[int, int]] = {
    "sgd": (0, 0),
    "lars_sgd": (1, 0),
    "adagrad": (1, 0),
    "rowwise_adagrad": (0, 1),
    "adam": (2, 0),
    "partial_rowwise_adam": (1, 1),
    "lamb": (2, 0),
    "partial_rowwise_lamb": (1, 1),
}
STATE_BYTES = 4
WEIGHT_BYTES: dict[Precision, int] = {"fp32": 4, "fp16": 2, "bf16": 2}


def state_bytes(rows: int, columns: int, optimizer: Optimizer) -> int:
    """Bytes of the optimizer's states of a table, or of one shard of it."""
    wide, single = STATES[optimizer]
    return STATE_BYTES * rows * (wide * columns + single)
