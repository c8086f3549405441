"""What a cluster is to train: tables, what trains them, and what else lies on every rank."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.modules.embedding_configs import DATA_TYPE_NUM_BITS, DataType, EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from sseds_rec.constants import stored_dim
from sseds_rec.distributed.planner import OPTIMIZERS
from sseds_rec.distributed.sharding_config import ShardingConfig
from sseds_rec.distributed.tables import embedding_modules, table_configs
from sseds_rec.footprint import Optimizer, Precision, state_bytes

_TYPES: dict[Precision, DataType] = {"fp32": DataType.FP32, "fp16": DataType.FP16, "bf16": DataType.BF16}


class Shape(NamedTuple):
    """A table: its rows, its columns (0: dropped), and how many features look it up."""

    rows: int
    columns: int
    features: int = 1


@dataclass(frozen=True)
class Workload:
    """What is to be trained.

    Attributes:
        model: any module tree; tables on the meta device, with their optimizer fused if they are not data-parallel.
        optimizer: of the tables.
        batch_size: rows a step, of each rank; of all together if `is_global`.
        sharding: what the planner may choose from.
        dense_bytes: of each rank, for all but the tables: weights, gradients, optimizer states.
        divided_bytes: of all ranks together, in equal parts: the maps of raw ids to rows.
    """

    model: nn.Module
    optimizer: Optimizer
    batch_size: int
    is_global: bool = False
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    dense_bytes: int = 0
    divided_bytes: int = 0

    def rows(self, ranks: int) -> int:
        """Of one rank's batch."""
        return math.ceil(self.batch_size / ranks) if self.is_global else self.batch_size

    def beside_tables(self, ranks: int) -> int:
        """Bytes of one rank that are no table's."""
        return self.dense_bytes + math.ceil(self.divided_bytes / ranks)

    def tables(self) -> Iterator[tuple[int, int, int]]:
        """Rows, stored columns and bytes of a number, of every table."""
        for module in embedding_modules(self.model).values():
            for table in table_configs(module):
                yield table.num_embeddings, table.embedding_dim, DATA_TYPE_NUM_BITS[table.data_type] // 8

    @property
    def weight_bytes(self) -> int:
        """Of all tables, once."""
        return sum(rows * columns * size for rows, columns, size in self.tables())

    @property
    def optimizer_bytes(self) -> int:
        """Of all tables' optimizer states, once."""
        return sum(state_bytes(rows, columns, self.optimizer) for rows, columns, _ in self.tables())


def tables_only(
    shapes: Sequence[Shape],
    optimizer: Optimizer,
    precision: Precision,
    batch_size: int,
    dense_bytes: int = 0,
) -> Workload:
    """Bags of these tables, in the width that FBGEMM stores, with nothing over them."""
    tables = [
        EmbeddingBagConfig(
            name=f"table_{index}",
            feature_names=[f"feature_{index}_{feature}" for feature in range(shape.features)],
            num_embeddings=shape.rows,
            embedding_dim=stored_dim(shape.columns),
            data_type=_TYPES[precision],
        )
        for index, shape in enumerate(shapes)
        if shape.columns
    ]
    bags = EmbeddingBagCollection(tables, device=torch.device("meta"))
    apply_optimizer_in_backward(OPTIMIZERS[optimizer], bags.parameters(), {"lr": 1.0})
    return Workload(nn.ModuleDict({"tables": bags}), optimizer, batch_size, dense_bytes=dense_bytes)
