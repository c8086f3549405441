"""Trains a sharded click model: epochs, validation, early stopping, resume."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn
from torchrec.optim.keyed import KeyedOptimizer

from sseds_rec.data.loader import Loader
from sseds_rec.distributed.runtime import Runtime
from sseds_rec.errors import Preempted, UserError
from sseds_rec.training.checkpoint import CheckpointStore, Progress
from sseds_rec.training.config import TrainConfig
from sseds_rec.training.metrics import evaluate
from sseds_rec.training.optimizers import RateSchedule
from sseds_rec.training.pipelines import train_pipeline
from sseds_rec.training.preemption import Requested, preemption
from sseds_rec.training.progress import History, StepReporter

#: Steps between looks at the loss: each costs an all-reduce and, on CUDA, a synchronisation.
_CHECK_STEPS = 20


#: What is done between two steps, given the number of steps so far: whether training is over.
AfterStep = Callable[[int], bool]


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
        folder: gets `history.jsonl`, `tensorboard/` and `checkpoints/`.
        runtime: of this process.
        fingerprint: of the settings that a checkpoint must have been made under.
        from_trained: whether the model may be a trained one already: then it is measured before the first step too, and is
            the best one until an epoch is better; what stops training early is its own epochs alone. Of no epochs, it is what
            is left.
        after_step: called on all ranks after every step, for searches that go on between steps of training.
        before_first: changes a trained model, on all ranks, before the first step and after it has been measured as it is.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: KeyedOptimizer,
        loaders: Loaders,
        config: TrainConfig,
        folder: Path,
        runtime: Runtime,
        fingerprint: str = "",
        from_trained: bool = False,
        after_step: AfterStep | None = None,
        before_first: Callable[[], None] | None = None,
    ) -> None:
        self.from_trained, self.after_step, self.before_first = from_trained, after_step, before_first
        self.model, self.optimizer, self.loaders, self.config, self.runtime = model, optimizer, loaders, config, runtime
        self.section = "retrain" if folder.name == "retrain" else "train"  # of the config
        self.checkpoints = CheckpointStore(
            folder / "checkpoints", runtime, config.keep_checkpoints, config.async_checkpoints, fingerprint
        )
        self.progress = Progress()
        self.reporter = StepReporter(folder.name, runtime.is_main)
        self.rates = RateSchedule(optimizer, config)
        steps = runtime.from_main(self.checkpoints.steps)
        if steps:
            self.progress = self.checkpoints.load(steps[-1], model, optimizer)
            self.reporter.line(f"resuming after step {self.progress.step}")
        self.history = History(folder, self.progress.step, runtime.is_main)

    def fit(self) -> Progress:
        """Trains until the epochs are done or validation AUC stops rising.

        Returns:
            The progress at the end; the model holds the last step's weights, `checkpoints` the best step's too.

        Raises:
            UserError: the loss is not finite (names step and learning rate).
            Preempted: a rank got SIGTERM; a checkpoint has been written.
        """
        with preemption(self.runtime) as requested:
            if self.from_trained and not self.progress.step and self.progress.best_step < 0:
                self._validate(epochs=0)
            if not self.progress.step:
                if self.before_first is not None and self.config.epochs:
                    self.before_first()
                # What it started from is to be beaten, but not by its first epochs.
                self.progress.peak_auc, self.progress.bad_epochs = -1.0, 0
            over = False
            while (
                not over
                and self.progress.epoch < self.config.epochs
                and self.progress.bad_epochs < self.config.patience
            ):
                over = self._train_epoch(requested)
                self._validate()
                if requested(wait=True):
                    self._stop()
            self.checkpoints.finish()
        return self.progress

    def _train_epoch(self, preempted: Requested) -> bool:
        """Trains on the rest of an epoch; returns whether training is over before its end."""
        loader, progress = self.loaders.train, self.progress
        loader.set_epoch(progress.epoch)
        if progress.loader:
            loader.load_state_dict(progress.loader)
        done = first = int(progress.loader.get("batch", 0))
        losses: list[torch.Tensor] = []
        self.model.train()
        over = False
        mark = time.monotonic()
        with (
            self.reporter.epoch(progress.epoch, self.config.epochs, first, len(loader)),
            train_pipeline(self.model, self.optimizer, self.runtime) as train_step,
        ):
            batches = iter(loader)
            while done < len(loader) and not over:
                self.rates.set(progress.step, progress.reductions)
                losses.append(train_step(batches)[0])
                done += 1
                progress.step += 1
                progress.samples += self.config.batch_size
                over = self.after_step is not None and self.after_step(progress.step)
                last = over or done == len(loader)  # after it comes validation, and then a checkpoint
                stop = preempted(wait=last)
                every = self.config.checkpoint_steps
                checkpoint = stop or (every is not None and progress.step % every == 0 and not last)
                if len(losses) == _CHECK_STEPS or last or checkpoint:
                    mark = self._look_at(losses, done, len(loader), mark)
                    losses.clear()
                if checkpoint:
                    progress.loader = loader.state_dict(trained=done)
                    average_batch_norm(self.model, self.runtime)
                    self.checkpoints.save(self.model, self.optimizer, progress)
                    mark = time.monotonic()
                if stop:
                    self._stop()
        return over

    def _stop(self) -> NoReturn:
        self.checkpoints.finish()
        self.reporter.line(f"stopped by SIGTERM after step {self.progress.step}; the same command goes on from there")
        raise Preempted(f"after step {self.progress.step}")

    def _look_at(self, losses: list[torch.Tensor], done: int, steps: int, mark: float) -> float:
        """Checks and reports the losses since the last look; returns the time it ended."""
        values = self.runtime.mean(torch.stack(losses).double()).cpu()
        seconds = time.monotonic() - mark
        self.progress.seconds += seconds
        self.progress.train_seconds += seconds
        bad = (~torch.isfinite(values)).nonzero()
        if len(bad):
            self.checkpoints.finish()  # the last good one may still be being written
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
            "learning_rate": self.optimizer.param_groups[0]["lr"],
        }
        self.history.add({**event, "samples_per_second": rate, "seconds": self.progress.seconds})
        return time.monotonic()

    def _validate(self, epochs: int = 1) -> None:
        """Measures the model after so many more epochs, and saves it."""
        begun, progress = time.monotonic(), self.progress
        average_batch_norm(self.model, self.runtime)
        metrics = evaluate(self.model, self.loaders.validation, self.runtime)
        progress.seconds += time.monotonic() - begun
        progress.epoch += epochs
        progress.loader = {}
        better, rises = metrics.auc > progress.best_auc, metrics.auc > progress.peak_auc
        if better:
            progress.best_auc, progress.best_step = metrics.auc, progress.step
        progress.peak_auc = max(progress.peak_auc, metrics.auc)
        progress.bad_epochs = 0 if rises else progress.bad_epochs + 1
        every = self.config.reduce_patience
        reduced = every is not None and not rises and progress.bad_epochs % every == 0
        progress.reductions += reduced
        pace = f"  {progress.samples / progress.train_seconds:,.0f} samples/s" if progress.samples else ""
        self.reporter.line(
            f"epoch {progress.epoch}/{self.config.epochs}  validation AUC {metrics.auc:.4f}  logloss {metrics.logloss:.4f}"
            f"{pace}{'  best' if better else ''}{'  learning rates reduced' if reduced else ''}"
        )
        event = {"kind": "eval", "split": "validation", "step": progress.step, "epoch": progress.epoch}
        self.history.add({**event, **metrics.as_dict(), "seconds": progress.seconds})
        self.checkpoints.save(self.model, self.optimizer, progress)


def average_batch_norm(model: nn.Module, runtime: Runtime) -> None:
    """Gives all ranks the mean of their running statistics: each has seen its own rows only, and they are one model.

    To do so in the middle of an epoch changes nothing but rounding: training does not read them, and the mean of the ranks'
    moving averages is the moving average of the ranks' means.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            assert module.running_mean is not None and module.running_var is not None
            runtime.mean(module.running_mean)
            runtime.mean(module.running_var)
