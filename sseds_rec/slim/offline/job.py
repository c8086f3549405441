"""A conversion in progress: a hidden folder beside the destination, which any number of processes fill, one after another too."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import xxhash
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from sseds_rec.errors import UserError
from sseds_rec.files import read_json, write_json
from sseds_rec.search.plan import DimensionPlan
from sseds_rec.slim.offline import dcp
from sseds_rec.slim.offline.dcp import DcpConversion, WrittenItem
from sseds_rec.slim.offline.stored import check_room, sync

_JOB, _PLAN = "job.json", "plan.json"
_ITEMS = TypeAdapter(list[WrittenItem])


class HelperKilled(UserError):
    """Another process of the conversion was killed; what is done is whole."""


class _Record(BaseModel):
    """What `job.json` holds.

    Attributes:
        src: the checkpoint to convert, as an absolute path.
        digest: of it and of the plan; a job with another is another job.
    """

    model_config = ConfigDict(extra="forbid")

    src: str
    digest: str


class Job:
    """`.<dst>.converting/`, with the parts that are done.

    Args:
        folder: the hidden folder.
        conversion: what to do.
    """

    def __init__(self, folder: Path, conversion: DcpConversion) -> None:
        self.folder, self.conversion = folder, conversion

    @classmethod
    def begin(cls, folder: Path, src: Path, plan: DimensionPlan) -> Job:
        """Begins in the folder, or goes on with what a killed job left there; what another left is removed.

        Raises:
            UserError: see `DcpConversion`; or the disk has too little room for what is left to do.
        """
        job = cls(folder, DcpConversion(src, plan))
        record = _Record(src=str(src.absolute()), digest=_digest(src, plan))
        same = job._is(record)
        for left in folder.iterdir():
            if not same or left.name.startswith(".part-"):  # half a part
                left.unlink()
        job._check_room()
        plan.save(folder / _PLAN)
        write_json(folder / _JOB, record.model_dump())
        return job

    @classmethod
    def join(cls, folder: Path) -> Job:
        """The job that another process began.

        Raises:
            UserError: see `DcpConversion`.
        """
        record = _Record.model_validate(read_json(folder / _JOB))
        return cls(folder, DcpConversion(Path(record.src), DimensionPlan.load(folder / _PLAN)))

    @property
    def missing(self) -> list[int]:
        """Numbers of the parts that are not done."""
        return [part for part in range(len(self.conversion.parts)) if not self._items_file(part).exists()]

    def work(self, share: int, shares: int, done: Callable[[], None] = lambda: None) -> None:
        """Makes every `shares`-th of the parts, and then those that no other process has begun: some start later or are slower.

        Args:
            share: which of them, in [0, shares).
            shares: how many processes work.
            done: called after each.

        Raises:
            UserError: the checkpoint is damaged.
        """
        parts = range(len(self.conversion.parts))
        for part in [*parts[share::shares], *(part for part in reversed(parts) if part % shares != share)]:
            # (Two that begin the same part at the same time do no harm.)
            if not self._items_file(part).exists() and not any(self.folder.glob(f".part-{part}.*")):
                self._make(part)
                done()

    def _make(self, part: int) -> None:
        # Of its own name: a process whose parent was killed may be at the same part.
        temporary = self.folder / f".part-{part}.{os.uname().nodename}.{os.getpid()}"
        try:
            written = self.conversion.write(self.conversion.parts[part], temporary)
            sync(temporary)
            os.replace(temporary, self.folder / _data_file(part))
        finally:
            temporary.unlink(missing_ok=True)
        write_json(self._items_file(part), _ITEMS.dump_python(written))

    def finish(self, made: Sequence[int]) -> tuple[int, int]:
        """Writes the metadata, once all processes are done; what is left is a checkpoint.

        Args:
            made: numbers of parts.

        Returns:
            Bytes that were read and written for these.

        Raises:
            UserError: the bytes that were read are not those that were saved.
        """
        for part in self.missing:  # begun by a process of a killed job, which has ended since
            self._make(part)
        items = [
            _ITEMS.validate_python(read_json(self._items_file(part))) for part in range(len(self.conversion.parts))
        ]
        self.conversion.finish(self.folder, {_data_file(part): own for part, own in enumerate(items)})
        own = [item for part in made for item in items[part]]
        return sum(map(self.conversion.bytes_read, own)), sum(item.length for item in own)

    def publish(self, dst: Path) -> None:
        """Gives the folder its name."""
        for path in self.folder.iterdir():
            if path.name != ".metadata" and not path.name.endswith(".distcp"):
                path.unlink()
        sync(self.folder)
        os.replace(self.folder, dst)

    def _items_file(self, part: int) -> Path:
        return self.folder / f"part-{part}.json"

    def _is(self, record: _Record) -> bool:
        """Whether the folder is of this job, and whole enough to go on with."""
        try:
            return _Record.model_validate(read_json(self.folder / _JOB)) == record
        except (UserError, ValidationError):
            return False

    def _check_room(self) -> None:
        parent = next(path for path in self.folder.absolute().parents if path.exists())
        parts = self.conversion.parts
        check_room(parent, sum(item.size for part in self.missing for item in parts[part]), "checkpoint")


def _data_file(part: int) -> str:
    return f"__{part}_0.distcp"


def _digest(src: Path, plan: DimensionPlan) -> str:
    """Of a checkpoint's metadata, which names its save, of its files' sizes and times, of the plan, and of how parts are cut."""
    digest = xxhash.xxh3_64()
    digest.update(repr(dcp.CUTS).encode())
    digest.update((src / ".metadata").read_bytes())
    for path in sorted(src.glob("*.distcp")):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    digest.update(plan.model_dump_json().encode())
    for name, rotation in sorted(plan.rotations.items()):
        digest.update(name.encode())
        for matrix in (rotation.forward, rotation.inverse, rotation.mean):
            digest.update(matrix.contiguous().numpy(force=True).tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes a folder if there is none, and keeps others from converting in it at the same time.

    Raises:
        UserError: another process does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is converting to the same place; wait for it") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def helpers(folder: Path, count: int) -> Iterator[Callable[[bool], None]]:
    """Starts processes that make the shares 1 to `count` of a job whose share 0 is this process's.

    Yields:
        Raises what a process failed with that has ended; waits for all if it is given true.
    """
    command = [sys.executable, "-m", "sseds_rec.slim.offline.helper", str(folder)]
    running = [
        subprocess.Popen([*command, str(share), str(count + 1)], stderr=subprocess.PIPE, text=True)
        for share in range(1, count + 1)
    ]

    def check(wait: bool) -> None:
        for process in running:
            if wait:
                process.wait()
            if process.poll() is None or process.returncode == 0:
                continue
            if process.returncode < 0:
                raise HelperKilled(
                    f"{folder}: a process of the conversion was ended by signal {-process.returncode}; "
                    "the same call goes on from there"
                )
            assert process.stderr is not None
            said = process.stderr.read().strip().splitlines()
            raise UserError(said[-1] if said else "a process of the conversion failed")

    try:
        yield check
    finally:
        for process in running:
            process.kill()
            process.wait()
