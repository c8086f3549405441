"""A small schema, plans over it and one batch of random rows, for the tests of all models."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor

from sseds_rec.data.batch import Batch
from sseds_rec.data.schema import Field, Schema, Split
from sseds_rec.models import ModelConfig, build_model, table_names
from sseds_rec.search.plan import DimensionPlan, TablePlan

#: Field -> rows; `user.id` has a table of another name, `tags` several ids a row, which are averaged.
ROWS = {"user.id": 40, "ad": 25, "tags": 12, "hour": 6}
COUNT, D = 24, 8
_SMALL = {"embedding_dim": D, "hidden": [10, 6], "bottom_hidden": [5, 7]}
#: Every registered model, DCNv2 with low-rank and with full cross layers.
CONFIGS = {name: {"name": name, **_SMALL} for name in ("fm", "wide_deep", "deepfm", "dnn", "dlrm", "dcnv2")}
CONFIGS["dcnv2"]["cross_rank"] = 4
CONFIGS["dcnv2_full"] = {**CONFIGS["dcnv2"], "cross_rank": None, "cross_layers": 2}

#: Plan -> field -> kept columns: of mixed widths, one of them no multiple of four, with fields dropped, with one field left.
KEPT: dict[str, dict[str, list[int]]] = {
    "mixed": {"user.id": [0, 2, 5, 7], "ad": [1, 3, 4], "tags": [6], "hour": list(range(D))},
    "narrow": {"user.id": [0, 2, 5, 7], "ad": [1, 3, 4], "tags": [6, 7], "hour": [3, 4]},
    "dropped": {"user.id": [], "ad": [0, 2, 6, 7], "tags": [], "hour": [1, 2, 3, 4, 5]},
    "alone": {"user.id": [], "ad": [0, 1, 3, 6], "tags": [], "hour": []},
}


def config_of(case: str, **own: object) -> ModelConfig:
    return ModelConfig.model_validate({**CONFIGS.get(case, {"name": case, **_SMALL}), **own})


def schema_of(num_dense: int) -> Schema:
    fields = [
        Field(
            name=name,
            kind="sequence" if name == "tags" else "categorical",
            transform="vocabulary",
            cardinality=rows,
            min_count=1,
        )
        for name, rows in ROWS.items()
    ]
    fields += [Field(name=f"x{i}", kind="numeric", transform="log1p") for i in range(num_dense)]
    splits = {name: Split(rows=0, positives=0, files=[]) for name in ("train", "validation", "test")}
    return Schema(label="click", fields=fields, seed=0, source={}, splits=splits)  # type: ignore[arg-type]


def plan_of(case: str) -> DimensionPlan:
    schema = schema_of(0)
    configs = {c.name: c for c in build_model(config_of("dnn"), schema).embeddings.embedding_bag_configs()}  # type: ignore[union-attr]
    tables = {}
    for field, table in table_names(schema).items():
        kept = KEPT[case][field]
        tables[table] = TablePlan(
            rows=ROWS[field],
            original_dim=D,
            kept=kept,
            embedding_dim=len(kept),
            stored_dim=-(-len(kept) // 4) * 4,
            feature_names=[field],
            pooling=configs[table].pooling.name,
        )
    return DimensionPlan(tables=tables, budget={}, reached={})


def ids() -> dict[str, list[list[int]]]:
    """Field -> per row its ids: one, or up to three tags."""
    random = torch.Generator().manual_seed(1)
    return {
        name: [
            torch.randint(0, rows, (b % 4 if name == "tags" else 1,), generator=random).tolist() for b in range(COUNT)
        ]
        for name, rows in ROWS.items()
    }


def batch_of(num_dense: int, rows: slice = slice(None)) -> Batch:
    random = torch.Generator().manual_seed(2)
    dense, labels = torch.randn(COUNT, num_dense, generator=random), torch.rand(COUNT, generator=random) > 0.5
    bags = [bag for field in ids().values() for bag in field[rows]]
    sparse = KeyedJaggedTensor(
        keys=list(ROWS),
        values=torch.tensor([i for bag in bags for i in bag]),
        lengths=torch.tensor([len(bag) for bag in bags], dtype=torch.int32),
    )
    return Batch(dense=dense[rows], sparse=sparse, labels=labels[rows].float())


def pooled(tables: dict[str, Tensor]) -> dict[str, Tensor]:
    """Field -> mean of the rows of its ids [COUNT, D], zeros for none."""
    names = table_names(schema_of(0))
    return {
        field: torch.stack([tables[names[field]][bag].sum(dim=0) / max(len(bag), 1) for bag in bags])
        for field, bags in ids().items()
        if names[field] in tables
    }


@torch.no_grad()
def randomize(module: nn.Module, seed: int) -> None:
    """Gives all but the transforms values that make every part of a model count in the logits, batch norm's statistics too."""
    random = torch.Generator().manual_seed(seed)
    for name, value in module.named_parameters():
        if ".transforms." not in name:
            scale = 1.0 if value.ndim == 1 or "embedding_bags" in name else 1.5 * value.shape[1] ** -0.5
            value.copy_(scale * torch.randn(value.shape, generator=random))
    for name, value in module.named_buffers():
        if "running_" in name:
            value.copy_(0.5 + torch.rand(value.shape, generator=random))
