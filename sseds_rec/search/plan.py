"""The DimensionPlan: which columns of which table stay, in which basis. Every search ends in one; all after reads only it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, InstanceOf, ValidationError, model_validator

from sseds_rec.constants import stored_dim
from sseds_rec.errors import UserError
from sseds_rec.files import read_json, write_json
from sseds_rec.search.rotation import Rotation
from sseds_rec.search.rotation_file import RotationFile

if TYPE_CHECKING:
    from torchrec.modules.embedding_configs import EmbeddingBagConfig


class TablePlan(BaseModel):
    """One table: what it was and which of its columns stay.

    Attributes:
        rows: number of embeddings n_i.
        original_dim: columns D before the search.
        kept: column indices that stay, ascending; of the rotated table, if the plan has a rotation for it.
        embedding_dim: len(kept); 0 means the table is dropped.
        stored_dim: `embedding_dim` rounded up to what the kernels take.
        saliency_kept: share of the table's own saliency that the kept columns hold.
        feature_names: features that look up this table.
        pooling: "SUM", "MEAN", or "NONE" of a table of an EmbeddingCollection.
    """

    model_config = ConfigDict(extra="forbid")

    rows: int = Field(ge=1)
    original_dim: int = Field(ge=1)
    kept: list[int]
    embedding_dim: int
    stored_dim: int
    saliency_kept: float = 0.0
    feature_names: list[str] = []
    pooling: Literal["SUM", "MEAN", "NONE"] = "SUM"

    @model_validator(mode="after")
    def _consistent(self) -> TablePlan:
        if self.kept != sorted(set(self.kept)) or any(not 0 <= c < self.original_dim for c in self.kept):
            raise ValueError(f"kept must be ascending column indices below original_dim={self.original_dim}")
        if self.embedding_dim != len(self.kept):
            raise ValueError(f"embedding_dim={self.embedding_dim} but {len(self.kept)} columns are kept")
        if self.stored_dim != stored_dim(self.embedding_dim):
            raise ValueError(
                f"stored_dim={self.stored_dim}, but {self.embedding_dim} columns are stored as {stored_dim(self.embedding_dim)}"
            )
        return self


class DimensionPlan(BaseModel):
    """Kept columns of every table, the budget asked and the budget reached.

    Attributes:
        rotations: table -> its rotation to the kept coordinates, in the order of `kept`; of tables that are cut in the basis
            they were trained in there is none.

    Example::

        plan = sr.allocate(scores, sr.Budget(parameters=0.1))
        plan.save("plan.json")
        plan.dims()  # {"user_id": 12, "hour": 4, "advertiser": 0}
    """

    model_config = ConfigDict(extra="forbid")

    version: Literal[1] = 1
    tables: dict[str, TablePlan]
    budget: dict[str, Any]
    reached: dict[str, dict[str, float | int]]
    search: dict[str, Any] = {}
    rotations: dict[str, InstanceOf[Rotation]] = Field({}, exclude=True)

    @model_validator(mode="after")
    def _rotations_fit(self) -> DimensionPlan:
        for name, rotation in self.rotations.items():
            if name not in self.tables:
                raise ValueError(f"there is a rotation of table {name}, which the plan does not have")
            d, kept = self.tables[name].original_dim, self.tables[name].embedding_dim
            found = [list(part.shape) for part in (rotation.forward, rotation.inverse, rotation.mean)]
            if found != [[d, kept], [d, kept], [d]]:
                raise ValueError(f"table {name}: its rotation is of shapes {found}, for {kept} of {d} columns")
            if not all(
                bool(torch.isfinite(part).all()) for part in (rotation.forward, rotation.inverse, rotation.mean)
            ):
                raise ValueError(f"table {name}: its rotation is not finite")
        return self

    @classmethod
    def load(cls, path: str | Path) -> DimensionPlan:
        """Reads a plan, and its rotations from the file beside it if it has any.

        Raises:
            UserError: a file is missing, is not JSON, or does not hold a consistent plan (names the first bad key); or the
                rotations are not those that were saved with the plan.
        """
        content = read_json(path)
        stored = content.pop("rotations", None) if isinstance(content, dict) else None
        try:
            if stored is not None:
                content["rotations"] = RotationFile.model_validate(stored).read(path)
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "plan"
            raise UserError(
                f"{path}: {where}: {first['msg'].removeprefix('Value error, ')}; search again or restore the file"
            ) from None

    def save(self, path: str | Path) -> None:
        """Writes the plan atomically, as JSON; rotations go to `<name>.rotations.npz` beside it, before it."""
        if self.rotations:
            stored = RotationFile.write(path, self.rotations)
            write_json(path, {**self.model_dump(), "rotations": stored.model_dump()})
        else:
            write_json(path, self.model_dump())
            RotationFile.path_for(path).unlink(missing_ok=True)  # of a plan that was here before

    def dims(self) -> dict[str, int]:
        """Table name -> number of columns kept (0: dropped)."""
        return {name: table.embedding_dim for name, table in self.tables.items()}

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The slim tables as TorchRec configs, `embedding_dim` as the kernels store it, dropped tables gone."""
        from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType  # takes seconds

        return [
            EmbeddingBagConfig(
                name=name,
                num_embeddings=table.rows,
                embedding_dim=table.stored_dim,
                feature_names=table.feature_names or [name],
                pooling=PoolingType[table.pooling],
            )
            for name, table in self.tables.items()
            if table.kept
        ]
