"""A cell of the grid: one run, its config and its place on disk."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sseds_rec.compare.config import CompareConfig
from sseds_rec.compare.contestants import CONTESTANTS, Contestant, Variant
from sseds_rec.config import PAPER, Config, with_settings


@dataclass(frozen=True)
class Rates:
    """What is tuned: learning rate and embedding L2."""

    learning_rate: float
    embedding_l2: float

    def settings(self, section: str) -> dict[str, Any]:
        """As keys of a training section."""
        rate = {f"{section}.learning_rate": self.learning_rate, f"{section}.table_learning_rate": None}
        return {**rate, f"{section}.embedding_l2": self.embedding_l2}

    def __str__(self) -> str:
        return f"lr{self.learning_rate:g}-l2{self.embedding_l2:g}"


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        model: its `model.name`.
        method: of `CONTESTANTS`.
        budget: share of the embedding parameters that may stay; None for the methods that have none.
        seed: of everything in it.
        rates: of its own training: for `full` pretraining, for others retraining and what their search trains.
        base: rates of the pretrained model that it starts from, if it does.
        variant: of its method.
    """

    model: str
    method: str
    budget: float | None
    seed: int
    rates: Rates
    base: Rates | None = None
    variant: Variant = ""

    @property
    def contestant(self) -> Contestant:
        return CONTESTANTS[self.method]

    @property
    def folder(self) -> Path:
        """Its run directory, in that of the comparison."""
        method = f"{self.method}-{self.variant}" if self.variant else self.method
        start = f"-from-{self.base}" if self.base else ""
        budget = "all" if self.budget is None else f"{self.budget:g}"
        return Path("cells", self.model, method, budget, f"seed{self.seed}", f"{self.rates}{start}")

    @property
    def pretraining(self) -> Cell | None:
        """The cell whose trained model it starts from."""
        if self.base is None:
            return None
        return Cell(self.model, "full", None, self.seed, self.base)

    def leader(self, budget: float) -> Cell:
        """The cell that searches for those of all budgets, of methods that learn."""
        return replace(self, budget=budget)

    def config(self, config: Config) -> Config:
        """The config of its run."""
        section = config.compare
        settings: dict[str, Any] = {
            "model.name": self.model,
            "seed": self.seed,
            "name": "-".join(self.folder.parts[1:]),
        }
        settings |= (self.base or self.rates).settings("train")
        if self.method != "full":
            settings |= self.rates.settings("retrain")
        if self.budget is not None:
            settings["search.budget"] = {"parameters": self.budget}
        if self.method == "sseds_paper":
            settings |= {f"search.{key}": value for key, value in PAPER["search"].items()}
        if self.method == "drop_ids":
            settings["search.drop_fields"] = section.id_fields
        if self.method == "deeplight":
            settings |= {f"search.deeplight.{key}": value for key, value in asdict(self.rates).items()}
        if self.method == "pep":
            settings["search.pep.budgets"] = section.budgets
        settings["compare"] = {}
        return with_settings(config, settings | self.contestant.of_variant(self.variant))


def grid_of_rates(section: CompareConfig) -> list[Rates]:
    """All pairs that a method is tuned on."""
    return [Rates(rate, l2) for rate in section.learning_rates for l2 in section.embedding_l2]
