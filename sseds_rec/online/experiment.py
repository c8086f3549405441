"""Progressive validation over windows: both models predict the next one, then train on it; between the two, a new search."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torchrec.distributed.model_parallel import DistributedModelParallel

from sseds_rec.config import Config, flatten
from sseds_rec.data.schema import Schema
from sseds_rec.distributed.runtime import Runtime
from sseds_rec.errors import UserError
from sseds_rec.files import read_json, write_json
from sseds_rec.models import CtrModel, build_model, plan_for, raw_fields, table_names
from sseds_rec.models.warm_start import live_ticket, warm_start
from sseds_rec.online.config import OnlineConfig
from sseds_rec.online.records import Record, Side, write_records
from sseds_rec.online.store import Learner, WindowStore
from sseds_rec.online.windows import Window, Windows, one_class
from sseds_rec.pipeline import Pipeline, parameter_counts
from sseds_rec.run_directory import RunDirectory, fingerprint
from sseds_rec.search.plan import DimensionPlan
from sseds_rec.training.checkpoint import load_weights
from sseds_rec.training.metrics import Metrics, evaluate
from sseds_rec.training.optimizers import build_optimizer
from sseds_rec.training.pipelines import train_pipeline
from sseds_rec.training.trainer import average_batch_norm

#: Called on every rank after a window with its two records, base first.
OnWindow = Callable[[Record, Record], None]


class Online(Pipeline):
    """An experiment over windows. Its stages up to `retrain` are the warm-up; `follow` does the rest.

    Args:
        config: the experiment; `data.path` is the windows' folder.
        windows: of that folder.
        run: its run directory; the windows' part goes to `online/`.
        runtime: of this process.

    Raises:
        UserError: the windows are too few, or settings exclude each other or are others than those the run began with; or
            see `Pipeline`.
    """

    def __init__(self, config: Config, windows: Windows, run: RunDirectory, runtime: Runtime) -> None:
        self.windows, self.folder = windows, run.path("online")
        warm_up, before = config.online.warm_up, runtime.from_main(self._settings)
        windows.reserve(config.online.spare, before["table_rows"] if before else None)
        super().__init__(config, run, runtime, windows.warm_up(warm_up))
        _check(config, self.schema)
        if (name := one_class(windows[warm_up:])) is not None:
            raise UserError(
                f"{windows.folder}: all labels of window {name} are the same, so its AUC is undefined; make longer windows"
            )
        rates = config.online.model_dump(include={"learning_rate", "table_learning_rate"}, exclude_none=True)
        self.train_config = config.train.model_copy(update=rates)

    def begin(self) -> None:
        """Opens the run directory, and records there the windows and their settings.

        Raises:
            UserError: they differ from those that the run began with (names the key), or ids do not grow from window to window.
        """
        now = {
            "online": self.config.online.model_dump(),
            "windows": [window.name for window in self.windows],
            "table_rows": {field.name: field.cardinality for field in self.schema.sparse_fields},
        }

        def check() -> None:
            before = self._settings()
            if before is not None:
                _check_same(self.run, before, now)
            if before is None or before["windows"] != now["windows"]:
                self.windows.check_ids()

        self.runtime.on_main(check)
        self.run.open(self.config, self.runtime)
        self.runtime.on_main(lambda: write_json(self.folder / "settings.json", now))

    def _settings(self) -> dict[str, Any] | None:
        """What the run began with, if it has."""
        path = self.folder / "settings.json"
        found: dict[str, Any] | None = read_json(path) if path.exists() else None
        return found

    def follow(self, on_window: OnWindow = lambda base, slim: None) -> list[Record]:
        """Predicts and trains window by window, from the last finished one on; leaves `online/windows.csv` and `metrics.json`.

        The last window of the warm-up, which has validated so far, is trained on first.
        """
        self.run.require("online", "retrain")
        store = WindowStore(self.folder, self.runtime, fingerprint(self.config, "retrain"))
        plan = self._plan() if store.last is None else self._with_names(store.plan())
        base, slim = self._start(store, plan)
        records = store.records()
        assert store.last is not None
        for number in range(store.last + 1, len(self.windows)):
            self._look_at(self.windows[number])
            predicted = self._predict(base), self._predict(slim)
            seconds, searched = 0.0, self._is_due(number)
            if searched:
                begun = time.monotonic()
                plan, slim = self._search_again(number, base, slim, plan)
                seconds = time.monotonic() - begun
            spent = self._learn(base, number), self._learn(slim, number) + seconds
            pair = (
                self._record(base, number, predicted[0], spent[0], None),
                self._record(slim, number, predicted[1], spent[1], plan, searched),
            )
            records += pair
            store.save(number, (base, slim), plan, records)
            self._write(records)
            on_window(*pair)
        self._write(records)
        return records

    def _start(self, store: WindowStore, plan: DimensionPlan) -> tuple[Learner, Learner]:
        """Both models as the last finished window left them, or the warm-up."""
        self._seed()
        base, slim = self._learner("base", self._full_model()), self._learner("slim", self._slim(plan))
        if store.last is not None:
            store.restore(base)
            store.restore(slim)
            return base, slim
        last = self.config.online.warm_up - 1
        self._look_at(self.windows[last])
        for learner, stage in ((base, "pretrain"), (slim, "retrain")):
            load_weights(self.run.path(stage, "checkpoint"), learner.model)
            self._learn(learner, last)
        store.save(last, (base, slim), plan, [])
        return base, slim

    def _write(self, records: list[Record]) -> None:
        self.runtime.on_main(lambda: write_records(self.folder, records))

    def _is_due(self, number: int) -> bool:
        """Whether there is a search once this window has been predicted."""
        every = self.config.online.research_every
        return every is not None and (number + 1 - self.config.online.warm_up) % every == 0

    def _search_again(
        self, number: int, base: Learner, slim: Learner, plan: DimensionPlan
    ) -> tuple[DimensionPlan, Learner]:
        """A new plan, of the present base model on rows that it has not trained on, and a slim model of it.

        Nothing is rescaled: rows that come once are not learned by heart, and one window is few rows to find scales on.
        """
        self._seed()
        scores = self.score(base.model, rescaled=False)
        scores.search |= {"seed": self.config.seed, "window": self.windows[number].name}
        found = self._with_names(self.runtime.from_main(lambda: self.config.search.allocate(scores, self.budget)))
        new = self._learner("slim", self._slim(found))
        if self.config.online.start == "base":
            live_ticket(new.model, found, base.model)
        else:
            trained = self.config.online.returning == "base"
            full = base.model if trained else self._full_model()
            warm_start(new.model, found, slim.model, plan, full, trained)
        return found, new

    def _predict(self, learner: Learner) -> tuple[Metrics, float]:
        """What a model's predictions of the window are worth, and the seconds they took."""
        begun = time.monotonic()
        metrics = evaluate(learner.model, self.loader("test"), self.runtime)
        return metrics, time.monotonic() - begun

    def _learn(self, learner: Learner, number: int) -> float:
        """Trains a model on all rows of the window that is looked at; returns the seconds that took."""
        begun = time.monotonic()
        loader, epochs = self.loader("train", shuffle=True), self.config.online.epochs
        learner.model.train()
        for epoch in range(epochs):
            loader.set_epoch(number * epochs + epoch)
            with train_pipeline(learner.model, learner.optimizer, self.runtime) as train_step:
                batches = iter(loader)
                for _ in range(len(loader)):
                    train_step(batches)
                    learner.steps += 1
        average_batch_norm(learner.model, self.runtime)
        return time.monotonic() - begun

    def _record(
        self,
        learner: Learner,
        number: int,
        predicted: tuple[Metrics, float],
        seconds: float,
        plan: DimensionPlan | None,
        searched: bool = False,
    ) -> Record:
        metrics, own_seconds = predicted
        window = self.windows[number]
        return Record(
            window=window.name,
            model=learner.side,
            rows=metrics.samples,
            auc=metrics.auc,
            logloss=metrics.logloss,
            embedding_parameters_in_use=self._in_use(window, plan),
            embedding_parameters=parameter_counts(learner.model)["embedding_parameters"],
            seconds=own_seconds + seconds,
            searched=searched,
        )

    def _look_at(self, window: Window) -> None:
        """Lets the loaders read a window: its rows as known before it are the test and validation splits."""
        self.dataset = self.windows.rows(window)

    def _in_use(self, window: Window, plan: DimensionPlan | None) -> int:
        """Numbers in the tables' rows that have an id by the end of a window; of the full model without a plan."""
        tables = table_names(self.schema)
        dims = {table: own.stored_dim for table, own in plan.tables.items()} if plan else {}
        width = self.config.model.embedding_dim
        return sum(rows * dims.get(tables[field], width) for field, rows in window.table_rows.items())

    def _with_names(self, plan: DimensionPlan) -> DimensionPlan:
        return plan_for(self.config.model, self.schema, plan)

    def _full_model(self) -> DistributedModelParallel:
        model = build_model(self.config.model, self.schema, self.train_config.embedding_l2)
        return self._shard(model, self.train_config)

    def _slim(self, plan: DimensionPlan) -> DistributedModelParallel:
        model: CtrModel = self._slim_model(plan, self.train_config.embedding_l2)
        return self._shard(model, self.train_config, slim=True)

    def _learner(self, side: Side, model: DistributedModelParallel) -> Learner:
        return Learner(side, model, build_optimizer(model, self.train_config))


