"""A slim model beside its base, and its alignment beside its step: `python benchmarks/slim.py`.

39 fields of 128 columns, a million table rows, batch 2048, MLP 1024 x 1024, fused row-wise Adagrad. The base is scored with
`ggn` and cut to a tenth of its columns (the deep input is then ten times narrower) or of its parameters. Base and slim models
take turns in one process; training as `sseds train` does it, inference as `sseds evaluate`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from itertools import cycle

import torch
from shape import BATCH, batch_of, ratio, schema_of, sharded_step
from torch import nn

from sseds_rec.data.batch import Batch
from sseds_rec.distributed.runtime import Runtime, runtime
from sseds_rec.models import CtrModel, ModelConfig, build_model, build_slim_model
from sseds_rec.models.fields import FieldEmbeddings
from sseds_rec.search.allocate import Budget, allocate
from sseds_rec.search.saliency import score_dimensions
from sseds_rec.training.config import TrainConfig

DIM = 128
Step = Callable[[], object]


def steps_of(
    model: CtrModel, batches: list[Batch], place: Runtime, pipelines: ExitStack
) -> tuple[nn.Module, Step, Step]:
    """The sharded model, one training step of it and one inference."""
    sharded, step = sharded_step(model, TrainConfig(table_optimizer="rowwise_adagrad"), batches, place, pipelines)
    endless = cycle(batches)

    def train() -> None:
        sharded.train()
        step()

    @torch.no_grad()
    def infer() -> None:
        sharded.eval()
        sharded(next(endless))

    return sharded, train, infer


def alignment_steps(fields: FieldEmbeddings) -> dict[str, Step]:
    """Forward and backward of the alignment alone: inside FM, and to the aligned embeddings that DLRM takes."""
    raw = torch.randn(BATCH, fields.raw_dim, requires_grad=True)
    of_fm, of_aligned = torch.randn(BATCH), torch.randn(BATCH, len(fields.dims), fields.aligned_dim)
    dense, first_order = torch.empty(BATCH, 0), nn.Linear(fields.raw_dim, 1)
    transforms = list(fields.parameters())
    return {
        "fm": lambda: torch.autograd.grad(
            fields.fm(dense, raw, first_order), [raw, first_order.weight, *transforms], of_fm
        ),
        "align": lambda: torch.autograd.grad(fields.align(raw), [raw, *transforms], of_aligned),
    }


def alternate(steps: Mapping[str, Step], rounds: int, repeat: int = 3) -> dict[str, list[float]]:
    """Name -> seconds of one step in each round; the first round warms up and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(-1, rounds):
        for name, step in steps.items():
            begun = time.perf_counter()
            for _ in range(repeat):
                step()
            if turn >= 0:
                seconds[name].append((time.perf_counter() - begun) / repeat)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["deepfm", "dlrm"])
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    batches = [batch_of(seed, BATCH) for seed in range(4)]
    print(
        "| model | budget | transform | columns | parameters | base, ms | slim, ms | train | infer | fm / step | align / step |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    with runtime("cpu") as place, ExitStack() as pipelines:
        for name in arguments.models:
            torch.manual_seed(0)
            config = ModelConfig(name=name, embedding_dim=DIM, hidden=[1024, 1024])
            base, train_base, infer_base = steps_of(build_model(config, schema_of()), batches, place, pipelines)
            for _ in range(5):
                train_base()
            scores = score_dimensions(base, batches, "ggn")
            for budget in (Budget(dims=0.1), Budget(parameters=0.1)):
                plan = allocate(scores, budget, exponent=0.5, order="fill")
                for transform in ("select", "random"):
                    slim = build_slim_model(config, schema_of(), plan, transform)
                    fields = slim.over.fields
                    _, train_slim, infer_slim = steps_of(slim, batches, place, pipelines)
                    steps = {"base": train_base, "slim": train_slim, "infer base": infer_base, "infer slim": infer_slim}
                    seconds = alternate(steps | alignment_steps(fields), arguments.rounds)
                    print(
                        f"| {name} | {budget.model_dump_json(exclude_none=True)} | {transform} to {fields.aligned_dim} "
                        f"| {fields.raw_dim} | {plan.reached['parameters']['fraction']:.3f} "
                        f"| {statistics.median(seconds['base']) * 1e3:.0f} | {statistics.median(seconds['slim']) * 1e3:.0f} "
                        f"| {ratio(seconds['base'], seconds['slim'])} | {ratio(seconds['infer base'], seconds['infer slim'])} "
                        f"| {ratio(seconds['fm'], seconds['slim'], '.1%')} | {ratio(seconds['align'], seconds['slim'], '.1%')} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
