"""AutoDim (Zhao et al., AutoDim: Field-aware Embedding Dimension Search in Recommender Systems, WWW 2021).

Every field has N candidate widths d_1 < ... < d_N <= D. A supernet with full tables mixes them, and learns which to choose:

    z_n = W_n e[:d_n]                     candidate n reads the first d_n columns (weight sharing), W_n in R^{D x d_n}
    ẽ_n = (z_n - E z_n) / sqrt(V z_n + ε) batch norm, so that no candidate counts more by its size
    p_n = exp((log α_n + g_n) / τ) / Σ_m exp((log α_m + g_m) / τ),    g = -log(-log u), u uniform in (0, 1)
    ē   = Σ_n p_n ẽ_n                     what the model sees instead of e
    τ   = max(0.01, 1 - 0.00005 t)        after t steps

The weights (tables, W, the model) follow the training loss, α follows the validation loss, one step of Adam after every `every`
steps of training, by the gradient at the weights of that moment (the first-order approximation of DARTS). In the end every
field takes its candidate of largest α, and the model is trained from scratch with one linear map per table, here the transform
matrices. AutoDim drops no table and knows no budget: if the choice is too large, that of the highest product of probabilities
Π_i p_i that the budget holds is taken instead (`allocate_autodim`).

Batch norm of a linear map is linear in e: with C the covariance of e in the batch, V z_n = diag(W_n C_n W_nᵀ), C_n its corner of
d_n columns. So the mixture of a field is one matrix, M = Σ_n p_n diag(V z_n + ε)^-½ W_n, and no candidate's output is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.adam import adam
from torchrec.sparse.jagged_tensor import KeyedTensor

from sseds_rec.errors import UserError
from sseds_rec.search import knapsack
from sseds_rec.search.budget import Budget
from sseds_rec.search.keeping import plan_keeping
from sseds_rec.search.plan import DimensionPlan
from sseds_rec.search.scores import Table

#: Of batch norm, as PyTorch's.
_EPSILON = 1e-5
_BETAS = (0.9, 0.999)


class AutodimConfig(BaseModel):
    """The `search.autodim` section of a config.

    Attributes:
        widths: the candidates; null for D/16, D/4, D/2, 3D/4 and D, which are the paper's 2, 8, 16, 24 and 32 at D = 32.
        epochs: of the supernet's training; there is no early stopping.
        every: training steps for one of α; the paper has 10, and some hundred times as many steps as a small set.
        learning_rate: of α.
        annealing: by how much the temperature falls with every step, from 1 down to .01.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    widths: list[PositiveInt] | None = Field(None, min_length=2)
    epochs: int = Field(6, ge=1)
    every: int = Field(2, ge=1)
    learning_rate: float = Field(0.01, gt=0)
    annealing: float = Field(5e-5, ge=0)

    @field_validator("widths")
    @classmethod
    def _ascending(cls, widths: list[int] | None) -> list[int] | None:
        if widths is not None and widths != sorted(set(widths)):
            raise ValueError(f"{widths} are not ascending")
        return widths

    def candidates(self, dim: int) -> list[int]:
        """The widths to choose from in a table of `dim` columns.

        Raises:
            UserError: one is wider than the table.
        """
        if self.widths is None:
            return sorted({max(1, dim * share // 16) for share in (1, 4, 8, 12, 16)})
        if self.widths[-1] > dim:
            raise UserError(
                f"search.autodim.widths: {self.widths[-1]} is above model.embedding_dim={dim}; leave it out"
            )
        return self.widths


class Mixture(nn.Module):
    """The mixed candidates of F fields: KeyedTensor of F x D -> the same keys and widths.

    Batch norm takes the statistics of the batch, and of this rank's rows, in evaluation as well. log α and its Adam moments are
    buffers: no optimizer of the model moves them, and a checkpoint of the model has them. The noise is a function of the seed
    and the step, so that all ranks draw the same, and a resumed search what an uninterrupted one would.

    Args:
        fields: keys of the embeddings, in the order of α.
        dim: D.
        widths: the N candidates, ascending.
        annealing: see `AutodimConfig`.
        seed: of the noise.

    Attributes:
        step: t; set it after each step of training.
        log_alpha: [F, N]; uniform at first.
    """

    log_alpha: Tensor
    moments: Tensor

    def __init__(self, fields: Sequence[str], dim: int, widths: Sequence[int], annealing: float, seed: int) -> None:
        super().__init__()
        self.fields, self.dim, self.annealing, self.seed = list(fields), dim, annealing, seed
        self.step = 0
        self.register_buffer("log_alpha", torch.zeros(len(fields), len(widths)))
        self.register_buffer("moments", torch.zeros(2, len(fields), len(widths)))
        self.transforms = nn.ParameterList(torch.empty(len(fields), dim, width) for width in widths)
        for width, transform in zip(widths, self.transforms, strict=True):
            for of_field in transform:  # rows of length 1 on average: all candidates start with equal variance
                nn.init.orthogonal_(of_field, gain=math.sqrt(dim / width))
        self.scale = nn.Parameter(torch.tensor((len(fields) ** 2 * dim / 2) ** -0.25))
        self._leaf: Tensor | None = None

    @property
    def temperature(self) -> float:
        """τ."""
        return max(0.01, 1 - self.annealing * self.step)

    def probabilities(self) -> Tensor:
        """What is learned, softmax(log α): [F, N]."""
        return self.log_alpha.softmax(dim=1)

    def forward(self, embeddings: KeyedTensor) -> KeyedTensor:
        keys, values = embeddings.keys(), embeddings.values()
        if self._leaf is not None:
            values = values.detach()
        centred: Tensor = _Centred.apply(values, self.dim)  # [F, B, D], in the order of the keys
        covariance: Tensor = _Covariance.apply(centred)
        there = torch.tensor([self.fields.index(key) for key in keys], device=values.device)
        mixed = self._mixed(covariance[there.argsort()])[there]
        seen = (centred @ mixed.transpose(1, 2)).transpose(0, 1).reshape(values.shape)
        return KeyedTensor(keys, embeddings.length_per_key(), seen)

    @contextmanager
    def searching(self) -> Iterator[Tensor]:
        """In the block the output depends on the yielded leaf log α [F, N], and not on the tables."""
        self._leaf = self.log_alpha.clone().requires_grad_()
        try:
            yield self._leaf
        finally:
            self._leaf = None

    def update(self, gradient: Tensor, learning_rate: float, number: int) -> None:
        """Adam's step number `number`, from 1, of log α by a gradient [F, N]."""
        first, second = self.moments
        adam(
            [self.log_alpha],
            [gradient],
            [first],
            [second],
            [],
            [torch.tensor(float(number - 1))],
            amsgrad=False,
            beta1=_BETAS[0],
            beta2=_BETAS[1],
            lr=learning_rate,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )

    def _mixed(self, covariance: Tensor) -> Tensor:
        """M [F, D, D] of the fields, given the covariance of their columns [F, D, D]."""
        mixed = torch.zeros_like(covariance)
        for share, transform in zip(self.shares().unbind(1), self.transforms, strict=True):
            width = transform.shape[2]
            variance = (transform @ covariance[:, :width, :width] * transform).sum(dim=2)
            weights = share[:, None] * (variance + _EPSILON).rsqrt()
            mixed = mixed + F.pad(weights[:, :, None] * transform, (0, self.dim - width))
        return self.scale * mixed

    def shares(self) -> Tensor:
        """p [F, N]: with noise in training and in search, which draw different ones; without in evaluation."""
        if self._leaf is None and not self.training:
            return self.probabilities()
        log_alpha = self.log_alpha if self._leaf is None else self._leaf
        drawn = np.random.default_rng([self.seed, self.step, int(self._leaf is not None)]).gumbel(size=log_alpha.shape)
        noise = torch.from_numpy(drawn).to(log_alpha)
        return ((log_alpha + noise) / self.temperature).softmax(dim=1)


class _Centred(torch.autograd.Function):
    """Values [B, F·D] less their means, field by field [F, B, D]: batched products read them twice as fast that way."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, dim: int) -> Tensor:
        by_field = values.view(len(values), -1, dim).transpose(0, 1)
        return by_field.contiguous().sub_(by_field.mean(dim=1, keepdim=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        of_values = gradient - gradient.mean(dim=1, keepdim=True)
        return of_values.transpose(0, 1).reshape(gradient.shape[1], -1), None


class _Covariance(torch.autograd.Function):
    """X [F, B, D], centred -> XᵀX / B [F, D, D], whose gradient takes one batched product; autograd makes it two."""

    @staticmethod
    def forward(ctx: Any, centred: Tensor) -> Tensor:
        ctx.save_for_backward(centred)
        return centred.transpose(1, 2) @ centred / centred.shape[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (centred,) = ctx.saved_tensors
        return centred @ ((gradient + gradient.transpose(1, 2)) / centred.shape[1])


def allocate_autodim(
    tables: Mapping[str, Table],
    probabilities: Mapping[str, np.ndarray],
    budget: Budget,
    config: AutodimConfig,
) -> DimensionPlan:
    """The most probable widths, or of those that the budget holds the most probable together.

    Args:
        tables: name -> rows and columns of the full table.
        probabilities: table -> of its candidates, float64 [N].
        budget: what may stay, counted in parameters, bytes or dims.
        config: the candidates.

    Raises:
        UserError: see `check_autodim`.
    """
    check_autodim(tables, budget, config)
    facts = list(tables.values())
    limit = budget.limit(facts)
    widths = [config.candidates(table.dim) for table in facts]
    most = max(map(len, widths))
    costs, values = np.zeros((len(facts), most), np.int64), np.full((len(facts), most), -np.inf)
    for row, (name, table) in enumerate(tables.items()):
        own = budget.costs(table, np.array(widths[row]))
        costs[row] = np.append(own, np.repeat(own[-1], most - len(own)))
        values[row, : len(own)] = np.log(np.maximum(probabilities[name], np.finfo(np.float64).tiny))
    rows = np.arange(len(facts))
    likeliest = values.argmax(axis=1)
    wanted = int(costs[rows, likeliest].sum())
    found: dict[str, Any] = {"choice": "argmax"}
    options = likeliest
    if wanted > limit:
        smallest = int(costs[:, 0].sum())
        choice = knapsack.solve(costs - costs[:, :1], values - values[:, :1], limit - smallest)
        options = choice.options
        found = {"choice": "most probable within the budget", "argmax_cost": wanted}
        found |= {"knapsack_gap": choice.gap} if choice.gap else {}
    found["log_probability"] = float(values[rows, options].sum())
    kept = {name: range(widths[row][options[row]]) for row, name in enumerate(tables)}
    return plan_keeping(tables, kept, budget, {"method": "autodim", **config.model_dump(), **found})


def check_autodim(tables: Mapping[str, Table], budget: Budget, config: AutodimConfig) -> None:
    """Refuses what no search could make possible.

    Raises:
        UserError: a candidate is wider than its table, or the budget does not hold the smallest of every table.
    """
    facts = list(tables.values())
    smallest = [config.candidates(table.dim)[0] for table in facts]
    need, limit = budget.cost(facts, smallest), budget.limit(facts)
    if need > limit:
        raise UserError(
            f"search.method=autodim: the smallest candidates, {max(smallest)} columns of every table, cost {need:,}, the budget "
            f"is {limit:,}; raise it, or begin search.autodim.widths with a smaller one"
        )
