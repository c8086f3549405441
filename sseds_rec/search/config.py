"""The `search` section of a config."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from sseds_rec.search.allocate import Order, allocate
from sseds_rec.search.budget import Budget
from sseds_rec.search.criteria import CRITERIA
from sseds_rec.search.methods.autodim import AutodimConfig
from sseds_rec.search.methods.deeplight import DeepLightConfig
from sseds_rec.search.methods.mde import MdeConfig
from sseds_rec.search.methods.pep import PepConfig
from sseds_rec.search.plan import DimensionPlan
from sseds_rec.search.rules import TableRule
from sseds_rec.search.scores import DimensionScores

Method = Literal["sseds", "uniform", "mde", "autodim", "pep", "deeplight", "drop_fields"]


class SearchConfig(BaseModel):
    """The `search` section.

    Attributes:
        method: how columns are chosen. "sseds" scores those of the trained model (the keys from `criterion` to `split`, and
            the allocation's); the others are in `sseds_rec.search.methods` and have their settings under their own name.
        criterion: one of `sseds_rec.search.criteria`; "snip" is the paper's. Null for "ggn_rotated", or "ggn" where tables
            cannot be rotated: of models that multiply raw columns, and of fields of raw ids.
        batch_size: rows of a batch to score, of all ranks together; null for `train.batch_size`.
        num_batches: batches to score with, at most; "auto" for as many as the plan needs. Their scores tell what others would.
        rescale_batches: batches of the same kind by which rotated tables are scaled as unseen rows would have them, and their
            scores with them (`sseds_rec.rescale`); 0 for none.
        rounds: scorings, each with the columns masked that the one before would drop, on the way to the budget.
        split: where batches come from; held-out rows by default.
        budget: what may stay.
        multiple, min_dim, exponent, order, floor_share, tables: see `sseds_rec.allocate`.
        drop_fields: of the method of that name: fields whose tables are dropped, the others keep all columns.
        mde: see `MdeConfig`.
        autodim: see `AutodimConfig`.
        pep: see `PepConfig`.
        deeplight: see `DeepLightConfig`.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    method: Method = "sseds"
    criterion: str | None = None
    batch_size: int | None = Field(512, ge=1)
    num_batches: int | Literal["auto"] = 4
    rescale_batches: int = Field(64, ge=0)
    rounds: int = Field(1, ge=1)
    split: Literal["train", "validation"] = "validation"
    budget: Budget = Budget(parameters=0.1)
    multiple: int = Field(4, ge=1)
    min_dim: int = Field(0, ge=0)
    exponent: float = Field(0.5, ge=0, le=1)
    order: Order = "knapsack"
    floor_share: float = Field(0.0, ge=0, le=1)
    tables: dict[str, TableRule] = {}
    drop_fields: list[str] = []
    mde: MdeConfig = MdeConfig()
    autodim: AutodimConfig = AutodimConfig()
    pep: PepConfig = PepConfig()
    deeplight: DeepLightConfig = DeepLightConfig()

    @field_validator("criterion")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value not in (None, *CRITERIA):
            raise ValueError(f"no criterion named {value!r}; choose one of {', '.join(CRITERIA)}")
        return value

    @field_validator("num_batches", mode="before")
    @classmethod
    def _positive(cls, value: Any) -> Any:
        if value != "auto" and not (type(value) is int and value > 0):
            raise ValueError("it is a number from 1 on, or auto")
        return value

    def allocate(self, scores: DimensionScores, budget: Budget) -> DimensionPlan:
        """`sseds_rec.allocate` with these settings."""
        options = {"multiple", "min_dim", "exponent", "order", "floor_share"}
        return allocate(scores, budget, tables=self.tables, **self.model_dump(include=options))
