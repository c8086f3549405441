"""Trains a sharded click model: epochs, validation, early stopping, resume."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torchrec.optim.keyed import KeyedOptimizer

from sseds_rec.data.loader import Loader
from sseds_rec.distributed.runtime import Runtime
from sseds_rec.errors import UserError
from sseds_rec.training.checkpoint import CheckpointStore, Progress
from sseds_rec.training.metrics import evaluate
from sseds_rec.training.optimizers import TableOptimizer
from sseds_rec.training.progress import History, StepReporter

#: Steps between looks at the loss: each costs an all-reduce and, on CUDA, a synchronisation.
_CHECK_STEPS = 20


class TrainConfig(BaseModel):
    """The `train` section of a config; the defaults are the paper's (Section 4.1.3).

    Attributes:
        epochs: at most.
        batch_size: rows a step over all ranks.
        learning_rate: Adam's, for dense parameters.
        table_optimizer: what trains the embedding tables.
        table_learning_rate: its learning rate; null for `learning_rate`.
        embedding_l2: λ of λ/2 · mean_b Σ_i ||e_bi||² over the batch's embeddings.
        patience: epochs without a better validation AUC after which training stops.
        checkpoint_steps: steps between checkpoints; null for one an epoch.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    epochs: int = Field(10, ge=1, strict=True)
    batch_size: int = Field(2048, ge=1, strict=True)
    learning_rate: float = Field(1e-3, gt=0)
    table_optimizer: TableOptimizer = "adam"
    table_learning_rate: float | None = Field(None, gt=0)
    embedding_l2: float = Field(0.0, ge=0)
    patience: int = Field(2, ge=1)
    checkpoint_steps: int | None = Field(None, ge=1)


@dataclass(frozen=True)
class Loaders:
    """Training rows, shuffled, and validation rows, in order."""

    train: Loader
    validation: Loader


class Trainer:
    """Trains one model in one folder, from the last checkpoint there if there is one.

    Args:
        model: sharded; Batch -> (loss, (loss, logits, labels)).
        optimizer: over all its parameters.
        loaders: of this rank.
        config: the `train` section.
        folder: gets `history.jsonl` and `checkpoints/`.
        runtime: of this process.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: KeyedOptimizer,
        loaders: Loaders,
        config: TrainConfig,
        folder: Path,
        runtime: Runtime,
    ) -> None:
        self.model, self.optimizer, self.loaders, self.config, self.runtime = model, optimizer, loaders, config, runtime
        self.section = "train" if folder.name == "pretrain" else folder.name
        self.checkpoints = CheckpointStore(folder / "checkpoints", runtime)
        self.progress = Progress()
        self.reporter = StepReporter(folder.name, runtime.is_main)
        steps = self.checkpoints.steps()
        runtime.barrier()  # every rank has looked before rank 0 changes anything
        if steps:
            self.progress = self.checkpoints.load(steps[-1], model, optimizer)
            self.reporter.line(f"resuming after step {self.progress.step}")
        self.history = History(folder / "history.jsonl", self.progress.step, runtime.is_main)

    def fit(self) -> Progress:
        """Trains until the epochs are done or validation AUC stops rising.

        Returns:
            The progress at the end; the model holds the last step's weights, `checkpoints` the best step's too.

        Raises:
            UserError: the loss is not finite (names step and learning rate).
        """
        while self.progress.epoch < self.config.epochs and self.progress.bad_epochs < self.config.patience:
            self._train_epoch()
            self._validate()
        return self.progress

    def _train_epoch(self) -> None:
        loader, progress = self.loaders.train, self.progress
        loader.set_epoch(progress.epoch)
        if progress.loader:
            loader.load_state_dict(progress.loader)
        done = first = int(progress.loader.get("batch", 0))
        losses: list[torch.Tensor] = []
        self.model.train()
        mark = time.monotonic()
        with self.reporter.epoch(progress.epoch, self.config.epochs, first, len(loader)):
            for batch in loader:
                self.optimizer.zero_grad()
                loss, (reported, _, _) = self.model(batch.to(self.runtime.device, non_blocking=True))
                loss.backward()
                self.optimizer.step()
                losses.append(reported)
                done += 1
                progress.step += 1
                progress.samples += self.config.batch_size
                checkpoint = (
                    self.config.checkpoint_steps
                    and progress.step % self.config.checkpoint_steps == 0
                    and done < len(loader)
                )
                if len(losses) == _CHECK_STEPS or done == len(loader) or checkpoint:
                    mark = self._look_at(losses, done, len(loader), mark)
                    losses.clear()
                if checkpoint:
                    progress.loader = loader.state_dict()
                    self.checkpoints.save(self.model, self.optimizer, progress)
                    mark = time.monotonic()

    def _look_at(self, losses: list[torch.Tensor], done: int, steps: int, mark: float) -> float:
        """Checks and reports the losses since the last look; returns the time it ended."""
        values = self.runtime.mean(torch.stack(losses).double()).cpu()
        seconds = time.monotonic() - mark
        self.progress.seconds += seconds
        self.progress.train_seconds += seconds
        bad = (~torch.isfinite(values)).nonzero()
        if len(bad):
            step = self.progress.step - len(losses) + int(bad[0]) + 1
            raise UserError(
                f"the loss is {float(values[bad[0]])} at step {step} with {self.section}.learning_rate="
                f"{self.config.learning_rate:g}; lower it"
            )
        rate = len(losses) * self.config.batch_size / seconds
        self.reporter.step(done, float(values.mean()), rate)
        event = {
            "kind": "train",
            "step": self.progress.step,
            "epoch": self.progress.epoch + done / steps,
            "loss": float(values.mean()),
        }
        self.history.add({**event, "samples_per_second": rate, "seconds": self.progress.seconds})
        return time.monotonic()

    def _validate(self) -> None:
        begun, progress = time.monotonic(), self.progress
        average_batch_norm(self.model, self.runtime)
        metrics = evaluate(self.model, self.loaders.validation, self.runtime)
        progress.seconds += time.monotonic() - begun
        progress.epoch += 1
        progress.loader = {}
        better = metrics.auc > progress.best_auc
        if better:
            progress.best_auc, progress.best_step, progress.bad_epochs = metrics.auc, progress.step, 0
        else:
            progress.bad_epochs += 1
        self.reporter.line(
            f"epoch {progress.epoch}/{self.config.epochs}  validation AUC {metrics.auc:.4f}  logloss {metrics.logloss:.4f}"
            f"  {progress.samples / progress.train_seconds:,.0f} samples/s{'  best' if better else ''}"
        )
        event = {"kind": "eval", "split": "validation", "step": progress.step, "epoch": progress.epoch}
        self.history.add({**event, "auc": metrics.auc, "logloss": metrics.logloss, "seconds": progress.seconds})
        self.checkpoints.save(self.model, self.optimizer, progress)


def average_batch_norm(model: nn.Module, runtime: Runtime) -> None:
    """Gives all ranks the mean of their running statistics: each has seen its own rows only, and they are one model."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            assert module.running_mean is not None and module.running_var is not None
            runtime.mean(module.running_mean)
            runtime.mean(module.running_var)
