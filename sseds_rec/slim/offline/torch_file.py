"""State dicts in files of `torch.save`: what is in them and where, without reading it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sseds_rec.errors import UserError
from sseds_rec.slim.columns import RowConversion
from sseds_rec.slim.offline.records import record_checksums, store_checksums
from sseds_rec.slim.offline.stored import Content


@dataclass(frozen=True)
class TorchFile:
    """A file's collections, with tensors that have no content.

    Attributes:
        path: the file.
        tree: what it holds.
        contents: dotted name -> where it is, of every tensor.
    """

    path: Path
    tree: Any
    contents: dict[str, Content]

    def write(self, path: Path, conversions: Mapping[str, RowConversion | None]) -> dict[str, Content]:
        """Writes such a file with room for converted tensors, without dropped ones; returns where its tensors go.

        Raises:
            UserError: a table is not in a dict.
        """
        for name, holder, key, tensor in list(_tensors(self.tree)):
            if name not in conversions:
                continue
            if not isinstance(holder, dict):
                raise UserError(f"{self.path}: {name} is in a {type(holder).__name__}; save state dicts as dicts")
            conversion = conversions[name]
            if conversion is None:
                del holder[key]
            else:
                with FakeTensorMode():
                    holder[key] = torch.empty(len(tensor), conversion.width, dtype=tensor.dtype)
        # (Given a path, torch opens it in C++, and says of a full disk only that a position is not the expected one.)
        with open(path, "wb") as file, torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(self.tree, file)
        return read(path).contents

    def finish(self, path: Path, checksums: Mapping[int, int]) -> None:
        """Gives such a file, whose tensors were filled, their checksums: position -> CRC-32."""
        store_checksums(path, checksums)


def read(path: Path) -> TorchFile:
    """What a file holds.

    Raises:
        UserError: it is damaged, or holds what torch does not load without running code of the file's choice.
    """
    try:
        with FakeTensorMode():
            tree = torch.load(path, weights_only=True)
            _share_storages(tree)
        with open(path, "rb") as file:
            checksums = record_checksums(file)
    except Exception as error:  # a damaged file, or one of another format, can fail in any way
        # (Its own message may advise to load it unsafely.)
        raise UserError(
            f"{path}: torch.load(weights_only=True) does not read it ({type(error).__name__}); give a state dict in torch's "
            "zip format, .safetensors or a checkpoint folder"
        ) from None
    return TorchFile(path, tree, {name: _content(tensor, checksums) for name, _, _, tensor in _tensors(tree)})


def _share_storages(tree: Any) -> None:
    """Makes tensors that were views of one storage views of one again, so that they are saved once."""
    first: dict[int, Tensor] = {}
    for _, holder, key, tensor in list(_tensors(tree)):
        base = first.setdefault(_position(tensor), tensor)
        if base is not tensor and isinstance(holder, (dict, list)):
            holder[key] = base.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def _content(tensor: Tensor, checksums: Mapping[int, int]) -> Content:
    length, position = tensor.untyped_storage().nbytes(), _position(tensor)
    alone = tensor.is_contiguous() and length == tensor.nbytes
    return Content(position, length, tuple(tensor.shape), tensor.dtype, alone, checksums.get(position))


def _position(tensor: Tensor) -> int:
    """Where in the file the content of a tensor's storage is."""
    position = tensor.untyped_storage()._checkpoint_offset
    assert position is not None, "torch.load sets it of tensors without content"
    return position


def _tensors(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any, Tensor]]:
    """(dotted name, what holds it, its key there, tensor) of every tensor in nested dicts, lists and tuples."""
    if isinstance(tree, dict):
        items: Any = tree.items()
    else:
        items = enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    for key, value in items:
        name = f"{prefix}{key}"
        if isinstance(value, Tensor):
            yield name, tree, key, value
        else:
            yield from _tensors(value, f"{name}.")
