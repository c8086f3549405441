"""Zip files of `torch.save`, in a file of their own or in a part of one, and the CRC-32s in them."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch


def record_checksums(file: IO[bytes] | FileSlice) -> dict[int, int]:
    """Position of its content -> CRC-32, of every record in a zip file that `torch.save` wrote with checksums."""
    # A CRC of 0 is what torch writes if it was told to compute none.
    return {_content_position(file, info): info.CRC for info in zipfile.ZipFile(file).infolist() if info.CRC}


def store_checksums(path: Path, checksums: Mapping[int, int]) -> None:
    """Writes CRC-32s into a zip file whose records were filled after it was made.

    Args:
        path: the file.
        checksums: position of a record's content -> CRC-32.
    """
    with open(path, "r+b") as file:
        archive = zipfile.ZipFile(file)
        entry = archive.start_dir
        for info in archive.infolist():
            position = _content_position(file, info)
            file.seek(entry + 28)
            entry_length = 46 + sum(int.from_bytes(file.read(2), "little") for _ in range(3))
            if position in checksums:
                checksum = checksums[position].to_bytes(4, "little")
                file.seek(entry + 16)
                file.write(checksum)
                # Behind the content is a descriptor, since its header was written before the content was known.
                file.seek(position + info.compress_size)
                if file.read(4) == b"PK\x07\x08":
                    file.seek(position + info.compress_size + 4)
                    file.write(checksum)
            entry += entry_length


def _content_position(file: IO[bytes] | FileSlice, info: zipfile.ZipInfo) -> int:
    """Where a record's content begins: behind its own header, whose padding the directory does not tell."""
    file.seek(info.header_offset + 26)
    return info.header_offset + 30 + sum(int.from_bytes(file.read(2), "little") for _ in range(2))


def is_whole(path: Path, position: int, length: int, tensor: bool) -> bool:
    """Whether torch opens a record, and the checksums in it are right; reads it once, and unpickles nothing.

    Args:
        path, position, length: where it is.
        tensor: whether it is one. What is none was saved as somebody's own planner likes, and need not be a zip file.
    """
    with open(path, "rb") as file:
        view = FileSlice(file, position, length)
        begins = view.read(4) == b"PK\x03\x04"
        if not tensor and not begins and not zipfile.is_zipfile(view):
            return True
        try:
            view.seek(0)
            torch._C.PyTorchFileReader(view)  # type: ignore[call-overload]
            with zipfile.ZipFile(view) as archive:
                for record in archive.infolist():
                    if record.CRC:  # torch was told to compute none
                        with archive.open(record) as content:
                            while content.read(1 << 22):
                                pass
        except Exception:  # a damaged file can fail in any way
            return False
    return True


class FileSlice(io.RawIOBase):
    """Some bytes of an open file as a file. (Of torch's own, zipfile cannot find the end.)"""

    def __init__(self, file: IO[bytes], offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._at)
        content = self._file.read(min(len(buffer), max(self._length - self._at, 0)))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


_POLYNOMIAL = 0xEDB88320  # of CRC-32, lowest bit first


def joined(first: int, second: int, length: int) -> int:
    """CRC-32 of two pieces of bytes, one behind the other, from theirs; the second has `length` bytes.

    CRCs are remainders of polynomials over GF(2): the first is multiplied by x^(8 · length) (as zlib's crc32_combine does).
    """
    power, square = 1 << 31, 1 << 23  # 1 and x^8, of which x^(8 · length) is made by squaring
    while length:
        if length & 1:
            power = _product(power, square)
        square = _product(square, square)
        length >>= 1
    return _product(first, power) ^ second


def _product(a: int, b: int) -> int:
    """a b modulo the polynomial; bit 31 is 1, bit 0 is x^31."""
    result = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            result ^= b
        b = b >> 1 ^ _POLYNOMIAL if b & 1 else b >> 1
    return result
