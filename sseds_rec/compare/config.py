"""The `compare` section of a config."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from sseds_rec.compare.contestants import CONTESTANTS

_Share = Annotated[float, Field(gt=0, le=1)]


class CompareConfig(BaseModel):
    """The `compare` section: a grid of models x methods x budgets x seeds.

    Attributes:
        methods: of `sseds_rec.compare.contestants`; "all" for all of them, `drop_ids` only where there are `id_fields`.
        budgets: shares of the embedding parameters that may stay.
        models: of `model.name`.
        seeds: how many, from the config's `seed` on.
        learning_rates, embedding_l2: the grid on which every method is tuned: all pairs, on validation AUC, at `tune_budget` and
            with the first seed.
        tune_budget: one of `budgets`; the ablations are run at it too. Null for 0.1 where that is one, or the smallest.
        id_fields: the fields that the baseline `drop_ids` does without.
        ablations: whether to run those of the paper's Table 2.
        processes: runs at a time; null for one a core, or on CUDA one a GPU.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    methods: list[str] | Literal["all"] = "all"
    budgets: list[_Share] = Field([0.5, 0.2, 0.1, 0.05], min_length=1)
    models: list[str] = Field(["fm", "deepfm", "wide_deep"], min_length=1)
    seeds: int = Field(3, ge=1)
    learning_rates: list[Annotated[float, Field(gt=0)]] = Field([1e-3, 1e-4], min_length=1)
    embedding_l2: list[Annotated[float, Field(ge=0)]] = Field([1e-3, 1e-1], min_length=1)
    tune_budget: float | None = None
    id_fields: list[str] = []
    ablations: bool = True
    processes: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _known(self) -> CompareConfig:
        for name in self.names:
            if name not in CONTESTANTS:
                raise ValueError(f"no method named {name!r}; choose some of {', '.join(CONTESTANTS)}, or all")
        if "drop_ids" in self.names and not self.id_fields:
            raise ValueError("the method drop_ids needs the fields that it does without; set compare.id_fields")
        return self

    @property
    def names(self) -> list[str]:
        """The methods, by name."""
        if self.methods == "all":
            return [name for name in CONTESTANTS if name != "drop_ids" or self.id_fields]
        return self.methods

    @field_validator("tune_budget")
    @classmethod
    def _one_of_budgets(cls, value: float | None, info: ValidationInfo) -> float | None:
        budgets = info.data.get("budgets")
        if value is not None and budgets and value not in budgets:
            raise ValueError(f"it is none of the budgets {', '.join(map(str, budgets))}")
        return value

    @property
    def tuned_at(self) -> float:
        """The budget of the trials."""
        return self.tune_budget or (0.1 if 0.1 in self.budgets else min(self.budgets))

    @field_validator("methods", "budgets", "models", "learning_rates", "embedding_l2")
    @classmethod
    def _once(cls, values: list[object] | str) -> list[object] | str:
        if not values:
            raise ValueError("name one at least")
        if len(set(values)) < len(values) and not isinstance(values, str):
            raise ValueError(f"{values} names one twice")
        return values
