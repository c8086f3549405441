"""Training beside a hand-written TorchRec loop, and beside the MLP's matrix products alone: `python benchmarks/training.py`.

39 fields, a million table rows, batch 2048 over all processes, MLP 1024 x 1024, fused row-wise Adagrad, tables table-wise.

* products: forward and backward of the MLP's two hidden layers as six bare `torch.mm`, into memory that is there already.
* stock: what one writes with TorchRec's parts: EmbeddingBagCollection + FM + MLP, Adam for the dense part, planner, DMP.
* sseds: DeepFM of this library as `sseds train` runs it; it has first-order weights besides.
* compiled, bf16: the same with `train.compile=true`, and with `train.precision=bf16`.

All sides take turns in the same processes, under the system's own memory allocation and with freed memory kept
(`distributed/memory.py`); only the latter is how `sseds` runs.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import cycle
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import torchrec
from shape import BATCH, NAMES, ROWS, batch_of, ratio, schema_of, sharded_step
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper

from sseds_rec.data.batch import Batch
from sseds_rec.distributed.memory import keep_freed_memory
from sseds_rec.distributed.runtime import Runtime
from sseds_rec.models import ModelConfig, build_model
from sseds_rec.training.config import TrainConfig

WIDTH = 1024
Step = Callable[[], object]


class Stock(nn.Module):
    """DeepFM without first-order weights, as a TorchRec user writes it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        tables = [
            torchrec.EmbeddingBagConfig(name=name, feature_names=[name], num_embeddings=rows, embedding_dim=dim)
            for name, rows in zip(NAMES, ROWS, strict=True)
        ]
        self.embeddings = torchrec.EmbeddingBagCollection(tables=tables, device=torch.device("meta"))
        self.deep = nn.Sequential(
            nn.Linear(len(NAMES) * dim, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, 1),
        )

    def forward(self, batch: Batch) -> Tensor:
        values = self.embeddings(batch.sparse).values()
        fields = values.view(len(batch.labels), len(NAMES), -1)
        fm = 0.5 * (fields.sum(dim=1).square() - fields.square().sum(dim=1)).sum(dim=1)
        return F.binary_cross_entropy_with_logits(self.deep(values).squeeze(1) + fm, batch.labels)


def stock(dim: int, batches: list[Batch], place: Runtime, pipelines: ExitStack) -> Step:
    model = Stock(dim)
    _apply_optimizer_in_backward(torchrec.optim.RowWiseAdagrad, model.embeddings.parameters(), {"lr": 1e-3})
    table_wise = ParameterConstraints(sharding_types=["table_wise"], compute_kernels=["fused"])
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=place.world_size, compute_device="cpu"),
        constraints=dict.fromkeys(NAMES, table_wise),
    )
    sharders = [torchrec.distributed.embeddingbag.EmbeddingBagCollectionSharder()]
    plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
    sharded = DistributedModelParallel(model, device=place.device, plan=plan, sharders=sharders)
    dense = {name: p for name, p in sharded.named_parameters() if "embedding_bags" not in name}
    adam = KeyedOptimizerWrapper(dense, lambda parameters: torch.optim.Adam(parameters, lr=1e-3))
    optimizer = CombinedOptimizer([sharded.fused_optimizer, adam])
    endless = cycle(batches)

    def step() -> None:
        optimizer.zero_grad()
        sharded(next(endless)).backward()
        optimizer.step()

    return step


def sseds(dim: int, batches: list[Batch], place: Runtime, pipelines: ExitStack, **options: Any) -> Step:
    config = TrainConfig(table_optimizer="rowwise_adagrad", **options)
    model = build_model(ModelConfig(name="deepfm", embedding_dim=dim, hidden=[WIDTH, WIDTH]), schema_of())
    return sharded_step(model, config, batches, place, pipelines)[1]


def products(dim: int, batches: list[Batch], place: Runtime, pipelines: ExitStack) -> Step:
    rows, inputs = len(batches[0].labels), len(NAMES) * dim
    x, hidden, gradient = torch.randn(rows, inputs), torch.randn(rows, WIDTH), torch.randn(rows, WIDTH)
    first, second = torch.randn(WIDTH, inputs), torch.randn(WIDTH, WIDTH)
    of_x, of_hidden = torch.empty_like(x), torch.empty_like(hidden)
    of_first, of_second = torch.empty_like(first), torch.empty_like(second)

    def step() -> None:
        torch.mm(x, first.T, out=of_hidden)
        torch.mm(hidden, second.T, out=of_hidden)
        torch.mm(gradient, second, out=of_hidden)
        torch.mm(gradient.T, hidden, out=of_second)
        torch.mm(gradient, first, out=of_x)
        torch.mm(gradient.T, x, out=of_first)

    return step


SIDES: dict[str, Callable[[int, list[Batch], Runtime, ExitStack], Step]] = {
    "products": products,
    "stock": stock,
    "sseds": sseds,
    "compiled": partial(sseds, compile=True),
    "bf16": partial(sseds, precision="bf16"),
}


def measure(
    rank: int, processes: int, port: int, dim: int, keep: bool, sides: list[str], rounds: int, steps: int
) -> None:
    """One process of one setting; rank 0 prints."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    if keep:
        keep_freed_memory()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=processes)
    place = Runtime(rank, processes, torch.device("cpu"))
    batches = [batch_of(seed, BATCH // processes) for seed in range(rank, 4 * processes, processes)]
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    with ExitStack() as pipelines:
        made = {side: SIDES[side](dim, batches, place, pipelines) for side in sides}
        for turn in range(-1, rounds):  # the first warms up
            for side, step in made.items():
                place.barrier()
                begun = time.perf_counter()
                for _ in range(steps):
                    step()
                place.barrier()
                if turn >= 0:
                    seconds[side].append((time.perf_counter() - begun) / steps)
    if place.is_main:
        for side in sides:
            print(
                f"| {dim} | {processes} | {'kept' if keep else 'given back'} | {side} "
                f"| {statistics.median(seconds[side]) * 1e3:.1f} "
                f"| {ratio(seconds['stock'], seconds[side])} | {ratio(seconds['products'], seconds[side])} |",
                flush=True,
            )
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--memory", choices=["kept", "given-back"], nargs="+", default=["kept", "given-back"])
    parser.add_argument("--sides", choices=SIDES, nargs="+", default=["products", "stock", "sseds"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=5, help="a round, of each side")
    arguments = parser.parse_args()
    print("| d | processes | freed memory | side | ms a step | stock / side | products / side |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for memory in arguments.memory:
        for processes in arguments.processes:
            for dim in arguments.dims:
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", 0))
                    port = probe.getsockname()[1]
                mp.spawn(
                    measure,
                    (processes, port, dim, memory == "kept", arguments.sides, arguments.rounds, arguments.steps),
                    nprocs=processes,
                )


if __name__ == "__main__":
    main()