def _check(config: Config, schema: Schema) -> None:
    """Refuses settings with which no search after the first is possible."""
    online = config.online
    if config.search.method != "sseds":
        raise UserError(f"search.method={config.search.method}: sseds online compares the base with SSEDS only")
    if online.research_every is None:
        return
    if config.retrain.transform != "select":
        raise UserError(
            f"retrain.transform={config.retrain.transform} with online.research_every: aligned embeddings would have another "
            "width after every search; use retrain.transform=select"
        )
    if config.sharding.slim_plan is not None:
        raise UserError("sharding.slim_plan with online.research_every: it is of one plan's tables; leave it out")
    if raw := raw_fields(schema):
        raise UserError(
            f"online.research_every: field {raw[0]} has raw ids, which base and slim model map to rows of their own, so that "
            "no column can return; leave online.research_every out"
        )


def _check_same(run: RunDirectory, before: dict[str, Any], now: dict[str, Any]) -> None:
    recorded = OnlineConfig.model_validate(before["online"])  # keys that a later version adds have their default
    was, given = flatten(recorded.model_dump(), "online."), flatten(now["online"], "online.")
    for key, value in given.items():
        if was[key] != value:
            raise UserError(f"{run.folder} was run with {key}={was[key]}, now it is {value}; choose another --run-dir")
    names = now["windows"][: len(before["windows"])]
    if names != before["windows"]:
        missing = next((name for name in before["windows"] if name not in now["windows"]), names[-1])
        raise UserError(
            f"{run.folder} was run on other windows ({missing} is no longer there, or has new ones before it); "
            "choose another --run-dir"
        )
