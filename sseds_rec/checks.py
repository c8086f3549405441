"""What a run refuses before anything is trained or written, because it could only fail later."""

from __future__ import annotations

from sseds_rec.config import Config
from sseds_rec.data.schema import SPLITS, Schema, SplitName
from sseds_rec.distributed.sharding import raw_ids_refused
from sseds_rec.distributed.sharding_config import Placement
from sseds_rec.errors import UserError
from sseds_rec.models import MODELS, names_in_scores, raw_fields, rows_of, table_names
from sseds_rec.models.registry import check_rotates
from sseds_rec.search.allocate import check_budget
from sseds_rec.search.budget import Budget
from sseds_rec.search.criteria import Ggn, GgnRotated
from sseds_rec.search.scores import Table


def check_batches(config: Config, world_size: int) -> None:
    """Refuses batches that do not divide by the ranks.

    Raises:
        UserError: names the key.
    """
    for key, size in (("train", config.train.batch_size), ("search", config.search.batch_size or 0)):
        if size % world_size:
            raise UserError(f"{key}.batch_size={size} does not divide by {world_size} ranks; choose a multiple")


def check_data(config: Config, schema: Schema, placement: Placement) -> None:
    """Refuses a set that cannot be trained on or measured, and tables and fields that it does not have.

    Args:
        config: the experiment.
        schema: of its set.
        placement: sharding type of all tables.

    Raises:
        UserError: names the set, or the key.
    """
    if not schema.sparse_fields:
        raise UserError(
            f"{config.data.path}: all fields are dense inputs; there is no embedding table to train or search"
        )
    for name in SPLITS:
        if not schema.splits[name].rows:
            raise UserError(f"{config.data.path}: the {name} split is empty; prepare a set with all three splits")
    if schema.splits["train"].rows < config.train.batch_size:
        raise UserError(
            f"train.batch_size={config.train.batch_size} is more than the {schema.splits['train'].rows:,} rows of "
            f"{config.data.path}; lower it"
        )
    held_out: tuple[SplitName, ...] = ("validation", "test")
    for split in held_out:
        if not 0 < schema.splits[split].positives < schema.splits[split].rows:
            raise UserError(
                f"{config.data.path}: the labels of the {split} split are all the same, so AUC is undefined; "
                "split the data again"
            )
    single = [field.name for field in schema.sparse_fields if field.kind != "sequence"]
    if config.evaluation.group_field not in (None, *single):
        raise UserError(
            f"evaluation.group_field={config.evaluation.group_field}: {config.data.path} has no such field with one id a "
            f"row; choose one of {', '.join(single)}"
        )
    config.sharding.check_tables(list(table_names(schema).values()))
    raw = raw_fields(schema)
    if raw and placement == "data_parallel":
        raise raw_ids_refused(f"field {raw[0]}")


def criterion_of(config: Config, schema: Schema) -> str:
    """The search's criterion, or the default for this model and set.

    Raises:
        UserError: it rotates tables, and these cannot be.
    """
    model, raw = config.model, raw_fields(schema)
    criterion = config.search.criterion or (GgnRotated if MODELS[model.name].rotates and not raw else Ggn).name
    if criterion == GgnRotated.name:
        check_rotates(model)
        if raw:
            raise UserError(
                f"search.criterion={criterion} cannot rotate the table of raw ids of field {raw[0]}; choose ggn"
            )
    return criterion


def check_search(config: Config, schema: Schema, budget: Budget) -> None:
    """Refuses a budget and rules that no scores could satisfy.

    Raises:
        UserError: see `check_budget`.
    """
    search, names = config.search, names_in_scores(schema)
    tables = {names[field.name]: Table(rows_of(field), config.model.embedding_dim) for field in schema.sparse_fields}
    check_budget(tables, budget, search.multiple, search.min_dim, search.tables)
