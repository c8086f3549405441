"""Reading distributed checkpoints (DCP folders), with errors for people, and without running what is in them."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from sseds_rec.errors import UserError

_METADATA = "torch.distributed.checkpoint.metadata"
#: What a `.metadata` file may name. Pickles can name any function to call; torch's own reader calls it.
_KNOWN = {
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((_METADATA, name) for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "TensorStorageMetadata")),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("Path", "PosixPath", "PurePosixPath")),
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of a checkpoint's metadata")


class CheckpointReader(FileSystemReader):
    """torch's reader, which unpickles nothing but what metadata consists of."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The `.metadata` file."""
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}")
        metadata.storage_meta = getattr(metadata, "storage_meta", None) or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _LoadPlanner(DefaultLoadPlanner):
    """torch's planner, which loads entries that are no tensors as `torch.load(weights_only=True)` does."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        loaded = torch.load(value, weights_only=True)
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], loaded)


def read_checkpoint_metadata(path: str | Path) -> Metadata:
    """The metadata of a DCP checkpoint.

    Raises:
        UserError: the folder is missing or holds no readable checkpoint.
    """
    try:
        return CheckpointReader(path).read_metadata()
    except FileNotFoundError:
        raise UserError(f"{path}: no checkpoint here (.metadata is missing)") from None
    except NotADirectoryError:
        raise UserError(f"{path}: is a file, not the folder of a checkpoint") from None
    except Exception as error:  # unpickling a damaged file can raise anything
        reason = str(error) if isinstance(error, pickle.UnpicklingError) else type(error).__name__
        raise UserError(f"{path}: its .metadata cannot be read ({reason}); restore the checkpoint") from None


def stored_shapes(path: str | Path) -> dict[str, list[int]]:
    """Entry name -> shape of every tensor in a checkpoint.

    Raises:
        UserError: see `read_checkpoint_metadata`.
    """
    entries = read_checkpoint_metadata(path).state_dict_metadata
    return {name: list(entry.size) for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def load_checkpoint(state: dict[str, Any], path: str | Path, advice: str = "restore it or run its stage again") -> None:
    """Fills the tensors of `state` in place from a checkpoint saved under any sharding; all ranks call it.

    Raises:
        UserError: a file of the checkpoint is missing or damaged, or an entry is not there; the message ends with `advice`.
    """
    try:
        dcp.load(state, storage_reader=CheckpointReader(path), planner=_LoadPlanner())
    except CheckpointException as error:
        raise UserError(f"{path}: the checkpoint cannot be read ({first_reason(error)}); {advice}") from None


def first_reason(error: CheckpointException) -> str:
    """One line of what went wrong on the first rank that failed."""
    first = next(iter(error.failures.values()))[0]
    return (str(first).splitlines() or [type(first).__name__])[0]
