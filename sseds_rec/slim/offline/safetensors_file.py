"""Safetensors files: a JSON header of names, shapes and places, and then the numbers.

The `safetensors` package writes a file from tensors that are all in memory; here they never are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, RootModel

from sseds_rec.slim.columns import RowConversion
from sseds_rec.slim.offline.stored import Content, damaged

_METADATA = "__metadata__"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
#: The format's own limit.
_LONGEST_HEADER = 100_000_000


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    dtype: str
    shape: list[NonNegativeInt]
    data_offsets: tuple[NonNegativeInt, NonNegativeInt] = Field(description="from the end of the header")


_Header = RootModel[dict[str, _Entry]]
_Metadata = RootModel[dict[str, str]]


@dataclass(frozen=True)
class SafetensorsFile:
    """What a file's header says.

    Attributes:
        metadata: text -> text that was saved beside the tensors.
        entries: name -> dtype, shape and place.
        contents: name -> where it is.
    """

    metadata: dict[str, str]
    entries: dict[str, _Entry]
    contents: dict[str, Content]

    def write(self, path: Path, conversions: Mapping[str, RowConversion | None]) -> dict[str, Content]:
        """Writes such a file with room for converted tensors, without dropped ones; returns where its tensors go."""
        entries: dict[str, _Entry] = {}
        end = 0
        for name, entry in self.entries.items():
            conversion = conversions.get(name)
            if name in conversions and conversion is None:
                continue
            begin, length = end, entry.data_offsets[1] - entry.data_offsets[0]
            shape = entry.shape if conversion is None else [entry.shape[0], conversion.width]
            end += length if conversion is None else length // entry.shape[1] * conversion.width
            entries[name] = _Entry(dtype=entry.dtype, shape=shape, data_offsets=(begin, end))
        header = {**({_METADATA: self.metadata} if self.metadata else {}), **_Header(entries).model_dump()}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        return _contents(entries, 8 + len(text))

    def finish(self, path: Path, checksums: Mapping[int, int]) -> None:
        """The format has no checksums."""


def read(path: Path) -> SafetensorsFile:
    """What a file holds.

    Raises:
        UserError: it is damaged.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(size, _LONGEST_HEADER):
            raise damaged(path, "it does not begin as safetensors do")
        try:
            header = json.loads(file.read(length))
            metadata = _Metadata.model_validate(header.pop(_METADATA, {})).root
            entries = _Header.model_validate(header).root
        except (ValueError, AttributeError, TypeError, RecursionError) as error:
            raise damaged(path, f"its header is no safetensors header ({str(error).splitlines()[0]})") from None
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin, stop = entry.data_offsets
        dtype = _DTYPES.get(entry.dtype)
        if begin != end or (stop - begin != math.prod(entry.shape) * dtype.itemsize if dtype else stop < begin):
            raise damaged(path, f"its header says that {name} is bytes {begin:,} to {stop:,}, which cannot be")
        end = stop
    if 8 + length + end != size:
        raise damaged(path, f"it has {size:,} bytes, its header says {8 + length + end:,}")
    return SafetensorsFile(metadata, entries, _contents(entries, 8 + length))


def _contents(entries: Mapping[str, _Entry], begin: int) -> dict[str, Content]:
    return {
        name: Content(
            begin + entry.data_offsets[0],
            entry.data_offsets[1] - entry.data_offsets[0],
            tuple(entry.shape),
            _DTYPES.get(entry.dtype),
        )
        for name, entry in entries.items()
    }
