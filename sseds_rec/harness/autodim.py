"""AutoDim: the supernet trained by the same trainer, α moved between its steps. See `sseds_rec.search.methods.autodim`."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torchrec.distributed.model_parallel import DistributedModelParallel

from sseds_rec.data.batch import Batch
from sseds_rec.data.loader import Loader
from sseds_rec.distributed.runtime import Runtime
from sseds_rec.distributed.undisturbed import undisturbed
from sseds_rec.errors import UserError
from sseds_rec.files import open_file, read_json, write_json
from sseds_rec.harness.scratch import FromScratch
from sseds_rec.models import build_model, names_in_scores
from sseds_rec.run_directory import fingerprint
from sseds_rec.search.config import SearchConfig
from sseds_rec.search.methods.autodim import AutodimConfig, Mixture, allocate_autodim, check_autodim
from sseds_rec.search.plan import DimensionPlan
from sseds_rec.search.scores import Table, save_arrays
from sseds_rec.training.optimizers import build_optimizer
from sseds_rec.training.trainer import Loaders, Trainer


class Autodim(FromScratch):
    """Learns probabilities of widths into `search/learned/`, which no budget changes, and takes the likeliest that fit.

    Raises:
        UserError: see `FromScratch` and `check_autodim`.
    """

    def search(self) -> dict[str, Any]:
        """Leaves `search/learned/` unless it is there, and `search/plan.json`."""
        learned = self._learned()
        begun = time.monotonic()
        plan = self.runtime.from_main(lambda: self.allocate(self.tables()))
        return self._found(plan, learned["seconds"] + time.monotonic() - begun, learned["updates"])

    def allocate(self, tables: dict[str, Table]) -> DimensionPlan:
        path = self.run.path("search", "learned", "probabilities.npz")
        try:
            with open_file(path) as file, np.load(file) as stored:
                probabilities = {name: stored[name] for name in tables}
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            raise UserError(f"{path}: cannot be read ({error}); remove {path.parent} and search again") from None
        return allocate_autodim(tables, probabilities, self.budget, self.config.search.autodim)

    def _check_search(self) -> None:
        super()._check_search()
        check_autodim(self.tables(), self.budget, self.config.search.autodim)

    def _learned(self) -> dict[str, Any]:
        """The metrics of what was learned, now or earlier.

        Raises:
            UserError: it was learned under other settings.
        """
        folder = self.run.path("search", "learned")
        if not self.runtime.from_main((folder / "metrics.json").exists):
            self._learn()
        self.runtime.on_main(lambda: shutil.rmtree(folder / "checkpoints", ignore_errors=True))
        metrics: dict[str, Any] = self.runtime.from_main(lambda: read_json(folder / "metrics.json"))
        if metrics["fingerprint"] != self._marks():
            raise UserError(f"{folder}: it was learned under another config; remove it, or choose another --run-dir")
        return metrics

    def _learn(self) -> None:
        self._seed()
        own, folder = self.config.search.autodim, self.run.path("search", "learned")
        train = self.config.train.until_the_end(own.epochs)
        model = build_model(self.config.model, self.schema, train.embedding_l2)
        names, dim = names_in_scores(self.schema), self.config.model.embedding_dim
        mixture = Mixture(list(names), dim, own.candidates(dim), own.annealing, self.config.seed)
        model.gate = mixture
        sharded = self._shard(model, train)
        architect = Architect(sharded, mixture, self.loader("validation", shuffle=True), own, self.runtime)
        loaders = Loaders(self.loader("train", shuffle=True, drop_last=True), self.loader("validation"))
        optimizer = build_optimizer(sharded, train)
        trainer = Trainer(sharded, optimizer, loaders, train, folder, self.runtime, self._marks(), after_step=architect)
        architect.start(trainer.progress.step)
        progress = trainer.fit()
        metrics = {
            "seconds": progress.seconds,
            "epochs": progress.epoch,
            "steps": progress.step,
            "updates": progress.step // own.every,
            "temperature": mixture.temperature,
            "widths": own.candidates(dim),
            "fingerprint": self._marks(),
        }
        learned = dict(zip(names.values(), mixture.probabilities().double().cpu(), strict=True))

        def write() -> None:
            save_arrays(folder / "probabilities.npz", learned)
            write_json(folder / "metrics.json", metrics)

        self.runtime.on_main(write)

    def _marks(self) -> str:
        """Of the settings that what is learned depends on."""
        search = SearchConfig(method="autodim", autodim=self.config.search.autodim)
        return fingerprint(self.config.model_copy(update={"search": search}), "search")


class Architect:
    """Moves α by the gradient of the validation loss; called after every step of training, on all ranks.

    Args:
        model: the supernet, sharded.
        mixture: its gate.
        validation: this rank's batches.
        config: how often, and how fast.
        runtime: of this process.
    """

    def __init__(
        self,
        model: DistributedModelParallel,
        mixture: Mixture,
        validation: Loader,
        config: AutodimConfig,
        runtime: Runtime,
    ) -> None:
        self.model, self.mixture, self.validation, self.config, self.runtime = (
            model,
            mixture,
            validation,
            config,
            runtime,
        )
        self.start(0)

    def start(self, step: int) -> None:
        """Goes on after this many steps of training."""
        self.mixture.step = step
        self._batches = _endless(self.validation, step // self.config.every)

    def __call__(self, step: int) -> bool:
        self.mixture.step = step
        if step % self.config.every == 0:
            gradient = self.gradient(next(self._batches).to(self.runtime.device))
            self.mixture.update(gradient, self.config.learning_rate, step // self.config.every)
        return False

    def gradient(self, batch: Batch) -> torch.Tensor:
        """Of the mean loss of all ranks' rows, in log α [F, N]; nothing else of the model changes."""
        with undisturbed(self.model), self.mixture.searching() as log_alpha:
            loss, _ = self.model.module(batch)
            (own,) = torch.autograd.grad(loss, log_alpha)
        rows = len(batch.labels)
        total = self.runtime.mean(torch.cat([rows * own.flatten(), own.new_tensor([rows])]))
        return (total[:-1] / total[-1]).view_as(own)


def _endless(loader: Loader, done: int) -> Iterator[Batch]:
    """Batches of one epoch after the other, those that are done left out."""
    epoch, batch = divmod(done, len(loader))
    loader.load_state_dict({**loader.state_dict(), "epoch": epoch, "batch": batch})
    while True:
        yield from loader
        epoch += 1
        loader.set_epoch(epoch)
