"""Does a criterion tell the truth on this model? Leave-one-out (Eq. 9), exactly, for a sample of columns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from sseds_rec.errors import UserError
from sseds_rec.search.masks import without
from sseds_rec.search.plan import DimensionPlan
from sseds_rec.search.scores import DimensionScores
from sseds_rec.search.steps import LossFn, batches_of, device_of, mean_loss, sum_over_ranks
from sseds_rec.search.tap import Taps, tapped


@dataclass(frozen=True)
class Audit:
    """What leaving out single columns costs, beside what a criterion says.

    Attributes:
        columns: (table, column) of the sample; of rotated tables the column is a coordinate.
        scores: the criterion's, float64 [S].
        damage: L without the column - L with it, float64 [S]: Eq. 9 with the sign turned.
        errors: standard error of `damage` over batches, float64 [S]; zero if there was one batch.
        kept: whether the plan keeps the column, bool [S].
        loss: L, the mean loss with all columns.
        samples: rows it is a mean over.
    """

    columns: list[tuple[str, int]]
    scores: Tensor
    damage: Tensor
    errors: Tensor
    kept: Tensor
    loss: float
    samples: int

    @property
    def rank_correlation(self) -> float:
        """Spearman's, of scores and damage; 1 if the criterion orders the columns as the truth does. NaN if one of them is
        constant."""
        return self._spearman(self.damage)

    @property
    def rank_correlation_of_magnitude(self) -> float:
        """Spearman's, of scores and |damage|: what the paper's criterion estimates."""
        return self._spearman(self.damage.abs())

    @property
    def regret(self) -> float | None:
        """The share of damage avoided by the best columns of the sample, as many as the plan keeps of it, that those with the
        highest scores do not avoid: 0 if they are the best. What is best is read off the same rows, noise included. None if
        the plan keeps all of the sample or nothing."""
        count = int(self.kept.sum())
        best = float(self.damage.topk(count).values.sum())
        if not 0 < count < len(self.kept) or best <= 0:
            return None
        return (best - float(self.damage[self.scores.topk(count).indices].sum())) / best

    @property
    def significant(self) -> int:
        """How many columns' damage is more than two of its standard errors away from zero."""
        return int((self.damage.abs() > 2 * self.errors).sum())

    def _spearman(self, damage: Tensor) -> float:
        frame = pl.DataFrame({"score": self.scores.numpy(), "damage": damage.numpy()})
        found = frame.select(pl.corr("score", "damage", method="spearman")).item()
        return float("nan") if found is None else float(found)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the figures, and a list of the columns."""
        names = ("table", "column", "score", "damage", "error", "kept")
        rows = zip(self.columns, self.scores, self.damage, self.errors, self.kept, strict=True)
        columns = [
            dict(zip(names, (*column, *(value.item() for value in values)), strict=True)) for column, *values in rows
        ]
        own = {
            "rank_correlation": self.rank_correlation,
            "rank_correlation_of_magnitude": self.rank_correlation_of_magnitude,
            "regret": self.regret,
            "significant": self.significant,
            "loss": self.loss,
            "samples": self.samples,
        }
        return {name: None if value != value else value for name, value in own.items()} | {"columns": columns}


def audit_dimensions(
    model: nn.Module,
    batches: Iterable[Any],
    scores: DimensionScores,
    plan: DimensionPlan,
    *,
    columns: int = 64,
    num_batches: int | None = None,
    loss_fn: LossFn | None = None,
    seed: int = 0,
) -> Audit:
    """Masks columns one at a time, runs the model again and compares the loss with the scores; changes nothing.

    It costs (columns + 1) forward passes a batch. Like `score_dimensions` it runs on any number of ranks.

    Args:
        model, batches, num_batches, loss_fn: as `score_dimensions`.
        scores: of this model, from `score_dimensions`.
        plan: made from the scores.
        columns: how many to leave out, drawn evenly from all columns of all tables.
        seed: of the draw.

    Raises:
        UserError: no batch, no column, a plan of other tables, or a model that cannot be searched.
    """
    if columns < 1:
        raise UserError(f"columns={columns}: at least one column must be left out")
    for name in scores:
        if name not in plan.tables:
            raise UserError(f"table {name} is in the scores only; the plan is of another model")
    every = [(name, column) for name, own in scores.items() for column in range(len(own))]
    chosen = np.random.default_rng(seed).choice(len(every), min(columns, len(every)), replace=False)
    sample = [every[index] for index in sorted(chosen)]
    device = device_of(model)
    found: list[Tensor] = []
    with tapped(model) as taps, torch.no_grad():
        for batch in batches_of(islice(batches, num_batches), device):
            found.append(sum_over_ranks(_losses(model, batch, taps, scores, sample, loss_fn)).cpu())
    if not found:
        raise UserError("no batch to audit with; give at least one")
    sums = torch.stack(found)  # per batch: loss x rows without each column, with all columns, and rows
    rows = sums[:, -1]
    change = sums[:, :-2] - sums[:, -2:-1]
    damage = change.sum(0) / rows.sum()
    spread = (change - rows[:, None] * damage).square().sum(0).sqrt() / rows.sum()
    return Audit(
        columns=sample,
        scores=torch.stack([scores[table][column] for table, column in sample]),
        damage=damage,
        errors=spread * (len(found) / max(1, len(found) - 1)) ** 0.5,
        kept=torch.tensor([column in plan.tables[table].kept for table, column in sample]),
        loss=float(sums[:, -2].sum() / rows.sum()),
        samples=int(rows.sum()),
    )


def _losses(
    model: nn.Module,
    batch: Any,
    taps: Taps,
    scores: DimensionScores,
    sample: list[tuple[str, int]],
    loss_fn: LossFn | None,
) -> Tensor:
    """Loss x rows without each column of the sample, then with all, then the number of rows: float64 [S + 2]."""
    losses = []
    for edits in (*({table: without([c], scores.rotations.get(table))} for table, c in sample), {}):
        taps.clear()
        taps.edits.clear()
        taps.edits |= edits
        losses.append(mean_loss(model, batch, loss_fn).double().reshape(1))
    rows = taps.rows()
    return torch.cat([torch.cat(losses) * rows, losses[0].new_full((1,), rows)])
