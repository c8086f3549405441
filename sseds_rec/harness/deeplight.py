"""DeepLight as a pipeline; see `sseds_rec.search.methods.deeplight`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from sseds_rec.harness.masked import Masked
from sseds_rec.models import build_model
from sseds_rec.run_directory import fingerprint
from sseds_rec.search.elements import Elements
from sseds_rec.search.methods.deeplight import Pruning
from sseds_rec.search.scores import Table
from sseds_rec.stages import Stage
from sseds_rec.training.checkpoint import load_weights
from sseds_rec.training.optimizers import build_optimizer
from sseds_rec.training.trainer import Loaders, Trainer


class DeepLight(Masked):
    """Trains the pretrained model on and prunes it on the way; `retrain` goes on from there with the mask fixed."""

    needs: ClassVar[Mapping[Stage, Stage]] = {**Masked.needs, "search": "pretrain"}

    def search(self) -> dict[str, Any]:
        """Leaves `search/checkpoint`, `search/history.jsonl` and `search/plan.json`."""
        self.run.require("search", "pretrain")
        self._seed()
        config = self.config.search.deeplight
        own = config.model_dump(include={"learning_rate", "embedding_l2"}, exclude_none=True)
        own |= {"table_learning_rate": None} if "learning_rate" in own else {}
        train = self.config.train.model_copy(update=own).until_the_end(config.epochs)
        sharded = self._shard(build_model(self.config.model, self.schema, train.embedding_l2), train)
        load_weights(self.run.path("pretrain", "checkpoint"), sharded)
        loaders = Loaders(self.loader("train", shuffle=True, drop_last=True), self.loader("validation"))
        elements = Elements(sharded)
        keep = self.budget.limit([Table(*shape) for shape in elements.shapes.values()])
        trainer = Trainer(
            sharded,
            build_optimizer(sharded, train),
            loaders,
            train,
            self.run.path("search"),
            self.runtime,
            fingerprint(self.config, "search"),
            after_step=Pruning(elements, keep, config, len(loaders.train)),
        )
        progress = trainer.fit()
        search = {"method": "deeplight", **config.model_dump(), "steps": progress.step}
        return self._found(sharded, progress.seconds, search)

    def _start(self) -> Path:
        return self._masks()
