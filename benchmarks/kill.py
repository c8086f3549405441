"""Runs that are killed at random moments beside runs that are left alone: `python benchmarks/kill.py [KEY=VALUE ...]`.

A killed run loses all its processes to kill -9 ten times in pretraining and ten times in retraining, at random moments, and is
started again by the same command. Prints a Markdown table of test AUCs: if resuming is right, a killed run is no further from
the whole one of its seed than whole ones of other seeds are from each other. On one process the two are equal.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STAGES = ("pretrain", "retrain")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--config", default="configs/flights_deepfm.yaml")
    parser.add_argument("--seeds", nargs="+", type=int, default=[2022, 2023, 2024])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--kills", type=int, default=10, help="in each of the two trainings")
    parser.add_argument("--output", type=Path, default=Path("runs/kill"))
    arguments = parser.parse_args()
    print("| seed | training | AUC left alone | AUC killed | difference | steps left alone | steps killed | kills |")
    print("|---|---|---|---|---|---|---|---|")
    differences: dict[str, list[float]] = {stage: [] for stage in STAGES}
    alone: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for seed in arguments.seeds:
        settings = [f"seed={seed}", "train.checkpoint_steps=20", "train.async_checkpoints=true", *arguments.overrides]
        folders = [arguments.output / f"seed{seed}-{kind}" for kind in ("alone", "killed")]
        commands = [_command(arguments.ranks, arguments.config, settings, folder) for folder in folders]
        kills = {}
        subprocess.run(commands[0], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for stage in STAGES:
            seconds = _metrics(folders[0])[stage]["seconds"]
            kills[stage] = _kill(commands[1], folders[1] / stage, arguments.kills, seconds, random.Random(seed))
        subprocess.run(commands[1], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        whole, killed = map(_metrics, folders)
        for stage in STAGES:
            alone[stage].append(whole[stage]["auc"])
            differences[stage].append(killed[stage]["auc"] - whole[stage]["auc"])
            print(
                f"| {seed} | {stage} | {whole[stage]['auc']:.4f} | {killed[stage]['auc']:.4f} | {differences[stage][-1]:+.4f} "
                f"| {whole[stage]['steps']} | {killed[stage]['steps']} | {kills[stage]} |",
                flush=True,
            )
    for stage in STAGES:
        spread = statistics.stdev(alone[stage]) if len(alone[stage]) > 1 else float("nan")
        print(
            f"\n{stage}: mean difference {statistics.mean(differences[stage]):+.4f}, largest "
            f"{max(map(abs, differences[stage])):.4f}; standard deviation over the seeds left alone {spread:.4f}"
        )


def _command(ranks: int, config: str, settings: list[str], folder: Path) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    launcher = torchrun if ranks > 1 else []
    return [sys.executable, *launcher, "-m", "sseds_rec", "run", config, *settings, "--run-dir", str(folder)]


def _kill(command: list[str], stage: Path, kills: int, seconds: float, moment: random.Random) -> int:
    """Starts a command and kills it while it trains in a stage, again and again; returns how often, `kills` at most."""
    history = stage / "history.jsonl"
    for killed in range(kills):
        begun = time.time()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # Opening the history is the last that happens before the first step.
        while process.poll() is None and not (history.exists() and history.stat().st_mtime > begun):
            time.sleep(0.01)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moment.uniform(0, seconds / kills))
        if (stage / "metrics.json").exists() or process.poll() is not None:
            return killed
        for pid in [process.pid, *_descendants(process.pid)]:  # at once, as on a machine that goes down
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
    return kills


def _descendants(pid: int) -> list[int]:
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*children, *(below for child in children for below in _descendants(child))]


def _metrics(folder: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return metrics


if __name__ == "__main__":
    main()
