"""What the benchmarks share.

The shape is 39 embedded fields as Criteo's in the paper, a million table rows in all, Zipf ids; models are trained as `sseds
train` does.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from sseds_rec.data.batch import Batch
from sseds_rec.data.schema import LABEL, SPLITS, Field, Schema, Split
from sseds_rec.distributed.runtime import Runtime
from sseds_rec.distributed.sharding import ShardingConfig, shard
from sseds_rec.models import CtrModel
from sseds_rec.training.compute import prepare_dense
from sseds_rec.training.config import TrainConfig
from sseds_rec.training.optimizers import build_optimizer, fuse_table_optimizer, placement_for
from sseds_rec.training.pipelines import train_pipeline

#: Rows of the 39 tables: 13 of bucketed integers, 26 of categories of very different size.
ROWS = [100] * 13 + [int(rows) for rows in np.geomspace(10, 340_800, 26)]
NAMES = [f"C{i}" for i in range(len(ROWS))]
BATCH = 2048
PART_ROWS, ROW_GROUP_ROWS = 1 << 20, 1 << 16


def draw(random: np.random.Generator, rows: int, count: int) -> np.ndarray:
    """`count` ids of a table: few are frequent, most are rare."""
    return random.zipf(1.2, count) % rows


def schema_of(splits: dict[str, Split] | None = None) -> Schema:
    fields = [
        Field(name=name, kind="categorical", transform="vocabulary", cardinality=rows)
        for name, rows in zip(NAMES, ROWS, strict=True)
    ]
    splits = splits or {split: Split(rows=1, positives=1, files=[]) for split in SPLITS}
    return Schema(label=LABEL, fields=fields, seed=0, source={}, splits=splits)


def batch_of(seed: int, rows: int) -> Batch:
    """A batch in memory."""
    random = np.random.default_rng(seed)
    ids = np.concatenate([draw(random, n, rows) for n in ROWS])
    sparse = KeyedJaggedTensor(NAMES, torch.from_numpy(ids), lengths=torch.ones(len(ids), dtype=torch.int32))
    labels = (random.random(rows) < 0.25).astype(np.float32)
    return Batch(torch.empty(rows, 0), sparse, torch.from_numpy(labels))


def sharded_step(
    model: CtrModel, config: TrainConfig, batches: list[Batch], place: Runtime, pipelines: ExitStack
) -> tuple[nn.Module, Callable[[], object]]:
    """The sharded model, and a function that trains it on the next of the batches, round and round."""
    prepare_dense(model, config, place.device)
    placement = placement_for(config.table_optimizer, "auto", place.device)
    fuse_table_optimizer(model, config.table_optimizer, config.table_rate, placement)
    sharded = shard(model, ShardingConfig(type=placement), place, len(batches[0].labels))
    step = pipelines.enter_context(train_pipeline(sharded, build_optimizer(sharded, config), place))
    endless = cycle(batches)
    return sharded, lambda: step(endless)


def ratio(above: list[float], below: list[float], style: str = ".2f") -> str:
    """Median and quartiles of the rounds' ratios."""
    low, middle, high = statistics.quantiles(
        [a / b for a, b in zip(above, below, strict=True)], n=4, method="inclusive"
    )
    return f"{middle:{style}} ({low:{style}} to {high:{style}})"


def write_set(folder: Path, rows: int, held_out: int = 10_000) -> None:
    """Writes a set laid out as `sseds prepare` does."""
    random = np.random.default_rng(0)
    splits = {}
    for split, count in zip(SPLITS, (rows, held_out, held_out), strict=True):
        (folder / split).mkdir(parents=True)
        files, positives = [], 0
        for start in range(0, count, PART_ROWS):
            held = min(PART_ROWS, count - start)
            labels = random.random(held) < 0.25
            columns = {name: draw(random, n, held).astype(np.int32) for name, n in zip(NAMES, ROWS, strict=True)}
            files.append(f"{split}/part-{len(files):05d}.parquet")
            table = pa.table({LABEL: labels.astype(np.int8), **columns})
            pq.write_table(table, folder / files[-1], row_group_size=ROW_GROUP_ROWS, compression="lz4")
            positives += int(labels.sum())
        splits[split] = Split(rows=count, positives=positives, files=files)
    schema_of(splits).save(folder)
