"""A look at what was written: rows of the new checkpoint beside those of the old."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from torch import Tensor

from sseds_rec.distributed.checkpoint import read_checkpoint_metadata
from sseds_rec.errors import UserError
from sseds_rec.slim.columns import KeepColumns, Product, RowConversion
from sseds_rec.slim.offline.dcp import DcpConversion
from sseds_rec.slim.offline.layout import stored_tensor
from sseds_rec.slim.offline.reading import Window, opened
from sseds_rec.slim.offline.stored import StoredTensor

#: Places in every tensor, and rows at each.
_PLACES, _ROWS = 16, 64


def verify(conversion: DcpConversion, folder: Path) -> int:
    """Compares rows at random places of every converted tensor.

    Args:
        conversion: of the old checkpoint.
        folder: the new one.

    Returns:
        How many rows were compared.

    Raises:
        UserError: something differs (names it).
    """
    metadata = read_checkpoint_metadata(folder)
    compared = 0
    for name, own in conversion.conversions.items():
        if own is not None:
            compared += compare(conversion.stored[name], own, stored_tensor(folder, metadata, name))
    return compared


def compare(source: StoredTensor, conversion: RowConversion, target: StoredTensor) -> int:
    """Compares rows at random places of one tensor; returns how many.

    Raises:
        UserError: they differ.
    """
    draw = random.Random(source.name)
    source_ranges, target_ranges = list(source.row_ranges(source.rows)), list(target.row_ranges(target.rows))
    compared = 0
    for _ in range(_PLACES):
        first, last = draw.choice(target_ranges)
        start = draw.randrange(first, last)
        stop = min([start + _ROWS, last, *(end for begin, end in source_ranges if begin <= start < end)])
        if not _agree(_read(source, start, stop), conversion, _read(target, start, stop)):
            raise UserError(
                f"{target.chunks[0].path}: rows {start} to {stop - 1} of {source.name} are not those of the source; "
                "check the disk, and convert again"
            )
        compared += stop - start
    return compared


def _agree(source: Tensor, conversion: RowConversion, found: Tensor) -> bool:
    if isinstance(conversion, KeepColumns):
        kept = source[:, conversion.needs]
        return torch.equal(found[:, : kept.shape[1]], kept) and not found[:, kept.shape[1] :].any()
    assert isinstance(conversion, Product)
    product = source.double() @ conversion.matrix + conversion.constant
    tolerance = 4 * torch.finfo(found.dtype).eps
    scale = float(product.abs().max()) if product.numel() else 0.0
    return torch.allclose(found[:, : product.shape[1]].double(), product, rtol=tolerance, atol=tolerance * scale)


def _read(tensor: StoredTensor, start: int, stop: int) -> Tensor:
    """Rows [start, stop), which no chunk ends in, all columns."""
    values = torch.zeros(stop - start, tensor.columns, dtype=tensor.dtype)
    for chunk in tensor.chunks:
        if chunk.first_row <= start and stop <= chunk.first_row + chunk.rows:
            window = Window((stop - start) * chunk.row_bytes)
            with opened(chunk.path) as handle:
                own, _ = chunk.read(handle, start, stop, window)
            values[:, chunk.first_column : chunk.first_column + chunk.columns] = own
    return values
