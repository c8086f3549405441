"""`sseds slim SRC DST --plan plan.json` beside `cp`, speed and memory: `python benchmarks/slim_checkpoint.py [--gib 16]`.

Generates a checkpoint folder as four ranks would have saved it, of four tables of 128 float32 columns: one in a single chunk of
a quarter of all bytes, one by rows over the ranks, one in column-wise shards with row-wise Adagrad, one with Adam moments; and a
dense weight. The plans keep 12 columns of each table, as they are and rotated.

Turn about, with all that is to be read dropped from the page cache before each: `cp` of a file to another, and conversions by
one and two processes. Each command is timed from its start until it has exited; that is for a conversion also the time in which
Python and torch start. After `cp` the file is synced, within its time, since conversions wait for the disk too. A
conversion reads R bytes and writes W; `cp` of B bytes reads B and writes B, with B about (R + W) / 2. Speed is bytes read and
written over seconds, for both. Memory is the highest resident size of any process, as the kernel counts it. Prints a
Markdown table; exits 1 if a ratio of speeds is below 0.5 or a process took 1.5 GiB. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from sseds_rec.search.plan import DimensionPlan, TablePlan
from sseds_rec.search.rotation import Rotation

LEAST_RATIO = 0.5
MOST_MEMORY = 1.5  # GiB
DIM, KEPT, RANKS = 128, 12, 4
ADAM = ("", ".exp_avg", ".exp_avg_sq")
#: Table -> share of the checkpoint's bytes, with its optimizer state.
SHARES = {"whole": 0.25, "by_rows": 0.35, "by_columns": 0.12, "adam": 0.28}


class Chunk(NamedTuple):
    """What one rank saves of an entry."""

    entry: str
    rank: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def rows_of(gib: float) -> dict[str, int]:
    """Table -> rows."""
    copies = dict.fromkeys(SHARES, 1) | {"adam": len(ADAM)}
    return {
        table: int(share * gib * 2**30 / (4 * DIM * copies[table])) // RANKS * RANKS for table, share in SHARES.items()
    }


def chunks(rows: dict[str, int]) -> Iterator[Chunk]:
    """All of the checkpoint, in the order in which the ranks save it."""
    weight = "model.ebc.embedding_bags.{}.weight"
    state = "optimizer.state.ebc.embedding_bags.{0}.weight.{0}.momentum1"
    yield Chunk(weight.format("whole"), 0, (0, 0), (rows["whole"], DIM))
    part, width = rows["by_rows"] // RANKS, DIM // RANKS
    for rank in range(RANKS):
        yield Chunk(weight.format("by_rows"), rank, (rank * part, 0), (part, DIM))
        yield Chunk(weight.format("by_columns"), rank, (0, rank * width), (rows["by_columns"], width))
        yield Chunk(state.format("by_columns"), rank, (rank * rows["by_columns"],), (rows["by_columns"],))
    for name in ADAM:
        entry = weight.format("adam") if not name else f"optimizer.state.ebc.embedding_bags.adam.weight{name}"
        yield Chunk(entry, 3, (0, 0), (rows["adam"], DIM))
    yield Chunk("model.over.weight", 0, (0, 0), (4096, 1024))


def generate(folder: Path, rows: dict[str, int]) -> None:
    """Writes a checkpoint chunk by chunk, with one chunk in memory."""
    folder.mkdir(parents=True)
    block = torch.randn(1 << 20)
    entries: dict[str, TensorStorageMetadata] = {}
    results = []
    for chunk in chunks(rows):
        name = f"__{chunk.rank}_0.distcp"
        with open(folder / name, "ab") as file:
            position = file.tell()
            torch.save(content(block, chunk.sizes), file)
            info = _StorageInfo(name, position, file.tell() - position)
        results.append(WriteResult(MetadataIndex(chunk.entry, chunk.offsets), info.length, info))
        own = ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
        before = entries[chunk.entry].chunks if chunk.entry in entries else []
        size = torch.Size(offset + length for offset, length in zip(chunk.offsets, chunk.sizes, strict=True))
        entries[chunk.entry] = TensorStorageMetadata(TensorProperties(torch.float32), size, [*before, own])
    FileSystemWriter(folder).finish(Metadata(dict(entries)), [results])


def content(block: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Numbers at random, the same ones again and again."""
    values = torch.empty(torch.Size(sizes).numel())
    for part in values.split(len(block)):
        part.copy_(block[: len(part)])
    return values.view(sizes)


def save_plan(path: Path, rows: dict[str, int], rotated: bool) -> None:
    """A plan that keeps 12 columns of each table, at random places, or 12 coordinates."""
    draw = torch.Generator().manual_seed(2022)
    tables, rotations = {}, {}
    for table, count in rows.items():
        kept = sorted(torch.randperm(DIM, generator=draw)[:KEPT].tolist())
        tables[table] = TablePlan(rows=count, original_dim=DIM, kept=kept, embedding_dim=KEPT, stored_dim=KEPT)
        if rotated:
            turn = torch.linalg.qr(torch.randn(DIM, DIM, generator=draw, dtype=torch.float64)).Q
            rotations[table] = Rotation(turn, turn.clone(), torch.zeros(DIM, dtype=torch.float64)).keep(kept)
    DimensionPlan(tables=tables, budget={}, reached={}, rotations=rotations).save(path)


