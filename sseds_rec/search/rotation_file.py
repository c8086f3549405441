"""The rotations of a plan on disk: one `.npz` beside its JSON, which names the file and its digest."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import xxhash
from pydantic import BaseModel, ConfigDict

from sseds_rec.errors import UserError
from sseds_rec.files import open_file, write_atomic
from sseds_rec.search.rotation import Rotation

_PARTS = ("forward", "inverse", "mean")


class RotationFile(BaseModel):
    """The file that holds a plan's rotations.

    Attributes:
        file: its name, in the plan's folder.
        xxh3_64: digest of its bytes, in hexadecimal: a plan goes with the rotations it was made with, and no others.
    """

    model_config = ConfigDict(extra="forbid")

    file: str
    xxh3_64: str

    @classmethod
    def path_for(cls, plan: str | Path) -> Path:
        """Where the rotations of a plan go: `plan.rotations.npz` beside `plan.json`."""
        return Path(plan).with_suffix(".rotations.npz")

    @classmethod
    def write(cls, plan: str | Path, rotations: Mapping[str, Rotation]) -> RotationFile:
        """Writes T, M and μ of every table, in the precision they have, atomically."""
        archive = io.BytesIO()
        # The slash keeps a table's name from being one of the function's own arguments ("file").
        parts = {
            f"{name}/{part}": getattr(own, part).numpy(force=True) for name, own in rotations.items() for part in _PARTS
        }
        np.savez(archive, **parts)
        content = archive.getvalue()
        path = write_atomic(cls.path_for(plan), lambda temporary: temporary.write_bytes(content))
        return cls(file=path.name, xxh3_64=xxhash.xxh3_64_hexdigest(content))

    def read(self, plan: str | Path) -> dict[str, Rotation]:
        """Table -> rotation.

        Raises:
            UserError: the file is missing, is not the one that was written with the plan, or holds something else.
        """
        path = str(plan).removesuffix(os.path.basename(plan)) + self.file  # in a store too
        try:
            with open_file(path) as file:
                content = file.read()
        except FileNotFoundError:
            raise UserError(
                f"{path}: no such file, but {plan} needs its rotations; copy both, or search again"
            ) from None
        if xxhash.xxh3_64_hexdigest(content) != self.xxh3_64:
            raise UserError(
                f"{path}: not the rotations that {plan} was saved with (its digest differs); restore the file or search again"
            )
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as archive:
                names = dict.fromkeys(entry.rpartition("/")[0] for entry in archive.files)
                return {
                    name: Rotation(*(torch.from_numpy(archive[f"{name}/{part}"]) for part in _PARTS)) for name in names
                }
        except (ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: holds no rotations ({error}); search again") from None
