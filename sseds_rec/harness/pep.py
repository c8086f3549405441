"""PEP as a pipeline; see `sseds_rec.search.methods.pep`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from torchrec.distributed.model_parallel import DistributedModelParallel

from sseds_rec.distributed.runtime import Runtime
from sseds_rec.errors import UserError
from sseds_rec.files import read_json, write_json
from sseds_rec.harness.masked import Masked
from sseds_rec.models import build_model, table_names
from sseds_rec.run_directory import fingerprint
from sseds_rec.search.budget import Budget
from sseds_rec.search.elements import Elements
from sseds_rec.search.methods.pep import SoftThreshold
from sseds_rec.search.scores import Table
from sseds_rec.training.checkpoint import load_weights, save_weights
from sseds_rec.training.optimizers import build_optimizer
from sseds_rec.training.trainer import Loaders, Trainer, average_batch_norm


class Passed(BaseModel):
    """When a search first had no more than a budget, and how many elements it had then."""

    model_config = ConfigDict(extra="forbid")

    step: int
    left: int


class Learned(BaseModel):
    """What `learned.json` says of a search, beside its checkpoints.

    Attributes:
        fingerprint: of its settings, but for the budgets.
        budgets: those whose masks are kept, by how few they leave.
        passed: budget -> when it was; of those that have been. Its weights are in `at_<budget>/`, for the others those of the
            last step are in `end/`.
        steps, seconds: of the learning; None while it goes on.
    """

    model_config = ConfigDict(extra="forbid")

    fingerprint: str
    budgets: list[str]
    passed: dict[str, Passed] = {}
    steps: int | None = None
    seconds: float | None = None


class Passing:
    """Keeps the model when its sparsity first reaches a budget, between steps of training; ends it at the last budget.

    Args:
        sharded: the model, with its gate.
        record: of the search; budgets that it passed after the present step will be passed again.
        limits: budget -> elements, descending.
        every: steps between two counts.
        folder: of the search.
        runtime: of this process.
        step: the present one.
    """

    def __init__(
        self,
        sharded: DistributedModelParallel,
        record: Learned,
        limits: dict[str, int],
        every: int,
        folder: Path,
        runtime: Runtime,
        step: int,
    ) -> None:
        self.sharded, self.record, self.limits, self.every = sharded, record, limits, every
        self.folder, self.runtime = folder, runtime
        self.elements = Elements(sharded)
        record.passed = {budget: one for budget, one in record.passed.items() if one.step <= step}

    @property
    def over(self) -> bool:
        """Whether all budgets have been reached."""
        return len(self.record.passed) == len(self.limits)

    def __call__(self, step: int) -> bool:
        if step % self.every == 0:
            left = self.sharded.module.gate.left(self.elements)
            for budget, limit in self.limits.items():
                if left <= limit and budget not in self.record.passed:
                    average_batch_norm(self.sharded, self.runtime)
                    save_weights(self.folder / f"at_{budget}", self.sharded, self.runtime)
                    self.record.passed[budget] = Passed(step=step, left=left)
                    self.save()
        return self.over

    def save(self) -> None:
        """Writes `learned.json`."""
        self.runtime.on_main(lambda: write_json(self.folder / "learned.json", self.record.model_dump()))


class Pep(Masked):
    """Learns thresholds from scratch; `retrain` starts from the same weights as the search did.

    `search/learned/` serves all budgets that it was learned for: a run that finds it there, finished, learns nothing.

    Raises:
        UserError: see `Masked`; or a field may have several ids a row, or ids have weights.
    """

    def search(self) -> dict[str, Any]:
        """Leaves `search/learned/`, `search/checkpoint` and `search/plan.json`, whether or not the budget was reached."""
        learned = self._learned() or self._learn()
        assert learned.seconds is not None, "it has been learned"
        budget = str(self.budget.parameters)
        passed = learned.passed.get(budget)
        self._seed()
        sharded = self._gated(0.0)
        load_weights(self._folder() / (f"at_{budget}" if passed else "end"), sharded)
        sharded.module.gate.apply_to(Elements(sharded))
        search = {"method": "pep", **self.config.search.pep.model_dump(exclude={"budgets"}), "missed": passed is None}
        return self._found(sharded, learned.seconds, {**search, "steps": passed.step if passed else learned.steps})

    def _learn(self) -> Learned:
        """Trains weights and thresholds until all budgets have been passed, or the epochs are over."""
        self._seed()
        folder, config = self._folder(), self.config.search.pep
        train = self.config.train.until_the_end(config.epochs)
        sharded = self._gated(train.embedding_l2)
        trainer = Trainer(
            sharded,
            build_optimizer(sharded, train, config.optimizer),
            Loaders(self.loader("train", shuffle=True, drop_last=True), self.loader("validation")),
            train,
            folder,
            self.runtime,
            self._settings(),
        )
        progress = trainer.progress
        if not progress.step:
            save_weights(folder / "start", sharded, self.runtime)
        limits = self._limits(sharded)
        record = self._read() or Learned(fingerprint=self._settings(), budgets=list(limits))
        passing = Passing(sharded, record, limits, config.every, folder, self.runtime, progress.step)
        trainer.after_step = passing
        if not passing.over:
            trainer.fit()
        if not passing.over:
            save_weights(folder / "end", sharded, self.runtime)
        record.steps, record.seconds = progress.step, progress.seconds
        passing.save()
        self.runtime.on_main(lambda: shutil.rmtree(trainer.checkpoints.folder, ignore_errors=True))
        return record

    def _learned(self) -> Learned | None:
        """A search that is there and finished.

        Raises:
            UserError: it was made under other settings, or for other budgets.
        """
        record, budget = self._read(), str(self.budget.parameters)
        if record is None or record.seconds is None:
            return None
        if record.fingerprint != self._settings():
            raise UserError(f"{self._folder()}: it was learned under another config; remove it, or use that config")
        if budget not in record.budgets:
            raise UserError(
                f"{self._folder()}: it was learned for {', '.join(record.budgets)} of the parameters, not for {budget}; "
                "name that in search.pep.budgets and learn again"
            )
        return record

    def _read(self) -> Learned | None:
        path = self._folder() / "learned.json"
        return self.runtime.from_main(lambda: Learned.model_validate(read_json(path)) if path.exists() else None)

    def _limits(self, sharded: DistributedModelParallel) -> dict[str, int]:
        """Budget -> elements that it leaves, from the largest budget to the smallest."""
        facts = [Table(*shape) for shape in Elements(sharded).shapes.values()]
        asked = [self.budget.parameters, *self.config.search.pep.budgets]
        limits = {str(value): Budget(parameters=value).limit(facts) for value in asked}
        return dict(sorted(limits.items(), key=lambda one: -one[1]))

    def _settings(self) -> str:
        """A fingerprint of all that the search depends on: budgets only say what of it is kept."""
        search = self.config.search
        pep = search.pep.model_copy(update={"budgets": []})
        search = search.model_copy(update={"pep": pep, "budget": Budget(parameters=0.1)})
        return fingerprint(self.config.model_copy(update={"search": search}), "search")

    def _gated(self, embedding_l2: float) -> DistributedModelParallel:
        """The full model with thresholds, as it starts."""
        model, config = build_model(self.config.model, self.schema, embedding_l2), self.config.search.pep
        dim = self.config.model.embedding_dim
        model.gate = SoftThreshold(table_names(self.schema), dim, config.granularity, config.start)
        return self._shard(model, self.config.train)

    def _folder(self) -> Path:
        return self.run.path("search", "learned")

    def _start(self) -> Path:
        return self._folder() / "start"

    def _check_search(self) -> None:
        super()._check_search()
        if self.schema.is_weighted:
            raise UserError(
                f"search.method=pep: the ids of {self.config.data.path} have weights, so that a threshold of what is looked up "
                "is none of the table; choose another method"
            )
        several = [field.name for field in self.schema.sparse_fields if field.kind == "sequence"]
        if several:
            raise UserError(
                f"search.method=pep: field {several[0]} has several ids a row, so that a threshold of what is looked up is none "
                "of the table; leave it out, or choose another method"
            )
