"""The loader beside what it feeds: `python benchmarks/loader.py`.

Writes a prepared set of Criteo's shape (39 fields, all embedded, as in the paper; Zipf ids) under a temporary folder, then
measures in this one process, alternating, so that whatever else the machine does meets all of them: the loader alone on
one thread, shuffled; training from it; training from batches held in memory. Prints medians over the rounds. Tables are
trained with the fused row-wise Adagrad, the fastest there is on a CPU, which asks most of the loader.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterable
from itertools import chain, islice, repeat
from pathlib import Path

import torch
from shape import BATCH, write_set

from sseds_rec.data.batch import Batch
from sseds_rec.data.loader import Loader
from sseds_rec.distributed.runtime import runtime
from sseds_rec.distributed.sharding import ShardingConfig, shard
from sseds_rec.models import build_model
from sseds_rec.models.registry import ModelConfig
from sseds_rec.training.config import TableOptimizer, TrainConfig
from sseds_rec.training.optimizers import build_optimizer, fuse_table_optimizer, placement_for

OPTIMIZER: TableOptimizer = "rowwise_adagrad"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=20, help="training steps a round")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, runtime() as place:
        write_set(Path(folder), arguments.rows)
        loader = Loader(folder, "train", BATCH, shuffle=True, drop_last=True, pin_memory=place.device.type == "cuda")
        alone = Loader(folder, "train", BATCH, shuffle=True, drop_last=True, prefetch=0)
        model_config = ModelConfig(embedding_dim=16)
        model = build_model(model_config, loader.schema)
        placement = placement_for(OPTIMIZER, "auto", place.device)
        fuse_table_optimizer(model, OPTIMIZER, 1e-3, placement)
        sharded = shard(model, ShardingConfig(type=placement), place, BATCH)
        optimizer = build_optimizer(sharded, TrainConfig(table_optimizer=OPTIMIZER, learning_rate=1e-3))

        def train(batches: Iterable[Batch]) -> float:
            begun, rows = time.perf_counter(), 0
            for batch in batches:
                optimizer.zero_grad()
                loss, _ = sharded(batch.to(place.device, non_blocking=True))
                loss.backward()
                optimizer.step()
                rows += len(batch.labels)
            if place.device.type == "cuda":
                torch.cuda.synchronize()
            return rows / (time.perf_counter() - begun)

        def load() -> float:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            begun, spent = time.perf_counter(), time.process_time()
            rows = sum(len(batch.labels) for batch in alone)
            wall, cpu = time.perf_counter() - begun, time.process_time() - spent
            torch.set_num_threads(threads)
            return rows / max(wall, cpu)

        stream = chain.from_iterable(repeat(loader))  # goes on from round to round: buffers are filled as in an epoch
        held = list(islice(stream, arguments.steps))
        train(islice(held, 10))
        loads, streams, memories, losses = [], [], [], []
        for _ in range(arguments.rounds):
            loads.append(load())
            # in memory before and after, so that a drift of the machine cancels
            before = train(held)
            streams.append(train(islice(stream, arguments.steps)))
            after = train(held)
            memories.append((before + after) / 2)
            losses.append(1 - streams[-1] / memories[-1])
        load_rate, memory_rate = statistics.median(loads), statistics.median(memories)
        print(f"rows {arguments.rows:,}, fields {len(loader.schema.fields)}, batch {BATCH}, device {place.device}")
        print(f"loader alone, shuffled, one thread: {load_rate:,.0f} rows/s per core (from {min(loads):,.0f})")
        print(f"model, DeepFM d = 16, from memory:  {memory_rate:,.0f} rows/s on {torch.get_num_threads()} threads")
        print(f"loader / model:                     {load_rate / memory_rate:.0f}x")
        print(f"training from the loader:           {statistics.median(streams):,.0f} rows/s")
        low, middle, high = statistics.quantiles(losses, n=4)
        print(f"loss against memory:                {middle:+.1%} (median; quartiles {low:+.1%} and {high:+.1%})")


if __name__ == "__main__":
    main()
