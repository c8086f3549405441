"""What a search costs beside training, on the paper's shape or on a pretrained run.

`python benchmarks/search.py` takes DeepFM of 39 fields x 128 with two layers of 1,024, row-wise Adagrad for the tables (Adam on
a CPU would touch all rows in every step); `python benchmarks/search.py CONFIG --run-dir RUN` what `sseds train CONFIG --run-dir
RUN` left. Training steps and scored batches take turns on the same batches, so that the ratios are of one run; medians, and
quartiles in brackets. Of a run it also times the whole search, loader, scores and plan, beside an epoch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from shape import BATCH, batch_of, ratio, schema_of, sharded_step
from torch.profiler import ProfilerActivity, profile

from sseds_rec.config import load_config
from sseds_rec.data.batch import Batch
from sseds_rec.distributed.runtime import runtime
from sseds_rec.models import ModelConfig, build_model
from sseds_rec.pipeline import Pipeline
from sseds_rec.run_directory import RunDirectory
from sseds_rec.search.criteria import CRITERIA
from sseds_rec.search.saliency import score_dimensions
from sseds_rec.search.tap import tapped
from sseds_rec.training.config import TrainConfig
from sseds_rec.training.optimizers import build_optimizer
from sseds_rec.training.pipelines import train_pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--run-dir", type=Path, help="a pretrained run of CONFIG; without: the paper's shape")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_intermixed_args()
    print(f"{torch.get_num_threads()} threads; medians of {arguments.rounds} rounds\n")
    with runtime("cpu") as place, ExitStack() as pipelines:
        if not arguments.config:
            config = ModelConfig(name="deepfm", embedding_dim=128, hidden=[1024, 1024])
            batches = [batch_of(seed, BATCH) for seed in range(4)]
            train = TrainConfig(table_optimizer="rowwise_adagrad")
            model, step = sharded_step(build_model(config, schema_of()), train, batches, place, pipelines)
            compare(model, step, batches, arguments.rounds)
            return
        config = load_config(arguments.config, arguments.overrides)
        pipeline = Pipeline(config, RunDirectory(arguments.run_dir), place)
        model = pipeline.pretrained()
        optimizer = build_optimizer(model, config.train)
        batches = list(pipeline.loader("validation"))[:4]
        endless = cycle(batches)
        train_step = pipelines.enter_context(train_pipeline(model, optimizer, place))
        seconds = compare(model, lambda: train_step(endless), batches, arguments.rounds)
        stage = [search_seconds(pipeline, model) for _ in range(arguments.rounds)]
        metrics = json.loads((arguments.run_dir / "pretrain" / "metrics.json").read_text())
        steps = len(pipeline.loader("train", drop_last=True))
        epoch = steps * config.train.batch_size / metrics["samples_per_second"]
        own = statistics.median(stage)
        print(f"\nsearch with the config's settings: {own:.3f} s (loader, scores and plan)")
        print(
            f"an epoch of {steps} such steps: {steps * seconds:.2f} s; the search is {own / (steps * seconds):.1%} of it"
        )
        print(f"an epoch of the run's pretraining: {epoch:.2f} s; the search is {own / epoch:.1%} of it")


def compare(model: torch.nn.Module, step: Callable[[], object], batches: list[Batch], rounds: int) -> float:
    """Prints every criterion beside training steps on the same batches; returns the seconds of one step."""

    def train() -> None:
        model.train()
        for _ in batches:
            step()

    works: dict[str, Callable[[], object]] = {"step": train}
    works |= {name: partial(score_dimensions, model, batches, name) for name in CRITERIA}
    seconds = take_turns(works, rounds)
    own = statistics.median(seconds["step"]) / len(batches)
    pooled = sum(leaf.numel() * leaf.element_size() for leaf in leaves_of(model, batches[0]))
    print(f"training step {1000 * own:.1f} ms; pooled outputs of a batch {pooled / 2**20:.0f} MiB\n")
    print(
        "| criterion | a scored batch / a training step | peak memory above a forward's, in pooled outputs |\n|---|---|---|"
    )
    forward = peak_bytes(partial(leaves_of, model, batches[0]))
    for name in CRITERIA:
        peak = peak_bytes(partial(score_dimensions, model, batches[:1], name))
        print(f"| {name} | {ratio(seconds[name], seconds['step'])} | {(peak - forward) / pooled:.1f} |", flush=True)
    print(f"| a training step | 1 | {(peak_bytes(step) - forward) / pooled:.1f} |")
    return own


def leaves_of(model: torch.nn.Module, batch: Batch) -> list[torch.Tensor]:
    """The pooled outputs of a forward pass in training, whose graph is there until they are."""
    with tapped(model) as taps:
        loss, _ = model(batch)
        assert loss.requires_grad
        return taps.leaves()


def take_turns(works: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Name -> seconds of each round, after one that does not count."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            begun = time.perf_counter()
            work()
            if turn:
                found[name].append(time.perf_counter() - begun)
    return found


def search_seconds(pipeline: Pipeline, model: torch.nn.Module) -> float:
    begun = time.perf_counter()
    scores = pipeline.score(model)
    pipeline.config.search.allocate(scores, pipeline.config.search.budget)
    return time.perf_counter() - begun


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most that torch has allocated at once during the work, above what there was before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


if __name__ == "__main__":
    main()
