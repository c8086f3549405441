"""Both models as a window leaves them, on disk: there as a whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import KeyedOptimizer

from sseds_rec.distributed.runtime import Runtime
from sseds_rec.files import read_json, write_json
from sseds_rec.online.records import Record, Side
from sseds_rec.search.plan import DimensionPlan
from sseds_rec.training.checkpoint import CheckpointStore, Progress


@dataclass
class Learner:
    """A model that is trained on one window after the other.

    Attributes:
        side: which of the two.
        model: sharded.
        optimizer: over all its parameters.
        steps: of the optimizer.
    """

    side: Side
    model: DistributedModelParallel
    optimizer: KeyedOptimizer
    steps: int = 0


class WindowStore:
    """`<folder>/window-00012/`: base, slim model and its plan after window number 12, and what was measured up to it.

    The folder gets its name when it is whole, and the one before goes after that. All ranks call the methods.

    Args:
        folder: of the experiment.
        runtime: of this process.
        fingerprint: of the settings that the models were made under, see `CheckpointStore`.
    """

    def __init__(self, folder: Path, runtime: Runtime, fingerprint: str) -> None:
        self.folder, self.runtime, self.fingerprint = folder, runtime, fingerprint
        runtime.on_main(self._tidy)
        #: Number of the window that is stored; None if there is none yet.
        self.last = runtime.from_main(lambda: max(self._numbers(), default=None))

    def plan(self) -> DimensionPlan:
        """The slim model's."""
        return DimensionPlan.load(self._last / "plan.json")

    def records(self) -> list[Record]:
        """Of all windows up to this one."""
        return [Record(**record) for record in read_json(self._last / "records.json")]

    def restore(self, learner: Learner) -> None:
        """Loads weights, optimizer and random state of a model that is built as the stored one.

        Raises:
            UserError: the checkpoint is damaged or of other settings.
        """
        checkpoints = self._checkpoints(self._last, learner)
        learner.steps = checkpoints.load(
            self.runtime.from_main(checkpoints.steps)[-1], learner.model, learner.optimizer
        ).step

    def save(self, number: int, learners: Sequence[Learner], plan: DimensionPlan, records: Sequence[Record]) -> None:
        """Writes what window `number` leaves, and removes the one before.

        Raises:
            UserError: it cannot be written.
        """
        target = self._path(number)
        temporary = target.with_name(f".{target.name}.tmp")
        for learner in learners:
            progress = Progress(step=learner.steps)
            self._checkpoints(temporary, learner).save(learner.model, learner.optimizer, progress)

        def publish() -> None:
            plan.save(temporary / "plan.json")
            write_json(temporary / "records.json", [asdict(record) for record in records])
            os.replace(temporary, target)
            self._tidy()

        self.runtime.on_main(publish)
        self.last = number

    @property
    def _last(self) -> Path:
        assert self.last is not None, "nothing is stored"
        return self._path(self.last)

    def _path(self, number: int) -> Path:
        return self.folder / f"window-{number:05d}"

    def _checkpoints(self, folder: Path, learner: Learner) -> CheckpointStore:
        return CheckpointStore(folder / learner.side, self.runtime, fingerprint=self.fingerprint)

    def _numbers(self) -> list[int]:
        return sorted(int(path.name.removeprefix("window-")) for path in self.folder.glob("window-*"))

    def _tidy(self) -> None:
        """Removes all but the last window, under another name first, and what a killed process left."""
        for number in self._numbers()[:-1]:
            os.replace(self._path(number), self._path(number).with_name(f".window-{number:05d}.removed"))
        for left in self.folder.glob(".window-*"):
            shutil.rmtree(left)
