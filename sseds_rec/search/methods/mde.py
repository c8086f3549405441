"""MDE: mixed dimension embeddings (Ginart et al., Mixed Dimension Embeddings with Application to Memory-Efficient
Recommendation Systems, 2019), Algorithm 2: the width of a table is a power of its popularity.

    d_i = λ p_i^α

p_i is the probability that a look-up of field i finds a given one of its rows: 1/n_i, or, with `popularity: traffic`, one over
the number of rows that would share its training traffic evenly, (Σ_v c_v)² / Σ_v c_v² of the counts c_v. The temperature α is
the method's parameter (0: uniform; the paper's best lie between .2 and .4), and λ is solved for the budget. Widths are rounded
down, to powers of two if asked, and lie in [1, D_i]: MDE drops no table. The model is trained from scratch with a projection of
each table to the widest width, which here are the transform matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from sseds_rec.errors import UserError
from sseds_rec.search.budget import Budget
from sseds_rec.search.keeping import plan_keeping
from sseds_rec.search.plan import DimensionPlan
from sseds_rec.search.scores import Table


class MdeConfig(BaseModel):
    """The `search.mde` section of a config.

    Attributes:
        temperature: α.
        popularity: "rows" takes p_i = 1/n_i; "traffic" the counts of the training split, where the set has them.
        rounding: "down" to whole columns, or to a power of two ("power_of_two").
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    temperature: float = Field(0.3, ge=0, le=1)
    popularity: Literal["rows", "traffic"] = "rows"
    rounding: Literal["down", "power_of_two"] = "down"


def allocate_mde(
    tables: Mapping[str, Table], budget: Budget, config: MdeConfig, shared_by: Mapping[str, float] | None = None
) -> DimensionPlan:
    """The power-law plan of the largest λ that the budget holds.

    Args:
        tables: name -> rows and columns of the full table.
        budget: what may stay, counted in parameters, bytes or dims.
        config: temperature and rounding.
        shared_by: table -> 1/p_i, of tables where that is not n_i.

    Raises:
        UserError: the budget does not hold one column of every table.
    """
    facts = list(tables.values())
    limit = budget.limit(facts)
    sizes = np.array([(shared_by or {}).get(name, table.rows) for name, table in tables.items()], np.float64)
    most = np.array([table.dim for table in facts])
    powers = sizes**-config.temperature

    def widths(scale: float) -> np.ndarray:
        dims = np.clip(scale * powers, 1, most)
        if config.rounding == "power_of_two":
            dims = 2 ** np.floor(np.log2(dims))
        return np.floor(dims + 1e-9).astype(np.int64)  # the scale of exactly 8 columns may be that of 7.999

    def fits(scale: float) -> bool:
        return budget.cost(facts, widths(scale).tolist()) <= limit

    if not fits(0.0):
        need = budget.cost(facts, [1] * len(facts))
        raise UserError(
            f"search.method=mde: one column of every table costs {need:,}, the budget is {limit:,}; raise it"
        )
    # Every scale at which a width changes: the largest that fits is found exactly, among them.
    steps = np.unique(np.concatenate([np.arange(1, d + 1) / power for d, power in zip(most, powers, strict=True)]))
    low, high = -1, len(steps)  # fits at low, not at high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(steps[middle]) else (low, middle)
    scale = float(steps[low]) if low >= 0 else 0.0
    kept = {name: list(range(d)) for name, d in zip(tables, widths(scale).tolist(), strict=True)}
    return plan_keeping(tables, kept, budget, {"method": "mde", "scale": scale, **config.model_dump()})
