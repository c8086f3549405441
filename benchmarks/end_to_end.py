"""Training from files beside FuxiCTR's: `python benchmarks/end_to_end.py --peer-python PATH`.

DeepFM of 39 fields, a million table rows, MLP 1024 x 1024, batch 2048, one epoch of the same rows: `sseds train` (row-wise
Adagrad in the tables' backward, Adam for the dense part), and FuxiCTR (`end_to_end_fuxictr.py`; Adam for all, its default)
with the Python of PATH. The two take turns. Compared are samples/s of training, reading included, and whole processes, with
start, validation and the written model. FuxiCTR runs with freed memory kept as `sseds` always does, or not (`--given-back`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.dataset
import yaml
from shape import BATCH, NAMES, ROWS, write_set

from sseds_rec.data.schema import LABEL

#: The same as `distributed/memory.py` does, from outside.
KEPT = {"GLIBC_TUNABLES": f"glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold={2**63}"}


def write_fuxictr_set(prepared: Path, folder: Path) -> None:
    """The rows of the prepared set as FuxiCTR reads them."""
    folder.mkdir()
    for split, name in (("train", "train"), ("validation", "valid")):
        table = pyarrow.dataset.dataset(prepared / split).to_table()
        np.savez(folder / f"{name}.npz", label=table[LABEL].to_numpy(), **{n: table[n].to_numpy() for n in NAMES})
    features = [
        {name: {"source": "", "type": "categorical", "vocab_size": rows}}
        for name, rows in zip(NAMES, ROWS, strict=True)
    ]
    feature_map = {
        "dataset_id": "fuxictr",
        "num_fields": len(NAMES),
        "total_features": sum(ROWS),
        "input_length": len(NAMES),
        "labels": ["label"],
        "features": features,
    }
    (folder / "feature_map.json").write_text(json.dumps(feature_map))


def write_config(prepared: Path, path: Path, dim: int) -> None:
    config = {
        "name": "end_to_end",
        "data": {"path": str(prepared)},
        "model": {"name": "deepfm", "embedding_dim": dim, "hidden": [1024, 1024]},
        "train": {"epochs": 1, "batch_size": BATCH, "table_optimizer": "rowwise_adagrad"},
    }
    path.write_text(yaml.safe_dump(config))


def run(command: list[str], **environment: str) -> tuple[float, str]:
    """Seconds of a whole process, and what it printed."""
    begun = time.perf_counter()
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return time.perf_counter() - begun, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, help="of a virtual environment with fuxictr")
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--rows", type=int, default=64 * BATCH)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--regularizer", type=float, default=0.0, help="FuxiCTR's embedding_regularizer")
    parser.add_argument("--given-back", action="store_true", help="FuxiCTR as the system allocates memory")
    parser.add_argument("--overrides", nargs="*", default=[], metavar="KEY=VALUE", help="for sseds")
    arguments = parser.parse_args()
    peer = str(Path(__file__).with_name("end_to_end_fuxictr.py"))
    memory = {} if arguments.given_back else KEPT
    print("| d | sseds, samples/s | FuxiCTR, samples/s | ratio | sseds, s | FuxiCTR, s | ratio |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_set(folder / "prepared", arguments.rows)
        write_fuxictr_set(folder / "prepared", folder / "fuxictr")
        for dim in arguments.dims:
            write_config(folder / "prepared", folder / f"{dim}.yaml", dim)
            theirs = [arguments.peer_python, peer, str(folder / "fuxictr"), str(dim), str(arguments.regularizer)]
            rates, seconds = ([], []), ([], [])
            for pair in range(arguments.pairs):
                run_folder = folder / f"run-{dim}-{pair}"
                ours = [sys.executable, "-m", "sseds_rec", "train", str(folder / f"{dim}.yaml"), *arguments.overrides]
                seconds[0].append(run([*ours, "--run-dir", str(run_folder)])[0])
                rates[0].append(json.loads((run_folder / "metrics.json").read_text())["pretrain"]["samples_per_second"])
                elapsed, printed = run(theirs, **memory)
                seconds[1].append(elapsed)
                rates[1].append(float(printed.split()[-1]))
            medians = [statistics.median(values) for values in (*rates, *seconds)]
            print(
                f"| {dim} | {medians[0]:,.0f} | {medians[1]:,.0f} | {_range(*rates)} "
                f"| {medians[2]:.0f} | {medians[3]:.0f} | {_range(*reversed(seconds))} |",
                flush=True,
            )


def _range(above: list[float], below: list[float]) -> str:
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"


if __name__ == "__main__":
    main()
