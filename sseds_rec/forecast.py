"""What a forecast is of: the model of a config, or tables alone, and what a plan leaves of them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from torch import nn

from sseds_rec.config import Config, load_config
from sseds_rec.constants import WIDEST
from sseds_rec.data.dataset import open_dataset
from sseds_rec.data.schema import FILE_NAME, Schema
from sseds_rec.distributed.hardware import Cluster
from sseds_rec.distributed.workload import Shape, Workload, tables_only
from sseds_rec.errors import UserError
from sseds_rec.files import exists, join, read_json
from sseds_rec.footprint import Optimizer, Precision
from sseds_rec.models.ctr import build_model, build_slim_model, names_in_scores, plan_for, rows_of, table_names
from sseds_rec.search.budget import Budget
from sseds_rec.search.plan import DimensionPlan
from sseds_rec.training.config import TrainConfig
from sseds_rec.training.memory import divided_bytes, replicated_bytes
from sseds_rec.training.optimizers import fuse_table_optimizer, placement_for

#: Where a config says what an option says of a list of tables.
_IN_CONFIG = {
    "embedding_dim": "set model.embedding_dim",
    "batch_size": "set train.batch_size, the rows of all ranks",
    "optimizer": "set train.table_optimizer",
    "precision": "a config's tables are fp32",
}


@dataclass(frozen=True)
class TableOptions:
    """What a list of tables does not say; None for what was not given.

    Attributes:
        embedding_dim: of tables without one.
        batch_size: rows a step of each GPU.
        optimizer, precision: of the tables.
    """

    embedding_dim: int | None = None
    batch_size: int | None = None
    optimizer: Optimizer | None = None
    precision: Precision | None = None


class TableEntry(BaseModel):
    """One table of a list, as `sseds export --format torchrec` writes it; what else it says does not matter here."""

    model_config = ConfigDict(extra="ignore")

    name: str
    num_embeddings: int = Field(ge=1, le=10**12)
    embedding_dim: int | None = Field(None, ge=1, le=WIDEST)
    feature_names: list[str] = []


def workloads(
    source: str, overrides: list[str], plan: Path | None, options: TableOptions, cluster: Cluster
) -> tuple[Workload, Workload | None]:
    """The full and, with a plan, the slim workload.

    Args:
        source: YAML of an experiment; or a prepared set, its `schema.json`, or a JSON list of tables.
        overrides: of the config.
        plan: file of a plan for these tables.
        options: for a schema or a list; a config says it itself.
        cluster: where it is to be trained.

    Raises:
        UserError: a file is missing or wrong, the plan is of other tables, an option does not go with the source, or the config
            does not go with the cluster or says how to place its tables.
    """
    found = DimensionPlan.load(plan) if plan else None
    if source.endswith(".json") or exists(join(source, FILE_NAME)):
        if overrides:
            raise UserError(f"{overrides[0]}: values are changed in a config, and {source} is a list of tables")
        return _of_tables(source, found, options)
    for option, hint in _IN_CONFIG.items():
        if getattr(options, option) is not None:
            raise UserError(f"--{option.replace('_', '-')} is for lists of tables; {hint}")
    return _of_config(load_config(source, overrides), found, cluster)


def search_budget(config: Config, schema: Schema) -> Budget:
    """The search's budget; of a cluster or of bytes, with what the config says of training where it does not say so itself.

    Raises:
        UserError: the tables would be whole on every device of the cluster.
    """
    budget, train = config.search.budget, config.train
    if budget.kind not in ("fits", "bytes"):
        return budget
    known: dict[str, Any] = {"optimizer": train.table_optimizer}
    if budget.kind == "fits":
        cluster = budget.cluster
        base = training_workload(config, build_model(config.model, schema), train, cluster.device.kind)
        if base.sharding.type == "data_parallel":
            raise UserError(
                f"search.budget.fits={budget.fits}: its tables would be data-parallel, whole on every device; ask for "
                "search.budget.bytes, or change train.table_optimizer or sharding.type"
            )
        known |= {"batch_size": base.rows(cluster.world_size), "dense_bytes": base.beside_tables(cluster.world_size)}
    return budget.model_copy(update={key: value for key, value in known.items() if getattr(budget, key) is None})


def _of_config(config: Config, plan: DimensionPlan | None, cluster: Cluster) -> tuple[Workload, Workload | None]:
    kind, ranks, rows = cluster.device.kind, cluster.world_size, config.train.batch_size
    for key in ("base_plan", "slim_plan"):
        if getattr(config.sharding, key) is not None:
            raise UserError(f"sharding.{key}: a forecast makes its own plan; leave it out, or set it to null")
    if rows % ranks:
        raise UserError(f"train.batch_size={rows} does not divide by the {ranks} ranks of {cluster}; choose a multiple")
    schema = open_dataset(config.data).schema
    config.sharding.check_tables(list(table_names(schema).values()))
    base = training_workload(config, build_model(config.model, schema), config.train, kind)
    if plan is None:
        return base, None
    own = plan_for(config.model, schema, plan)
    slim = build_slim_model(config.model, schema, own, config.retrain.transform)
    return base, training_workload(config, slim, config.retrain_as_train(), kind)


def training_workload(config: Config, model: nn.Module, train: TrainConfig, kind: str) -> Workload:
    """A model as a run trains it; has its tables updated inside their backward, unless they are data-parallel.

    Args:
        config: the experiment.
        model: not yet sharded, tables on the meta device.
        train: of its stage.
        kind: of devices, "cuda" or "cpu".

    Raises:
        UserError: the tables' optimizer does not go with the sharding that is asked for.
    """
    placement = placement_for(train.table_optimizer, config.sharding.type, torch.device(kind))
    sharding = config.sharding.model_copy(update={"type": placement})
    fuse_table_optimizer(model, train.table_optimizer, train.table_rate, placement, sharding.data_parallel_tables)
    return Workload(
        model=model,
        optimizer=train.table_optimizer,
        batch_size=train.batch_size,
        is_global=True,
        sharding=sharding,
        dense_bytes=replicated_bytes(model, train, sharding),
        divided_bytes=divided_bytes(model),
    )


def _of_tables(path: str, plan: DimensionPlan | None, options: TableOptions) -> tuple[Workload, Workload | None]:
    tables = _read_tables(path, options.embedding_dim)

    def workload(widths: dict[str, int]) -> Workload:
        shapes = [Shape(own.rows, widths[name], own.features) for name, own in tables.items()]
        return tables_only(
            shapes,
            options.optimizer or "adam",
            options.precision or "fp32",
            options.batch_size or TrainConfig().batch_size,
        )

    base = workload({name: own.columns for name, own in tables.items()})
    if plan is None:
        return base, None
    for name in [*tables, *plan.tables]:
        if name not in plan.tables or name not in tables:
            where = path if name in tables else "plan"
            raise UserError(f"table {name} is in the {where} only; the plan is of other tables")
        asked, own = plan.tables[name], tables[name]
        if (asked.rows, asked.original_dim) != (own.rows, own.columns):
            raise UserError(
                f"{path}: table {name} has {own.rows} rows x {own.columns} columns, the plan says "
                f"{asked.rows} x {asked.original_dim}; the plan is of other tables"
            )
    if not any(plan.dims().values()):
        raise UserError("the plan drops every table; search with a larger budget")
    return base, workload(plan.dims())


def _read_tables(path: str, embedding_dim: int | None) -> dict[str, Shape]:
    content: Any = None if os.path.isdir(path) else read_json(path)
    if isinstance(content, list):
        try:
            entries = TypeAdapter(list[TableEntry]).validate_python(content)
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    elif content is not None and os.path.basename(path) != FILE_NAME:
        raise UserError(f"{path}: is neither a list of tables nor the {FILE_NAME} of a prepared set")
    else:
        schema = Schema.load(path)
        names = names_in_scores(schema)
        entries = [TableEntry(name=names[own.name], num_embeddings=rows_of(own)) for own in schema.sparse_fields]
    if not entries:
        raise UserError(f"{path}: there is no table in it")
    tables: dict[str, Shape] = {}
    for entry in entries:
        if entry.name in tables:
            raise UserError(f"{path}: there are two tables named {entry.name}")
        columns = entry.embedding_dim or embedding_dim
        if not columns:
            raise UserError(f"{path}: table {entry.name} has no embedding_dim; give --embedding-dim")
        tables[entry.name] = Shape(entry.num_embeddings, columns, max(1, len(entry.feature_names)))
    return tables
