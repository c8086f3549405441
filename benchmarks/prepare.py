"""Time and memory of `sseds prepare criteo`, beside FuxiCTR 2.3: `python benchmarks/prepare.py --peer-python PYTHON`.

PYTHON is that of a virtual environment made for FuxiCTR, whose 2.3 does not run with polars 2:

    python -m venv fuxictr && fuxictr/bin/pip install "fuxictr==2.3.*" "polars<2"

Both prepare generated rows (`criteo_tsv.py`), turn about, each as a process of its own timed from start to exit:
vocabularies, ids, written Parquet. `sseds` gets all rows, FuxiCTR, which holds them in memory, the first of them. FuxiCTR 2.3
cannot split a CSV itself, so its three files are written before its time starts; `sseds prepare` reads the TSV and splits
within its time. FuxiCTR writes part files, as that is faster than its default of one file. The ratio is the median of the
pairs' ratios. Last, `sseds prepare` on FuxiCTR's file, where its start-up weighs more. Memory is the peak resident size of
the largest process, as the kernel counts it: all of `sseds prepare`, and FuxiCTR without its Ray workers. Prints a Markdown
table; exits 1 if the ratio is below 8 or the memory above 3 GiB. Linux only.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
from criteo_tsv import COLUMNS

HERE = Path(__file__).parent
LEAST_RATIO = 8.0  # of the rows/s, over FuxiCTR's
MOST_MEMORY = 3.0  # GiB
SPLITS = ("train", "valid", "test")


class Measured(NamedTuple):
    """One run of a command: wall clock, peak GiB of memory, and the machine's load average when it started."""

    seconds: float
    memory: float
    load: float

    def row(self, name: str, rows: int) -> str:
        """Of the Markdown table."""
        return f"| {name} | {rows:,} | {self.seconds:.1f} | {rows / self.seconds:,.0f} | {self.memory:.2f} | {self.load:.1f} |"


def generate(work: Path, rows: int) -> Path:
    """The TSV of so many rows, written unless it is there."""
    path = work / f"criteo_{rows}.tsv"
    if not path.exists():
        # In a process of its own: a child's peak memory would start from what this one holds.
        subprocess.run([sys.executable, HERE / "criteo_tsv.py", str(rows), path], check=True)
    return path


def split_for_peer(tsv: Path) -> Path:
    """FuxiCTR's input, written unless it is there: three CSV files with a header, the rows 8:1:1 at random."""
    folder = tsv.with_suffix("")
    if not folder.exists():
        temporary = folder.with_suffix(".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        files = [(temporary / f"{split}.csv").open("w") for split in SPLITS]
        for file in files:
            file.write(",".join(COLUMNS) + "\n")
        draw = random.Random(2022)
        with tsv.open() as lines:
            for line in lines:
                files[max(draw.randrange(10) - 7, 0)].write(line.replace("\t", ","))
        for file in files:
            file.close()
        temporary.rename(folder)
    return folder


def measure(command: list[str | Path], output: Path, inputs: list[Path], rows: int) -> Measured:
    """Runs a command that writes `output`, with its `inputs` in the page cache, and checks that it wrote so many rows."""
    shutil.rmtree(output, ignore_errors=True)
    for path in inputs:
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass
    log = output.with_suffix(".log")
    load = os.getloadavg()[0]
    with log.open("wb") as lines, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        # FuxiCTR 2.3.10 runs on Ray, which would leave files behind, and report its use to its makers.
        environment = os.environ | {"RAY_TMPDIR": scratch, "RAY_USAGE_STATS_ENABLED": "0"}
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=lines, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[0]} failed with {process.returncode}: see {log}")
    parts = (path for split in SPLITS for path in output.rglob(f"{split}*/*.parquet"))  # ours: validation
    written = sum(pq.read_metadata(path).num_rows for path in parts)
    if written != rows:
        raise SystemExit(f"{output}: {written} rows written of {rows}")
    return Measured(seconds, usage.ru_maxrss / 2**20, load)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, metavar="PYTHON")
    parser.add_argument("--rows", type=int, default=10_000_000, help="of the large file")
    parser.add_argument("--peer-rows", type=int, default=1_000_000, help="of FuxiCTR's file, the first of them")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument(
        "--work", type=Path, default=Path("runs/benchmark_prepare"), help="folder of the generated files"
    )
    arguments = parser.parse_args()
    work, rows, peer_rows = arguments.work, arguments.rows, min(arguments.peer_rows, arguments.rows)
    work.mkdir(parents=True, exist_ok=True)
    large, small = generate(work, rows), generate(work, peer_rows)
    csv = split_for_peer(small)

    def own(tsv: Path, rows: int) -> Measured:
        output = work / "sseds"
        command = [sys.executable, "-m", "sseds_rec", "prepare", "criteo", "--input", tsv, "--output", output]
        return measure(command, output, [tsv], rows)

    def peer() -> Measured:
        output = work / "fuxictr"
        command = [arguments.peer_python, HERE / "prepare_fuxictr.py", csv, output, str(peer_rows // 20)]
        return measure(command, output, list(csv.iterdir()), peer_rows)

    print("| | rows | seconds | rows/s | peak GiB | load before |\n|---|---|---|---|---|---|", flush=True)
    ratios, memory = [], 0.0
    for _ in range(arguments.pairs):
        theirs = peer()
        print(theirs.row("FuxiCTR", peer_rows), flush=True)
        ours = own(large, rows)
        print(ours.row("sseds", rows), flush=True)
        ratios.append(rows / ours.seconds / (peer_rows / theirs.seconds))
        memory = max(memory, ours.memory)
    print(own(small, peer_rows).row("sseds", peer_rows))
    ratio = statistics.median(ratios)
    print(f"\nrows/s over FuxiCTR's: {ratio:.1f} (of each pair: {', '.join(f'{value:.1f}' for value in ratios)})")
    print(f"peak memory at {rows:,} rows: {memory:.2f} GiB")
    if ratio < LEAST_RATIO or memory > MOST_MEMORY:
        raise SystemExit(f"missed: at least {LEAST_RATIO:g} times FuxiCTR's rows/s, at most {MOST_MEMORY:g} GiB")


if __name__ == "__main__":
    main()
