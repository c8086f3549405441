"""pretrain -> search -> slim -> retrain -> report: each stage reads what the one before left on disk."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel

from sseds_rec.checks import check_batches, check_data, check_search, criterion_of
from sseds_rec.config import Config
from sseds_rec.data.dataset import Dataset, open_dataset
from sseds_rec.data.loader import Loader
from sseds_rec.data.schema import SplitName
from sseds_rec.distributed.machine import job_cluster
from sseds_rec.distributed.plan_file import plan_file, save_plan
from sseds_rec.distributed.runtime import Runtime
from sseds_rec.distributed.sharding import shard
from sseds_rec.export import torchrec_tables
from sseds_rec.files import write_json
from sseds_rec.forecast import search_budget, training_workload
from sseds_rec.models import CtrModel, build_model, build_slim_model, names_in_scores, plan_for, table_names
from sseds_rec.models.ticket import load_ticket, restart_tables
from sseds_rec.report.html import write_report
from sseds_rec.run_directory import RunDirectory, fingerprint
from sseds_rec.search.audit import Audit, audit_dimensions
from sseds_rec.search.criteria import criterion_named
from sseds_rec.search.plan import DimensionPlan
from sseds_rec.search.rescale import rescale
from sseds_rec.search.saliency import score_dimensions
from sseds_rec.search.scores import DimensionScores, save_arrays
from sseds_rec.search.stability import expected_overlap, standard_errors
from sseds_rec.slim.alignment import Init
from sseds_rec.slim.checkpoint import slim_checkpoint
from sseds_rec.stages import STAGES, Stage
from sseds_rec.training.checkpoint import load_weights, save_weights
from sseds_rec.training.compute import prepare_dense
from sseds_rec.training.config import TrainConfig
from sseds_rec.training.metrics import evaluate
from sseds_rec.training.optimizers import build_optimizer, placement_for
from sseds_rec.training.trainer import AfterStep, Loaders, Trainer

_TABLE = ".embedding_bags."


class Pipeline:
    """The stages of one experiment; call them in order, or one alone when those before it are done.

    Its search is SSEDS, with any criterion; other methods override the stages in which they differ (`sseds_rec.harness`).

    Args:
        config: the experiment.
        run: its run directory.
        runtime: of this process.
        dataset: what to train on; that of the `data` section if not given.

    Raises:
        UserError: the data is missing or damaged, the batch size does not divide by the ranks, or settings exclude each
            other.
    """

    #: Stage -> the one that must have finished before it.
    needs: ClassVar[Mapping[Stage, Stage]] = dict(pairwise(reversed(STAGES)))

    def __init__(self, config: Config, run: RunDirectory, runtime: Runtime, dataset: Dataset | None = None) -> None:
        self.config, self.run, self.runtime = config, run, runtime
        self.dataset = dataset or runtime.from_main(lambda: open_dataset(config.data))
        self.schema = self.dataset.schema
        placement = placement_for(config.train.table_optimizer, config.sharding.type, runtime.device)
        check_batches(config, runtime.world_size)
        check_data(config, self.schema, placement)
        self.batch_size = config.train.batch_size // runtime.world_size
        self.budget = search_budget(config, self.schema)
        self._check_search()

    def _check_search(self) -> None:
        """Refuses a search that could only fail after training."""
        self.criterion = criterion_of(self.config, self.schema)
        check_search(self.config, self.schema, self.budget)

    def pretrain(self) -> dict[str, Any]:
        """Trains the full model; leaves `pretrain/checkpoint` (best step) and `pretrain/metrics.json`."""
        self._seed()
        train = self.config.train
        return self._train(
            "pretrain", build_model(self.config.model, self.schema, train.embedding_l2), train, lambda model: None
        )

    def search(self) -> dict[str, Any]:
        """Scores the pretrained columns and allocates the budget; leaves `search/saliency.npz` and `search/plan.json`."""
        self.run.require("search", "pretrain")
        search = self.config.search
        model = self.pretrained()
        begun = time.monotonic()
        scores = self.score(model)
        scores.search |= {"seed": self.config.seed, "split": search.split}
        plan = self.runtime.from_main(lambda: search.allocate(scores, self.budget))  # "fits" takes a minute of a core
        seconds = time.monotonic() - begun
        errors = standard_errors(scores)
        counted = self.budget
        if counted.kind == "fits":
            counted = counted.in_bytes(int(plan.reached["bytes"]["kept"]))
        overlap = expected_overlap(scores, lambda drawn: search.allocate(drawn, counted)) if errors else None

        def write() -> None:
            scores.save(self.run.path("search", "saliency.npz"))
            if errors:
                save_arrays(self.run.path("search", "saliency_errors.npz"), errors)
            plan.save(self.run.path("search", "plan.json"))

        self.runtime.on_main(write)
        metrics = {
            "seconds": seconds,
            "batches": scores.search["batches"],
            "budget": plan.budget,
            "reached": plan.reached,
            "expected_overlap": overlap,
        }
        return self._finish("search", metrics)

    def score(self, model: DistributedModelParallel, rescaled: bool = True) -> DimensionScores:
        """Scores of the full model by the `search` section, or as that has them before it rescales."""
        search = self.config.search
        scores = score_dimensions(
            model,
            self.scoring_batches(),
            criterion_named(self.criterion, self.config.seed),
            search.num_batches,
            rounds=search.rounds,
            budget=self.budget,
            allocation=search.allocate,
        )
        if not (rescaled and search.rescale_batches and scores.rotations):
            return scores
        return rescale(model, self.scoring_batches("validation"), scores, search.rescale_batches)

    def audit(self, columns: int, num_batches: int | None) -> Audit:
        """Compares the search's scores with exact leave-one-out on validation batches; leaves `search/audit.json`."""
        self.run.require("audit", "search")
        model = self.pretrained()
        scores = self.score(model)  # as the search had them, in the basis that it cut
        audit = audit_dimensions(
            model,
            self.loader("validation", shuffle=True),
            scores,
            DimensionPlan.load(self.run.path("search", "plan.json")),
            columns=columns,
            num_batches=num_batches,
            seed=self.config.seed,
        )
        self.runtime.on_main(lambda: write_json(self.run.path("search", "audit.json"), audit.as_dict()))
        return audit

    def slim(self) -> dict[str, Any]:
        """Gathers the plan's columns; leaves `slim/checkpoint`, `slim/tables.json` and the accuracy before retraining."""
        self.run.require("slim", "search")
        plan = self._plan()
        target = self.run.path("slim", "checkpoint")
        begun = time.monotonic()
        self.runtime.on_main(lambda: shutil.rmtree(target, ignore_errors=True))
        slim_checkpoint(self.run.path("pretrain", "checkpoint"), target, plan, collective=self.runtime.world_size > 1)
        self.runtime.on_main(lambda: write_json(self.run.path("slim", "tables.json"), torchrec_tables(plan)))
        seconds = time.monotonic() - begun
        self._seed()
        model = self._shard(
            build_slim_model(self.config.model, self.schema, plan, "select"), self.config.train, slim=True
        )
        load_ticket(target, model, plan)
        self._write_sharding_plan("slim", model)
        return self._finish("slim", {**self._test(model), **self._counts(model), "seconds": seconds})

    def retrain(self) -> dict[str, Any]:
        """Trains the slim model from the winning ticket, or from what `retrain.tables` and `retrain.dense` leave of it.

        Leaves `retrain/checkpoint` and `retrain/metrics.json`; with `retrain.epochs=0` they are the start's.
        """
        self.run.require("retrain", "slim")
        self._seed()
        plan, train, own = self._plan(), self.config.retrain_as_train(), self.config.retrain
        model = self._slim_model(plan, train.embedding_l2)
        checkpoint = self.run.path("slim", "checkpoint")
        anew = self._learned_by_heart(plan) if own.tables == "ticket" else []
        return self._train(
            "retrain",
            model,
            train,
            lambda sharded: load_ticket(checkpoint, sharded, plan, own.tables, own.dense),
            before_first=(lambda sharded: restart_tables(sharded, plan, anew, self.config.seed)) if anew else None,
        )

    def _learned_by_heart(self, plan: DimensionPlan) -> list[str]:
        """The tables that held-out rows would have much less of."""
        names, scales = names_in_scores(self.schema), plan.search.get("scales", {})
        below = self.config.retrain.restart_below
        return [table for field, table in table_names(self.schema).items() if scales.get(names[field], below) < below]

    def report(self) -> None:
        """Writes `report/index.html` from the other stages' artefacts."""
        self.run.require("report", "retrain")
        self.runtime.on_main(lambda: write_report(self.run.folder))

    def evaluate(self, stage: Literal["pretrain", "retrain"], split: SplitName) -> dict[str, Any]:
        """Quality and speed of a trained stage on a split, and the number of its rows."""
        self.run.require("evaluate", stage)
        if stage == "pretrain":
            return self._measure(self.pretrained(), split)
        self._seed()
        sharded = self._shard(self._slim_model(self._plan()), self.config.train, slim=True)
        load_weights(self.run.path(stage, "checkpoint"), sharded)
        return self._measure(sharded, split)

    def _train(
        self,
        stage: Stage,
        model: CtrModel,
        train: TrainConfig,
        start: Callable[[DistributedModelParallel], None],
        after_step: Callable[[DistributedModelParallel], AfterStep] | None = None,
        before_first: Callable[[DistributedModelParallel], None] | None = None,
    ) -> dict[str, Any]:
        """Trains, keeps the best step's checkpoint, and measures it on the test split."""
        folder = self.run.path(stage)
        sharded = self._shard(model, train, slim=stage == "retrain")
        start(sharded)
        self._write_sharding_plan(stage, sharded)
        optimizer = build_optimizer(sharded, train)
        loaders = Loaders(self.loader("train", shuffle=True, drop_last=True), self.loader("validation"))
        marks = fingerprint(self.config, stage)
        between = after_step(sharded) if after_step else None
        first = (lambda: before_first(sharded)) if before_first else None
        retrains = stage == "retrain"
        trainer = Trainer(sharded, optimizer, loaders, train, folder, self.runtime, marks, retrains, between, first)
        progress = trainer.fit()
        load_weights(trainer.checkpoints.path(progress.best_step), sharded)
        save_weights(folder / "checkpoint", sharded, self.runtime)
        metrics = {
            **self._test(sharded),
            "validation_auc": progress.best_auc,
            **self._counts(sharded),
            "seconds": progress.seconds,
            "samples_per_second": progress.samples / progress.train_seconds if progress.samples else None,
            "epochs": progress.epoch,
            "steps": progress.step,
        }
        finished = self._finish(stage, metrics)
        self.runtime.on_main(lambda: shutil.rmtree(trainer.checkpoints.folder, ignore_errors=True))
        return finished

    def pretrained(self) -> DistributedModelParallel:
        """The full model as `pretrain` left it."""
        self._seed()
        model = self._shard(build_model(self.config.model, self.schema), self.config.train)
        load_weights(self.run.path("pretrain", "checkpoint"), model)
        return model

    def _slim_model(self, plan: DimensionPlan, embedding_l2: float = 0.0) -> CtrModel:
        """The slim model that `retrain` trains, before it is sharded."""
        return build_slim_model(self.config.model, self.schema, plan, self._transform(), embedding_l2)

    def _transform(self) -> Init | None:
        """How its transform matrices start; None for none."""
        return self.config.retrain.transform

    def _counts(self, model: DistributedModelParallel) -> dict[str, Any]:
        """What a trained stage's metrics say of its size."""
        return parameter_counts(model)

    def _shard(self, model: CtrModel, train: TrainConfig, slim: bool = False) -> DistributedModelParallel:
        prepare_dense(model, train, self.runtime.device)
        workload = training_workload(self.config, model, train, self.runtime.device.type)
        # From here on ranks draw different numbers: each its own shards' start, and its own dropout.
        torch.manual_seed(self.config.seed + self.runtime.rank)
        plan = workload.sharding.slim_plan if slim else workload.sharding.base_plan
        beside = workload.beside_tables(self.runtime.world_size)
        return shard(model, workload.sharding, self.runtime, self.batch_size, plan, beside)

    def _seed(self) -> None:
        """Makes a stage independent of what ran before it in this process."""
        torch.manual_seed(self.config.seed)

    def scoring_batches(self, split: SplitName | None = None) -> Loader:
        """This rank's batches for a search, of rows drawn anew for each epoch of the loader; of `search.split` if not given."""
        rows = self.config.search.batch_size
        size = rows // self.runtime.world_size if rows else None
        return self.loader(
            split or self.config.search.split, shuffle=True, batch_size=size, prefetch=0
        )  # few: a thread costs more

    def loader(
        self,
        split: SplitName,
        shuffle: bool = False,
        drop_last: bool = False,
        batch_size: int | None = None,
        prefetch: int = 2,
    ) -> Loader:
        """This rank's batches of a split."""
        return Loader(
            self.dataset,
            split,
            batch_size or self.batch_size,
            rank=self.runtime.rank,
            world_size=self.runtime.world_size,
            seed=self.config.seed,
            shuffle=shuffle,
            drop_last=drop_last,
            prefetch=prefetch,
            pin_memory=self.runtime.device.type == "cuda",
        )

    def _plan(self) -> DimensionPlan:
        return plan_for(self.config.model, self.schema, DimensionPlan.load(self.run.path("search", "plan.json")))

    def _test(self, model: DistributedModelParallel) -> dict[str, Any]:
        metrics = self._measure(model, "test")
        del metrics["samples"]  # in a stage's metrics it would seem to be those of training
        return metrics

    def _measure(self, model: DistributedModelParallel, split: SplitName) -> dict[str, Any]:
        group_field = self.config.evaluation.group_field
        metrics = evaluate(model, self.loader(split), self.runtime, group_field).as_dict()
        speed = {"inference_samples_per_second": metrics.pop("samples_per_second")}
        return {**metrics, **speed, **({"group_field": group_field} if group_field else {})}

    def _write_sharding_plan(self, stage: str, model: DistributedModelParallel) -> None:
        cluster = job_cluster(self.runtime)
        plan = plan_file(model.plan, model, cluster.world_size, cluster.per_node)
        self.runtime.on_main(lambda: save_plan(self.run.path(stage, "sharding_plan.json"), plan))

    def _finish(self, stage: str, metrics: dict[str, Any]) -> dict[str, Any]:
        self.runtime.on_main(lambda: self.run.finish(stage, metrics))
        return metrics


def parameter_counts(model: DistributedModelParallel) -> dict[str, int]:
    """Numbers in the tables, and in the whole model, counted from its tensors over all ranks."""
    stored = model.state_dict()
    tables = sum(tensor.size().numel() for name, tensor in stored.items() if _TABLE in name)
    dense = sum(parameter.numel() for name, parameter in model.named_parameters() if _TABLE not in name)
    return {"embedding_parameters": tables, "parameters": tables + dense}
