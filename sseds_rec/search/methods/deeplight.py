"""DeepLight (Deng et al., DeepLight: Deep Lightweight Feature Interactions for Accelerating CTR Predictions in Ad Serving, WSDM
2021), of embedding tables only, as the SSEDS paper compares with it: magnitude pruning while a trained model trains on.

After k steps the share of elements that are zero is

    S (1 - D^(k/u))

with S the share that the budget leaves to prune. Every few steps, and after each epoch, the smallest magnitudes of all tables
*together* are set to zero, as in the authors' code. Nothing holds them there: between two prunings a pruned element may come
back, and stays if it has grown large enough. The scheduled number is rounded down and pruned exactly, ties included; after the
last step it is the number asked for, which the schedule itself only approaches. (The authors' threshold is right to 1e-4.)

D = .99 and u = 100 are theirs, for Criteo's 20,000 steps an epoch: after 30,000 steps 95 % of S are pruned. Of a set with a few
hundred steps in all, choose u so that D^(k/u) is small long before the end; else the last pruning does almost everything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from sseds_rec.search.elements import Elements


class DeepLightConfig(BaseModel):
    """The `search.deeplight` section of a config.

    Attributes:
        epochs: of training with pruning.
        learning_rate, embedding_l2: of that training; null for those of `train`.
        damping: D.
        damping_steps: u.
        every: steps between two prunings.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    epochs: int = Field(2, ge=1)
    learning_rate: float | None = Field(None, gt=0)
    embedding_l2: float | None = Field(None, ge=0)
    damping: float = Field(0.99, gt=0, lt=1)
    damping_steps: float = Field(100.0, gt=0)
    every: int = Field(10, ge=1)


@dataclass(frozen=True)
class Pruning:
    """Prunes by the schedule, between steps of training.

    Attributes:
        elements: of the model that is trained.
        keep: elements that stay in the end.
        config: the schedule.
        epoch_steps: steps of an epoch.
    """

    elements: Elements
    keep: int
    config: DeepLightConfig
    epoch_steps: int

    def __call__(self, step: int) -> bool:
        """After step number `step`, from 1; never ends the training."""
        if step % self.config.every == 0 or step % self.epoch_steps == 0:
            self.elements.keep_largest(self.elements.total - self.scheduled(step))
        return False

    def scheduled(self, step: int) -> int:
        """Elements that are zero after a pruning at this step."""
        pruned = self.elements.total - self.keep
        if step >= self.config.epochs * self.epoch_steps:
            return pruned
        return math.floor(pruned * (1 - self.config.damping ** (step / self.config.damping_steps)))
