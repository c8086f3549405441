"""A checkpoint of the full model -> one of the slim model, column by column, on disk."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from sseds_rec.distributed.checkpoint import read_checkpoint_metadata
from sseds_rec.distributed.runtime import ALONE, Runtime
from sseds_rec.errors import UserError
from sseds_rec.search.plan import DimensionPlan
from sseds_rec.slim.offline.figures import Figures
from sseds_rec.slim.offline.job import HelperKilled, Job, helpers, locked
from sseds_rec.slim.offline.state_file import slim_state_file
from sseds_rec.slim.offline.verify import verify

#: Bytes to read and write below which one process is done before others would have started.
_WORTH_A_PROCESS = 4 << 30


def slim_checkpoint(
    src: str | Path,
    dst: str | Path,
    plan: DimensionPlan,
    processes: int | None = None,
    collective: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> Path:
    """Converts a checkpoint to the plan's widths, offline: without a model, a GPU or the cluster it was trained on.

    `src` is a folder of `torch.distributed.checkpoint` (DCP), saved by any number of ranks under any sharding, or a file of
    weights: a state dict by `torch.save`, nested or not, or safetensors (`.safetensors`). `dst` will be of the same kind.

    Entries `<path>.embedding_bags.<table>.weight` and `<path>.embeddings.<table>.weight`, and any state below these names of
    shape [rows, original_dim], become [rows, stored_dim] (padding is zero); those of dropped tables are left out. Row-wise
    state [rows] stays. That of column-wise shards, [shards * rows], becomes [rows], their mean weighted by their widths: what
    row-wise Adagrad sums without such shards. All other entries are copied as they are.

    Rows v of a rotated table become Tᵀ(v - μ), and optimizer state turns as gradients do: running means by Mᵀ, exactly, running
    squares by (M∘M)ᵀ, what E[(Mᵀg)²] is if the entries of g are independent.

    Memory: 64 MB of the new checkpoint and a few of the old one a process, whatever the tables' sizes. Nothing of a checkpoint is
    unpickled but tensors and DCP's own metadata. All bytes that are read are compared with the checksums they were saved with,
    and rows at random places of the new checkpoint with the old.

    `dst` appears complete or not at all. A killed conversion of a folder leaves `.<dst>.converting` beside it, with the parts
    that are done; the same call goes on from there. One that fails leaves nothing.

    Args:
        src: checkpoint of the full model; only read.
        dst: folder or file to make; must not exist, or be an empty folder.
        plan: which columns stay.
        processes: on this machine, for a folder; by default as many as it has cores, or one for a few gigabytes.
        collective: whether all ranks of the default process group make this call, with the same arguments and a common file
            system; each then converts its share of a folder, on as many nodes as they are on, and `processes` is not used.
        on_progress: called at the start, and after every part of about a gigabyte that this process makes, with how many parts
            are done, by all processes, and how many there are; of several ranks, on the first.

    Returns:
        `dst`.

    Raises:
        UserError: `src` is no checkpoint or is damaged, `dst` is there, the disk is too small or full, the plan is of another
            model (names the table), or a rotated table has optimizer state of which it is not known how it turns (names it).
    """
    convert(src, dst, plan, processes, collective, on_progress)
    return Path(dst)


def convert(
    src: str | Path,
    dst: str | Path,
    plan: DimensionPlan,
    processes: int | None,
    collective: bool,
    on_progress: Callable[[int, int], None],
) -> Figures:
    """`slim_checkpoint`, and what it did; of all ranks together, on all ranks."""
    begun = time.monotonic()
    src, dst = Path(src), Path(dst)
    place = Runtime(dist.get_rank(), dist.get_world_size(), torch.device("cpu")) if collective else ALONE
    with _failures_in_one_line(dst):
        place.on_main(lambda: _check_destination(src, dst))
        if place.from_main(src.is_file):
            figures = place.from_main(lambda: slim_state_file(src, dst, plan))
        else:
            figures = _slim_folder(src, dst, plan, processes, place, on_progress)
    return replace(figures, seconds=time.monotonic() - begun)


def _slim_folder(
    src: Path,
    dst: Path,
    plan: DimensionPlan,
    processes: int | None,
    place: Runtime,
    on_progress: Callable[[int, int], None],
) -> Figures:
    folder = dst.with_name(f".{dst.name}.converting")
    with contextlib.ExitStack() as held:
        place.on_main(lambda: held.enter_context(locked(folder)))
        try:
            begun: list[Job] = []
            place.on_main(lambda: begun.append(Job.begin(folder, src, plan)))
            job = place.on_all(lambda: begun[0] if begun else Job.join(folder))
            missing, parts = job.missing, len(job.conversion.parts)

            def report() -> None:
                if place.is_main:  # counting them asks the file system for each
                    on_progress(parts - len(job.missing), parts)

            report()
            if place.world_size > 1:
                place.on_all(lambda: job.work(place.rank, place.world_size, report))
            else:
                _work_here(job, processes or _processes_worth(job), report)
            return place.from_main(lambda: _complete(job, dst, missing))
        except HelperKilled:
            raise  # what is done is as good as after a kill of this process
        except (UserError, OSError):
            place.on_main(lambda: shutil.rmtree(folder, ignore_errors=True))
            raise


def _work_here(job: Job, processes: int, report: Callable[[], None]) -> None:
    with helpers(job.folder, processes - 1) as check:

        def done() -> None:
            check(False)
            report()

        job.work(0, processes, done)
        check(True)


def _processes_worth(job: Job) -> int:
    cost = sum(item.cost for part in job.missing for item in job.conversion.parts[part])
    return max(1, min(len(os.sched_getaffinity(0)), cost // _WORTH_A_PROCESS))


def _complete(job: Job, dst: Path, made: list[int]) -> Figures:
    read, written = job.finish(made)
    rows = verify(job.conversion, job.folder)
    job.publish(dst)
    return Figures(read, written, rows, len(made), len(job.conversion.parts) - len(made))


def _check_destination(src: Path, dst: Path) -> None:
    if not dst.name:
        raise UserError(f"{dst}: name the folder or file to make")
    if dst.exists() and (src.is_file() or not dst.is_dir() or any(dst.iterdir())):
        raise UserError(f"{dst}: exists already; remove it or choose another")
    if not src.is_file():
        read_checkpoint_metadata(src)  # before anything is made beside DST
    if src.resolve() in dst.resolve().parents:
        raise UserError(f"{dst}: is inside of {src}, which is only read; choose another place")


@contextlib.contextmanager
def _failures_in_one_line(dst: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = error.filename or dst
        raise UserError(f"{where}: {error.strerror or error}; nothing was made at {dst}") from None
