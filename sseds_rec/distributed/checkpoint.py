"""Reading distributed checkpoints (DCP folders), with errors for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from sseds_rec.errors import UserError


def read_checkpoint_metadata(path: str | Path) -> Metadata:
    """The metadata of a DCP checkpoint.

    Raises:
        UserError: the folder is missing or holds no readable checkpoint.
    """
    try:
        return FileSystemReader(path).read_metadata()
    except FileNotFoundError:
        raise UserError(f"{path}: no checkpoint here (.metadata is missing)") from None
    except Exception as error:  # unpickling a damaged file can raise anything
        raise UserError(
            f"{path}: its .metadata cannot be read ({type(error).__name__}); restore the checkpoint"
        ) from None


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
        dcp.load(state, checkpoint_id=path)
    except CheckpointException as error:
        raise UserError(f"{path}: the checkpoint cannot be read ({first_reason(error)}); {advice}") from None


def first_reason(error: CheckpointException) -> str:
    """One line of what went wrong on the first rank that failed."""
    first = next(iter(error.failures.values()))[0]
    return (str(first).splitlines() or [type(first).__name__])[0]
