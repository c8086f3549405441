"""Methods that know the widths without a trained model, and train the slim one from scratch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, ClassVar

from sseds_rec.distributed.tables import embedding_modules
from sseds_rec.errors import UserError
from sseds_rec.export import torchrec_tables
from sseds_rec.files import write_json
from sseds_rec.harness.traffic import sharing_evenly
from sseds_rec.models import build_model, names_in_scores
from sseds_rec.models.ticket import start_anew
from sseds_rec.pipeline import Pipeline
from sseds_rec.search.keeping import plan_keeping
from sseds_rec.search.methods.mde import allocate_mde
from sseds_rec.search.methods.uniform import allocate_uniform
from sseds_rec.search.plan import DimensionPlan
from sseds_rec.search.scores import Table
from sseds_rec.search.tap import plan_tables
from sseds_rec.slim.alignment import Init
from sseds_rec.stages import Stage


class FromScratch(Pipeline):
    """A search that leaves a plan of widths; `retrain` starts with all weights new, whatever `retrain.tables` and `dense` say.

    Raises:
        UserError: see `Pipeline`; or the budget is that of a cluster, which only an allocation from scores can keep.
    """

    needs: ClassVar[Mapping[Stage, Stage]] = {"slim": "search", "retrain": "search", "report": "retrain"}

    def allocate(self, tables: dict[str, Table]) -> DimensionPlan:
        """The plan for the budget; called on one rank."""
        raise NotImplementedError

    def tables(self) -> dict[str, Table]:
        """Name in plans -> rows and columns of the full model's tables."""
        return plan_tables(embedding_modules(build_model(self.config.model, self.schema)))

    def search(self) -> dict[str, Any]:
        """Leaves `search/plan.json`."""
        begun = time.monotonic()
        plan = self.runtime.from_main(lambda: self.allocate(self.tables()))
        return self._found(plan, time.monotonic() - begun)

    def slim(self) -> dict[str, Any]:
        """Leaves `slim/tables.json`, and the accuracy of the start, of which nothing is trained."""
        self.run.require("slim", "search")
        plan = self._plan()
        self.runtime.on_main(lambda: write_json(self.run.path("slim", "tables.json"), torchrec_tables(plan)))
        self._seed()
        model = self._shard(self._slim_model(plan), self.config.retrain_as_train(), slim=True)
        start_anew(model, plan)
        self._write_sharding_plan("slim", model)
        return self._finish("slim", {**self._test(model), **self._counts(model), "seconds": 0.0})

    def retrain(self) -> dict[str, Any]:
        """Trains the slim model from scratch; leaves `retrain/checkpoint` and `retrain/metrics.json`."""
        self.run.require("retrain", "search")
        self._seed()
        plan, train = self._plan(), self.config.retrain_as_train()
        model = self._slim_model(plan, train.embedding_l2)
        return self._train("retrain", model, train, lambda sharded: start_anew(sharded, plan))

    def _check_search(self) -> None:
        if self.budget.kind == "fits":
            raise UserError(
                f"search.method={self.config.search.method} with search.budget.fits: ask for parameters, bytes or dims"
            )

    def _transform(self) -> Init | None:
        return "random"

    def _found(self, plan: DimensionPlan, seconds: float, batches: int = 0) -> dict[str, Any]:
        self.runtime.on_main(lambda: plan.save(self.run.path("search", "plan.json")))
        found = {"seconds": seconds, "batches": batches, "budget": plan.budget, "reached": plan.reached}
        return self._finish("search", found)


class Uniform(FromScratch):
    """See `sseds_rec.search.methods.uniform`."""

    def allocate(self, tables: dict[str, Table]) -> DimensionPlan:
        return allocate_uniform(tables, self.budget)

    def _transform(self) -> Init | None:
        return None


class Mde(FromScratch):
    """See `sseds_rec.search.methods.mde`."""

    def allocate(self, tables: dict[str, Table]) -> DimensionPlan:
        config, names = self.config.search.mde, names_in_scores(self.schema)
        if config.popularity == "rows":
            return allocate_mde(tables, self.budget, config)
        sharing = {names[field]: rows for field, rows in sharing_evenly(self.dataset).items()}
        return allocate_mde(tables, self.budget, config, sharing)


class DropFields(FromScratch):
    """The model without the fields of `search.drop_fields`, all other tables at their full width."""

    def allocate(self, tables: dict[str, Table]) -> DimensionPlan:
        dropped = {names_in_scores(self.schema)[field] for field in self.config.search.drop_fields}
        kept = {name: range(0 if name in dropped else table.dim) for name, table in tables.items()}
        search = {"method": "drop_fields", "fields": self.config.search.drop_fields}
        return plan_keeping(tables, kept, self.budget, search)

    def _check_search(self) -> None:
        super()._check_search()
        fields, dropped = [field.name for field in self.schema.sparse_fields], self.config.search.drop_fields
        for name in dropped:
            if name not in fields:
                raise UserError(
                    f"search.drop_fields: {self.config.data.path} has no field {name} with a table; it has {', '.join(fields)}"
                )
        if not set(fields) - set(dropped):
            raise UserError("search.drop_fields drops every table; leave one")

    def _transform(self) -> Init | None:
        return None
