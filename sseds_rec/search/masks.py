"""What a model sees of its embeddings while columns are left out, the tables being as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from sseds_rec.errors import UserError
from sseds_rec.search.plan import DimensionPlan
from sseds_rec.search.rotation import Rotation
from sseds_rec.search.tap import Edit


def keep_only(plan: DimensionPlan, table: str) -> Edit:
    """Sets what the plan drops of a table to zero; of a rotated one, to what its mean makes of it."""
    own = plan.tables[table]
    if table in plan.rotations:
        return _project(plan.rotations[table])
    kept = set(own.kept)
    return without([c for c in range(own.original_dim) if c not in kept])


def without(columns: list[int], rotation: Rotation | None = None) -> Edit:
    """Leaves columns out, of a table whose coordinates are rotated these."""
    if rotation is not None:
        dropped = set(columns)
        others = [c for c in range(rotation.forward.shape[1]) if c not in dropped]
        return _project(rotation.keep(others))

    def masked(output: Tensor, mass: Tensor | None) -> Tensor:
        mask = torch.ones(output.shape[1], dtype=output.dtype, device=output.device)
        mask[columns] = 0
        return output * mask

    return masked


def _project(kept: Rotation) -> Edit:
    def projected(output: Tensor, mass: Tensor | None) -> Tensor:
        if mass is None:
            raise UserError("rotated tables are those of an EmbeddingBagCollection")
        forward, inverse, mean = (part.to(output.device) for part in (kept.forward, kept.inverse, kept.mean))
        still = mass[:, None] * mean
        return ((output.double() - still) @ forward @ inverse.T + still).to(output.dtype)

    return projected
