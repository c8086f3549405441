"""Files of weights: state dicts by `torch.save`, and safetensors. The new one is laid out first, and then filled some rows at a
time; its tables are what they are in checkpoint folders."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import IO

import torch

from sseds_rec.files import write_atomic
from sseds_rec.search.plan import DimensionPlan
from sseds_rec.slim.columns import RowConversion
from sseds_rec.slim.offline import safetensors_file, torch_file
from sseds_rec.slim.offline.entries import conversions
from sseds_rec.slim.offline.figures import Figures
from sseds_rec.slim.offline.stored import Checksum, Content, check_room, damaged, read_bytes, sync
from sseds_rec.slim.offline.verify import compare

#: Bytes of converted rows that are held at once.
_CHUNK_BYTES = 64 << 20


def slim_state_file(src: Path, dst: Path, plan: DimensionPlan) -> Figures:
    """Converts a file of weights; see `slim_checkpoint`.

    Returns:
        What was done, but for the time.

    Raises:
        UserError: the file is damaged or of another format, the plan is of another model, or the disk is too small.
    """
    figures: list[Figures] = []
    write_atomic(dst, lambda temporary: figures.append(_convert(src, temporary, plan)))
    return figures[0]


def _convert(src: Path, temporary: Path, plan: DimensionPlan) -> Figures:
    kind = safetensors_file if src.suffix == ".safetensors" else torch_file
    layout = kind.read(src)
    found = conversions(src, {name: content.shape for name, content in layout.contents.items()}, plan)
    lengths: dict[int, int] = {}  # by position, since several tensors can be views of one storage
    for name, content in layout.contents.items():
        length = _new_length(content, found.get(name, content))
        lengths[content.position] = max(length, lengths.get(content.position, 0))
    check_room(temporary.parent, sum(lengths.values()), "file")
    target = layout.write(temporary, found)
    written: dict[int, int] = {}  # position -> CRC-32
    read = rows = 0
    with open(temporary, "r+b") as file:
        for name, new in target.items():
            conversion, old = found.get(name), layout.contents[name]
            file.seek(new.position)
            if conversion is not None:
                written[new.position] = _convert_rows(src, name, conversion, old, file)
                read += old.length
            elif old.length and new.position not in written:  # (an empty tensor is where the next one is)
                written[new.position] = _copy(src, name, old, file)
                read += old.length
    layout.finish(temporary, written)
    sync(temporary)
    for name, new in target.items():
        conversion = found.get(name)
        if conversion is not None:
            rows += compare(layout.contents[name].stored(src, name), conversion, new.stored(temporary, name))
    return Figures(read, temporary.stat().st_size, rows)


def _new_length(content: Content, conversion: RowConversion | Content | None) -> int:
    if conversion is None:
        return 0
    if isinstance(conversion, Content):
        return content.length
    return content.length // content.shape[1] * conversion.width


def _convert_rows(src: Path, name: str, conversion: RowConversion, old: Content, file: IO[bytes]) -> int:
    """Returns the CRC-32 of what it wrote."""
    stored = old.stored(src, name)
    checksums: list[Checksum] = []
    written = 0
    for start, stop in stored.row_ranges(max(1, _CHUNK_BYTES // (conversion.width * stored.dtype.itemsize))):
        rows, own = stored.convert(conversion, start, stop)
        checksums += own
        content = memoryview(rows.view(torch.uint8).numpy())  # type: ignore[arg-type]
        written = zlib.crc32(content, written)
        file.write(content)
    stored.check(checksums)
    return written


def _copy(src: Path, name: str, old: Content, file: IO[bytes]) -> int:
    """Returns the CRC-32 of what it wrote."""
    checksum = 0
    for piece in read_bytes(src, old.position, old.length):
        checksum = zlib.crc32(piece, checksum)
        file.write(piece)
    if old.checksum is not None and checksum != old.checksum:
        raise damaged(src, f"the bytes of {name} are not those that were saved")
    return checksum
