"""PEP: plug-in embedding pruning (Liu et al., Learnable Embedding Sizes for Recommender Systems, ICLR 2021): thresholds that are
learned with the weights.

    S(v, s) = sign(v) · relu(|v| - σ(s))

stands for every element v of a table; what is below the threshold σ(s) is zero, and gets no gradient from the loss. s is one
number for all ("global"), one for each column of all tables ("dimension"), or one for each table ("field"). It starts so low that
nothing is pruned, and rises since its weight decay pulls it to 0, where the threshold is one half; where pruning hurts, the loss
pulls it back. So no budget is asked for. The sparsity passes one after the other, and what is left when it first does is its
mask. The model is then trained again with this mask, from the weights that the search had started with: the lottery ticket.

Of a table with one id a bag, S of its output is the look-up in S of the table, so that the tables need not know; their sizes
and places do not matter. What is pruned is counted in the tables.

Where the authors' defaults are usable they are ours: Adam of learning rate .001 for s, with a weight decay of 1e-5 in the
gradient, as their code has it, and s = -15 at the start (-150 for Criteo and Avazu, where they have one s for each element,
which would be another table of this size and is not offered). Adam takes steps of its learning rate whatever the size of the
gradient, so that s takes some 12,000 steps from -15 to where thresholds begin to matter. Sets of a few hundred steps an epoch
need a higher `start` and `learning_rate`, and a `weight_decay` that the noise of the loss's gradient does not drown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedTensor

from sseds_rec.search.budget import Budget
from sseds_rec.search.elements import Elements, Part

Granularity = Literal["global", "dimension", "field"]


class PepConfig(BaseModel):
    """The `search.pep` section of a config.

    Attributes:
        granularity: what shares a threshold.
        epochs: of the search, at most; it ends when the smallest budget is reached.
        start: s at the start.
        learning_rate: of s, with Adam.
        weight_decay: of s, as λ s in its gradient.
        every: steps between two counts of what is left.
        budgets: further shares or numbers of parameters whose masks the search keeps on its way, beside `search.budget`.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    granularity: Granularity = "field"
    epochs: int = Field(10, ge=1)
    start: float = -15.0
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(1e-5, ge=0)
    every: int = Field(1, ge=1)
    budgets: list[int | float] = []

    @field_validator("budgets")
    @classmethod
    def _of_parameters(cls, budgets: list[int | float]) -> list[int | float]:
        for value in budgets:
            Budget(parameters=value)
        return budgets

    def optimizer(self, thresholds: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """What trains s."""
        return torch.optim.Adam(thresholds, lr=self.learning_rate, weight_decay=self.weight_decay)


class SoftThreshold(nn.Module):
    """KeyedTensor of F features of D columns -> the same with S(v, s) of every element v.

    Args:
        tables: feature -> its table; it has one id in each bag.
        dim: D, of all tables.
        granularity: see `PepConfig`.
        start: of s.

    Attributes:
        s: [1, 1], [1, D] or [tables, 1].
    """

    def __init__(self, tables: Mapping[str, str], dim: int, granularity: Granularity, start: float) -> None:
        super().__init__()
        self.tables = dict(tables)
        self.index = {table: position for position, table in enumerate(dict.fromkeys(tables.values()))}
        self.dim = dim
        shapes = {"global": (1, 1), "dimension": (1, dim), "field": (len(self.index), 1)}
        self.s = nn.Parameter(torch.full(shapes[granularity], start))

    def thresholds(self) -> Tensor:
        """σ(s) for each table and column, [tables, D]."""
        return torch.sigmoid(self.s).expand(len(self.index), self.dim)

    def forward(self, embeddings: KeyedTensor) -> KeyedTensor:
        thresholds, keys = self.thresholds(), embeddings.keys()
        own = torch.cat([thresholds[self.index[self.tables[key]]] for key in keys])
        return KeyedTensor(keys, embeddings.length_per_key(), soft_threshold(embeddings.values(), own))

    @torch.no_grad()
    def left(self, elements: Elements) -> int:
        """Elements of all tables above their thresholds."""
        thresholds = self.thresholds()
        return sum(elements.count(lambda part: (part.values.abs() > self._of(part, thresholds)).sum()).values())

    @torch.no_grad()
    def apply_to(self, elements: Elements) -> None:
        """Turns the tables into what the model sees of them."""
        thresholds = self.thresholds()
        for part in elements.parts:
            part.values.copy_(soft_threshold(part.values, self._of(part, thresholds)))

    def _of(self, part: Part, thresholds: Tensor) -> Tensor:
        """Of a part's columns."""
        return thresholds[self.index[part.table]].narrow(0, part.first_column, part.values.shape[1])


def soft_threshold(values: Tensor, thresholds: Tensor) -> Tensor:
    """sign(v) · relu(|v| - t) of values [..., D] and thresholds [D]."""
    return torch.sign(values) * torch.relu(values.abs() - thresholds)
