"""Who takes part in a comparison, and in what its runs differ from the config's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sseds_rec.slim.alignment import Init

#: "" is the method itself; the others start their retraining differently, or do without rescaling and so without restarts.
Variant = Literal[
    "",
    "without_ticket",
    "without_retraining",
    "without_rescaling",
    "random_transform",
    "random_transform_without_ticket",
    "random_transform_without_retraining",
    "select_transform",
    "select_transform_without_ticket",
]


@dataclass(frozen=True)
class Contestant:
    """One method.

    Attributes:
        settings: dotted config keys -> values by which its runs differ.
        pretrained: whether its search starts from the trained full model, which is then that of `full`.
        learns: whether its search trains once for all budgets.
        budgeted: whether it is run once per budget.
        transform: the start of its transform matrices, of methods whose retraining can start from the ticket; the paper's Table 2
            is made of these.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    learns: bool = False
    budgeted: bool = True
    transform: Init | None = None

    @property
    def ablations(self) -> list[Variant]:
        """What the paper's Table 2, the other start of its transform matrices and the search as we have it ask for."""
        if self.transform is None:
            return []
        # The slim stage measures what there is without retraining from `select`; from `random` a run has to.
        if self.transform == "random":
            return ["without_ticket", "without_retraining", "select_transform", "select_transform_without_ticket"]
        random: list[Variant] = [
            "random_transform", "random_transform_without_ticket", "random_transform_without_retraining"
        ]  # fmt: skip
        return ["without_ticket", "without_rescaling", *random]

    def of_variant(self, variant: Variant) -> dict[str, Any]:
        """The settings of one of its ablations, or of itself."""
        settings = dict(self.settings)
        if self.transform is not None:
            other = variant.partition("_transform")[0] if "_transform" in variant else self.transform
            settings["retrain.transform"] = other
        if variant.endswith("without_retraining"):
            settings["retrain.epochs"] = 0
        if variant.endswith("without_ticket"):
            settings["retrain.tables"] = "random"
        if variant == "without_rescaling":
            settings["search.rescale_batches"] = 0
        return settings


def _criterion(name: str) -> Contestant:
    """The scores of another criterion, allocated and retrained as ours."""
    return Contestant({"search.criterion": name}, pretrained=True)


def _method(name: str, pretrained: bool = False, learns: bool = False) -> Contestant:
    return Contestant({"search.method": name}, pretrained, learns)


#: What `--paper` sets, as dotted keys, is added by the grid: `sseds_rec.config.PAPER`.
CONTESTANTS: dict[str, Contestant] = {
    "full": Contestant(pretrained=True, budgeted=False),
    "drop_ids": Contestant({"search.method": "drop_fields", "search.budget": {"parameters": 1.0}}, budgeted=False),
    "uniform": _method("uniform"),
    "random": _criterion("random"),
    "magnitude": _criterion("magnitude"),
    "pca_energy": _criterion("pca_energy"),
    "mde": _method("mde"),
    "autodim": _method("autodim", learns=True),
    "pep": _method("pep", learns=True),
    "deeplight": _method("deeplight", pretrained=True),
    "sseds_paper": Contestant(pretrained=True, transform="random"),
    "sseds": Contestant(pretrained=True, transform="select"),
}
