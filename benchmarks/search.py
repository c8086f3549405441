"""What a search costs beside training: `python benchmarks/search.py CONFIG --run-dir RUN [KEY=VALUE ...]`.

The run must be pretrained. Training steps and scored batches take turns on the same batches, so that the ratios are of one run;
medians over rounds, and quartiles. Then the whole search, loader, scores and plan, beside an epoch of as many such steps; the
peak of memory that a scored batch needs above the model, beside that of a training step, in units of the pooled output's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from sseds_rec.config import load_config
from sseds_rec.distributed.runtime import runtime
from sseds_rec.pipeline import Pipeline
from sseds_rec.run_directory import RunDirectory
from sseds_rec.search.criteria import CRITERIA
from sseds_rec.search.saliency import score_dimensions
from sseds_rec.training.optimizers import build_optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.overrides)
    with runtime("cpu") as place:
        pipeline = Pipeline(config, RunDirectory(arguments.run_dir), place)
        model = pipeline.pretrained()
        optimizer = build_optimizer(model, config.train)
        batches = list(pipeline.loader("validation"))[:4]

        def train() -> None:
            model.train()
            for batch in batches:
                optimizer.zero_grad()
                model(batch)[0].backward()
                optimizer.step()

        works = {"step": train}
        for name in CRITERIA:
            works[name] = lambda name=name: score_dimensions(model, batches, name)  # type: ignore[misc]
        seconds = take_turns(works, arguments.rounds)
        step = statistics.median(seconds["step"]) / len(batches)
        memory = pooled_bytes(pipeline, batches[0])
        print(f"training step: {1000 * step:.1f} ms, peak memory {peak_bytes(train) / memory:.1f} pooled outputs\n")
        print("| criterion | a batch / a training step | quartiles | peak memory, pooled outputs |\n|---|---|---|---|")
        for name in CRITERIA:
            ratios = [own / base for own, base in zip(seconds[name], seconds["step"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            peak = peak_bytes(lambda name=name: score_dimensions(model, batches[:1], name)) / memory  # type: ignore[misc]
            print(f"| {name} | {middle:.2f} | {low:.2f}, {high:.2f} | {peak:.1f} |", flush=True)
        stage = [search_seconds(pipeline, model) for _ in range(arguments.rounds)]
        epoch = step * len(pipeline.loader("train", drop_last=True))
        print(f"\nsearch with the config's settings: {statistics.median(stage):.3f} s (score and plan; median of {len(stage)})")
        print(f"an epoch of such steps: {epoch:.2f} s; the search is {statistics.median(stage) / epoch:.2%} of it")


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


def pooled_bytes(pipeline: Pipeline, batch: Any) -> int:
    """Bytes of the pooled outputs [B, ΣD] of a batch, in float32."""
    return 4 * len(batch.labels) * len(pipeline.schema.sparse_fields) * pipeline.config.model.embedding_dim


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most that torch has allocated at once during the work, above what there was before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    held = peak = 0
    for event in sorted((e for e in profiler.events() if e.name == "[memory]"), key=lambda e: e.time_range.start):
        held += event.cpu_memory_usage
        peak = max(peak, held)
    return peak


if __name__ == "__main__":
    main()
