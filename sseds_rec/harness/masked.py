"""Methods that prune single elements: the tables keep their shape, and zeros stay zero while the model is trained again."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torchrec.distributed.model_parallel import DistributedModelParallel

from sseds_rec.distributed.tables import embedding_modules
from sseds_rec.errors import UserError
from sseds_rec.export import torchrec_tables
from sseds_rec.files import write_json
from sseds_rec.models import build_model, raw_fields, table_names
from sseds_rec.models.ctr import CtrModel
from sseds_rec.pipeline import Pipeline
from sseds_rec.search.elements import Elements, Mask, summary
from sseds_rec.search.keeping import plan_keeping, share
from sseds_rec.search.plan import DimensionPlan
from sseds_rec.search.tap import plan_tables
from sseds_rec.stages import Stage
from sseds_rec.training.checkpoint import load_weights, save_weights
from sseds_rec.training.config import TrainConfig
from sseds_rec.training.trainer import AfterStep


class Masked(Pipeline):
    """A search for elements. It leaves `search/checkpoint`, of which the zeros are the mask, and a plan that keeps all columns.

    `retrain` trains the full model, and holds what is masked at zero after every step; `retrain.transform`, `tables` and `dense`
    say nothing here. The plan's `reached` counts the elements that are not zero, its `search.elements` also what they take.

    Raises:
        UserError: see `Pipeline`; or the budget is not one of parameters, a field has raw ids, which change their rows, or a
            table is not in its device's memory.
    """

    needs: ClassVar[Mapping[Stage, Stage]] = {"slim": "search", "retrain": "search", "report": "retrain"}

    def _start(self) -> Path:
        """The checkpoint whose weights, but for what is masked, `retrain` starts from."""
        raise NotImplementedError

    def slim(self) -> dict[str, Any]:
        """Leaves `slim/tables.json`, of unchanged widths, and the accuracy of what the search left."""
        self.run.require("slim", "search")
        plan = self._plan()
        self.runtime.on_main(lambda: write_json(self.run.path("slim", "tables.json"), torchrec_tables(plan)))
        self._seed()
        model = self._shard(self._slim_model(plan), self.config.train)
        load_weights(self._masks(), model)
        self._write_sharding_plan("slim", model)
        return self._finish("slim", {**self._test(model), **self._counts(model), "seconds": 0.0})

    def retrain(self) -> dict[str, Any]:
        """Trains the masked model; leaves `retrain/checkpoint` and `retrain/metrics.json`."""
        self.run.require("retrain", "search")
        self._seed()
        train = self.config.retrain_as_train()
        masks: list[Mask] = []

        def start(sharded: DistributedModelParallel) -> None:
            load_weights(self._masks(), sharded)
            masks.append(Mask(Elements(sharded)))
            load_weights(self._start(), sharded)
            masks[0].apply()

        def masked(sharded: DistributedModelParallel) -> AfterStep:
            def after(step: int) -> bool:
                masks[0].apply()  # momentum moves elements that have no gradient, and the gradient is not masked
                return False

            return after

        return self._train("retrain", self._slim_model(self._plan(), train.embedding_l2), train, start, masked)

    def _masks(self) -> Path:
        return self.run.path("search", "checkpoint")

    def _found(self, sharded: DistributedModelParallel, seconds: float, search: dict[str, Any]) -> dict[str, Any]:
        """Writes down a search whose tables are pruned now.

        Args:
            sharded: the model.
            seconds: of the learning.
            search: the method and its settings, for the plan.
        """
        stored = Elements(sharded).stored()
        save_weights(self._masks(), sharded, self.runtime)
        tables = plan_tables(embedding_modules(build_model(self.config.model, self.schema)))
        elements = {**summary(stored), "tables": {name: own.as_dict() for name, own in stored.items()}}
        kept = {name: range(table.dim) for name, table in tables.items()}
        plan = plan_keeping(tables, kept, self.budget, {**search, "elements": elements})
        total = sum(table.rows * table.dim for table in tables.values())
        plan.reached["parameters"] = share(elements["nonzeros"], total)
        self.runtime.on_main(lambda: plan.save(self.run.path("search", "plan.json")))
        found = {"seconds": seconds, "batches": 0, "budget": plan.budget, "reached": plan.reached}
        finished = self._finish("search", found)
        self.runtime.on_main(lambda: shutil.rmtree(self.run.path("search", "checkpoints"), ignore_errors=True))
        return finished

    def _check_search(self) -> None:
        method, budget, raw = self.config.search.method, self.budget, raw_fields(self.schema)
        if budget.kind != "parameters" or budget.transforms:
            counted = f"{budget.kind} and transforms" if budget.transforms else budget.kind
            raise UserError(
                f"search.method={method} prunes elements of tables that stay as wide as they are: it keeps no budget of "
                f"{counted}; set search.budget.parameters"
            )
        if raw:
            raise UserError(
                f"search.method={method} cannot prune the table of field {raw[0]}, whose raw ids change their rows; prepare it "
                "with a vocabulary or hashed"
            )
        for table in table_names(self.schema).values():
            kernels = self.config.sharding.of(table).kernels
            if kernels != ["fused"]:
                raise UserError(
                    f"sharding.tables.{table}.kernels={kernels}: search.method={method} changes tables in place, in "
                    "their device's memory; use fused"
                )

    def _slim_model(self, plan: DimensionPlan, embedding_l2: float = 0.0) -> CtrModel:
        return build_model(self.config.model, self.schema, embedding_l2)

    def _shard(self, model: CtrModel, train: TrainConfig, slim: bool = False) -> DistributedModelParallel:
        return super()._shard(model, train)  # all its models have the full one's tables

    def _counts(self, model: DistributedModelParallel) -> dict[str, Any]:
        found = summary(Elements(model).stored())
        nonzeros = {"nonzero_embedding_parameters": found.pop("nonzeros")}
        return {**super()._counts(model), **nonzeros, **found}
