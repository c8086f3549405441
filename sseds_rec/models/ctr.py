"""A click model: embedding bag collections, a model over their output, and the loss the trainer and the search call."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from sseds_rec.data.batch import Batch
from sseds_rec.data.schema import Field, Schema
from sseds_rec.distributed.managed import managed_collection, spread_ids
from sseds_rec.errors import UserError
from sseds_rec.models.fields import FieldEmbeddings
from sseds_rec.models.registry import MODELS, ModelConfig, OverArch, check_rotates
from sseds_rec.search.plan import DimensionPlan
from sseds_rec.slim.alignment import Init
from sseds_rec.slim.mass import MassColumns

#: All tables, slim ones too, start normal with this standard deviation: small, so that the first logits are. TorchRec's own
#: start is ±√(1/n), large in tables of few rows.
TABLE_STD = 0.01


class CtrModel(nn.Module):
    """Batch -> (loss, (loss, logits [B], labels [B])), the convention of TorchRec's own training modules.

    Args:
        tables: one per field; built on the meta device, `DistributedModelParallel` gives them memory.
        over: the model over the embeddings.
        embedding_l2: λ of the penalty λ/2 · mean_b Σ_i ||e_bi||², added to the loss in training only.
        is_weighted: whether the batches' ids come with weights.
        raw: fields whose ids are any int64, for managed collision to map to rows.
        masses: of rotated tables, what gives `over` the mass beside each embedding.

    Attributes:
        gate: KeyedTensor -> KeyedTensor, what a search that trains puts between the tables and `over`; set it before sharding.
    """

    def __init__(
        self,
        tables: list[EmbeddingBagConfig],
        over: OverArch,
        embedding_l2: float = 0.0,
        is_weighted: bool = False,
        raw: Collection[str] = (),
        masses: MassColumns | None = None,
    ) -> None:
        super().__init__()
        tables = [replace(table, init_fn=partial(nn.init.normal_, std=TABLE_STD)) for table in tables]
        plain = [table for table in tables if table.feature_names[0] not in raw]
        managed = [table for table in tables if table.feature_names[0] in raw]
        self.raw = [table.feature_names[0] for table in managed]
        meta = torch.device("meta")
        self.embeddings = EmbeddingBagCollection(plain, is_weighted, meta) if plain else None
        self.managed = managed_collection(managed, is_weighted) if managed else None
        self.masses = masses
        self.gate: nn.Module | None = None
        self.over = over
        self.embedding_l2 = embedding_l2

    def forward(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        embeddings = self._embed(batch.sparse)
        inputs = embeddings if self.gate is None else self.gate(embeddings)
        inputs = inputs if self.masses is None else self.masses(inputs, batch.sparse)
        logits = self.over(batch.dense, inputs).float()  # of a lower precision under autocast
        loss = F.binary_cross_entropy_with_logits(logits, batch.labels)
        reported = loss.detach()
        if self.training and self.embedding_l2:
            norm = torch.linalg.vector_norm(embeddings.values())  # makes no squares of the size of the embeddings
            loss = loss + 0.5 * self.embedding_l2 * norm.square() / batch.labels.shape[0]
        return loss, (reported, logits.detach(), batch.labels)

    def _embed(self, sparse: KeyedJaggedTensor) -> KeyedTensor:
        plain: KeyedTensor | None = self.embeddings(sparse) if self.embeddings is not None else None
        if self.managed is None:
            assert plain is not None
            return plain
        ids = sparse.permute([sparse.keys().index(name) for name in self.raw])
        managed: KeyedTensor = self.managed(_with_values(ids, spread_ids(ids.values())))[0]
        if plain is None:
            return managed
        return KeyedTensor(
            [*plain.keys(), *managed.keys()],
            [*plain.length_per_key(), *managed.length_per_key()],
            torch.cat([plain.values(), managed.values()], dim=1),
        )


def _with_values(features: KeyedJaggedTensor, values: Tensor) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(
        features.keys(), values, features.weights_or_none(), lengths=features.lengths(), stride=features.stride()
    )


def build_model(config: ModelConfig, schema: Schema, embedding_l2: float = 0.0) -> CtrModel:
    """The full model: every sparse field of the schema as one table of `config.embedding_dim` columns."""
    names = table_names(schema)
    tables = [
        EmbeddingBagConfig(
            name=names[field.name],
            feature_names=[field.name],
            num_embeddings=rows_of(field),
            embedding_dim=config.embedding_dim,
            # In a weighted set the weights of a sequence to be averaged are 1/length.
            pooling=PoolingType.MEAN if field.kind == "sequence" and not schema.is_weighted else PoolingType.SUM,
        )
        for field in schema.sparse_fields
    ]
    fields = FieldEmbeddings({field.name: config.embedding_dim for field in schema.sparse_fields})
    over = MODELS[config.name](fields, len(schema.dense_fields), config)
    return CtrModel(tables, over, embedding_l2, schema.is_weighted, raw_fields(schema))


def build_slim_model(
    config: ModelConfig, schema: Schema, plan: DimensionPlan, transform: Init | None, embedding_l2: float = 0.0
) -> CtrModel:
    """The slim model: the plan's tables, dropped fields gone, transform matrices if the model aligns.

    Every field of a rotated table has one column more, its mass, dropped ones only that: so its mean counts as before.

    Args:
        config: of the full model.
        schema: of the data.
        plan: see `plan_for`.
        transform: "random" aligns to the widest kept table, as the paper; "select" to the original width, so that the model
            equals the full one with the dropped columns masked, or with projected embeddings if they are rotated. A model that
            does not align equals it in either case. None makes no matrices: the kept tables must have one width.
        embedding_l2: see `CtrModel`.

    Raises:
        UserError: the plan drops every table, or leaves fewer than the model needs, or the model cannot be rotated.
    """
    if plan.rotations:
        check_rotates(config)
    tables = table_names(schema)
    kept = {table: own.kept for table, own in plan.tables.items()}
    if not any(kept.values()):
        raise UserError("the plan drops every table; raise search.budget or set search.min_dim")
    masses = MassColumns(
        {field: len(kept[table]) for field, table in tables.items()},
        {field: field for field, table in tables.items() if table in plan.rotations},
        {field: plan.rotations[table].mean_length for field, table in tables.items() if table in plan.rotations},
        [field for field, table in tables.items() if plan.tables[table].pooling == "MEAN"],
        schema.is_weighted,
    )
    aligned_dim = config.embedding_dim if transform == "select" else max(map(len, kept.values()))
    aligns = MODELS[config.name].aligns and transform is not None
    own_tables = {field: tables[field] for field in masses.dims}
    fields = FieldEmbeddings(masses.dims, aligned_dim if aligns else None, own_tables)
    if fields.alignment is not None and transform is not None:
        fields.alignment.start(transform, kept, plan.rotations)
    over = MODELS[config.name](fields, len(schema.dense_fields), config)
    configs, raw = plan.embedding_bag_configs(), raw_fields(schema)
    return CtrModel(configs, over, embedding_l2, schema.is_weighted, raw, masses if plan.rotations else None)


def raw_fields(schema: Schema) -> list[str]:
    """The fields whose ids managed collision maps to rows."""
    return [field.name for field in schema.sparse_fields if field.transform == "raw"]


def table_names(schema: Schema) -> dict[str, str]:
    """Sparse field -> its table: of the same name, unless torch cannot have a module of that name ("type", "user.id")."""
    fields = {field.name for field in schema.sparse_fields}
    names: dict[str, str] = {}
    for field in schema.sparse_fields:
        name = field.name.replace(".", "_")
        while hasattr(nn.ModuleDict(), name) or name in names.values() or (name != field.name and name in fields):
            name = f"t_{name}"
        names[field.name] = name
    return names


def names_in_scores(schema: Schema) -> dict[str, str]:
    """Sparse field -> its table's name in scores and plans: a set with raw and other fields makes two collections, and the name
    says which."""
    raw = raw_fields(schema)
    several = 0 < len(raw) < len(schema.sparse_fields)
    return {
        field: f"{'managed' if field in raw else 'embeddings'}.{table}" if several else table
        for field, table in table_names(schema).items()
    }


def plan_for(config: ModelConfig, schema: Schema, plan: DimensionPlan) -> DimensionPlan:
    """The plan with its tables in the schema's order, in which the full model concatenates them, and of their own names.

    Raises:
        UserError: the plan is of another data set or model (names the first table that differs).
    """
    fields, own_names, names = schema.sparse_fields, table_names(schema), names_in_scores(schema)
    expected = {names[field.name]: rows_of(field) for field in fields}
    for name in [*expected, *plan.tables]:
        if name not in plan.tables or name not in expected:
            where = "data" if name in expected else "plan"
            raise UserError(f"table {name} is in the {where} only; the plan is of another data set, search again")
        table = plan.tables[name]
        if (table.rows, table.original_dim) != (expected[name], config.embedding_dim):
            raise UserError(
                f"table {name} has {expected[name]} rows x {config.embedding_dim} columns, the plan says "
                f"{table.rows} x {table.original_dim}; the plan is of another model, search again"
            )
    scored = {own_names[field.name]: names[field.name] for field in fields}
    tables = {table: plan.tables[name] for table, name in scored.items()}
    rotations = {table: plan.rotations[name] for table, name in scored.items() if name in plan.rotations}
    return plan.model_copy(update={"tables": tables, "rotations": rotations})


def rows_of(field: Field) -> int:
    """n_i of a sparse field's table."""
    assert field.cardinality is not None, "sparse fields have a cardinality"
    return field.cardinality