class Measured(NamedTuple):
    """One command: seconds, those of them after it had started, bytes moved, and the peak GiB of the largest process."""

    seconds: float
    own_seconds: float
    moved: int
    memory: float

    @property
    def speed(self) -> float:
        """MB/s, read and written."""
        return self.moved / self.seconds / 1e6


def family(process: int) -> list[int]:
    """A process and all that it started."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return []
    return [process, *(own for child in children for own in family(int(child)))]


def peak(process: int) -> float:
    """GiB that the largest of a family has held so far."""
    largest = 0
    for own in family(process):
        try:
            lines = Path(f"/proc/{own}/status").read_text().splitlines()
        except OSError:
            continue
        largest = max([largest, *(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))])
    return largest / 2**20


def drop_from_cache(folder: Path) -> None:
    """Makes the next to read the files of a folder read them from the disk."""
    os.sync()
    for path in (path for path in folder.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(command: list[str | Path], then_sync: Path | None = None) -> tuple[Measured, str]:
    """Runs it; the bytes it moved are those of its last line, or twice what it copied."""
    begun = time.perf_counter()
    memory = 0.0
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, stdout=out)
        while process.poll() is None:
            memory = max(memory, peak(process.pid))
            time.sleep(0.05)
        if process.returncode:
            sys.exit(f"{command} failed")
        if then_sync:
            subprocess.run(["sync", then_sync], check=True)
        seconds = time.perf_counter() - begun
        out.seek(0)
        said = out.read()
    if then_sync:
        return Measured(seconds, seconds, 2 * then_sync.stat().st_size, memory), said
    figures = json.loads(said.splitlines()[-1])
    return Measured(seconds, figures["seconds"], figures["bytes_read"] + figures["bytes_written"], memory), said


def spread(values: list[float], digits: int) -> str:
    """Median [quartiles]."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=16, help="size of the checkpoint")
    parser.add_argument("--rounds", type=int, default=3, help="how often each command runs")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="where there is room")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="slim_checkpoint-", dir=args.work))
    try:
        rows = rows_of(args.gib)
        generate(work / "full", rows)
        size = sum(path.stat().st_size for path in (work / "full").iterdir())
        print(f"checkpoint: {size / 2**30:.2f} GiB, {rows}", flush=True)
        single, single_copy = work / "single", work / "single.copy"
        with open(single, "wb") as target:
            left = int(size * (1 + KEPT / DIM) / 2)
            for path in sorted((work / "full").glob("*.distcp")):
                with open(path, "rb") as source:
                    while left and (piece := source.read(min(left, 1 << 24))):
                        left -= target.write(piece)
        for rotated in (False, True):
            save_plan(work / f"plan{rotated:d}.json", rows, rotated)
        slim, dst = [sys.executable, "-W", "ignore", "-m", "sseds_rec", "slim", work / "full"], work / "slim"
        commands: dict[str, list[str | Path]] = {"cp": ["cp", single, single_copy]}
        for name, rotated, processes in (("kept", 0, 1), ("kept", 0, 2), ("rotated", 1, 1), ("rotated", 1, 2)):
            options = ["--plan", work / f"plan{rotated}.json", "--processes", str(processes), "--json"]
            commands[f"{name}, {processes} process{'es' * (processes > 1)}"] = [*slim, dst, *options]
        found: dict[str, list[Measured]] = {name: [] for name in commands}
        for _ in range(args.rounds):
            for name, command in commands.items():
                drop_from_cache(work)
                measured, said = measure(command, single_copy if name == "cp" else None)
                found[name].append(measured)
                print(f"{name}: {measured.seconds:.1f} s, {measured.speed:.0f} MB/s, {said.strip()}", file=sys.stderr)
                single_copy.unlink(missing_ok=True)
                shutil.rmtree(dst, ignore_errors=True)
        print(f"rounds: {args.rounds}\n")
        headings = (
            "",
            "GB read and written",
            "seconds",
            "of them converting",
            "MB/s",
            "over cp",
            "peak GiB of a process",
        )
        print(f"| {' | '.join(headings)} |\n{'|---' * len(headings)}|")
        missed = False
        for name, own in found.items():
            ratios = [ours.speed / cp.speed for ours, cp in zip(own, found["cp"], strict=True)]
            memory = max(measured.memory for measured in own)
            missed |= statistics.median(ratios) < LEAST_RATIO or memory > MOST_MEMORY
            cells = (
                spread([m.seconds for m in own], 1),
                spread([m.own_seconds for m in own], 1),
                spread([m.speed for m in own], 0),
                spread(ratios, 2),
            )
            print(f"| {name} | {own[0].moved / 1e9:.1f} | {' | '.join(cells)} | {memory:.2f} |")
        sys.exit(missed)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
