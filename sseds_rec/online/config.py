"""The `online` section of a config."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class OnlineConfig(BaseModel):
    """Of `sseds online`; the windows are those in the folder `data.path`.

    Attributes:
        warm_up: the first windows, on which both models are trained before the first prediction. The last of them validates,
            and its rows score the search.
        spare: share by which tables with a vocabulary are larger than the ids of all windows there are at the beginning: room
            for the ids of windows to come.
        epochs: passes over a window once it has been predicted.
        learning_rate, table_learning_rate: of both models then; null for those of `train`.
        research_every: windows from one search to the next; null for the plan of the warm-up for ever.
        start: where the slim model of a new search starts: "slim" as the old one, carried over, "base" as the base model, cut
            by the new plan.
        returning: with start=slim, where columns that a new search brings back start: "base" as the base model has them,
            "random" as a new model's do.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    warm_up: int = Field(4, ge=2)
    spare: float = Field(0.0, ge=0, le=100)
    epochs: int = Field(1, ge=1)
    learning_rate: float | None = Field(None, gt=0)
    table_learning_rate: float | None = Field(None, gt=0)
    research_every: int | None = Field(None, ge=1)
    start: Literal["slim", "base"] = "slim"
    returning: Literal["base", "random"] = "base"
