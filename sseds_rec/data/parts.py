"""Part files: encoded rows on disk, written in bounded memory, whole or not at all."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
from iopath.common.file_io import g_pathmgr

from sseds_rec.data.schema import FILE_NAME, SPLITS, SplitName
from sseds_rec.errors import UserError
from sseds_rec.files import check_store, exists, is_local, join

PART_ROWS = 1 << 20
ROW_GROUP_ROWS = 1 << 16
OPEN_PARTS = 64  # that train rows are dealt to at a time


@contextlib.contextmanager
def new_folder(output: str | Path, overwrite: bool = False, marker: str = FILE_NAME) -> Iterator[Path]:
    """Yields a temporary folder that becomes `output` when the block ends well, and vanishes when it does not.

    In a store registered with iopath, the files are copied one by one, `schema.json` last: without it, there is no set.

    Args:
        output: Must not exist, or be an empty folder, or with `overwrite` an earlier prepared set.
        overwrite: Replace an earlier prepared set.
        marker: The file by which an earlier one is known.

    Raises:
        UserError: `output` holds something else.
    """
    if not is_local(check_store(output)):
        with _new_remote_folder(str(output), overwrite) as folder:
            yield folder
        return
    final = Path(output).absolute()
    if final.exists() and not final.is_dir():
        raise UserError(f"{output}: is a file; name a folder for the prepared set")
    temporary, replaced = final.with_name(f".{final.name}.tmp"), final.with_name(f".{final.name}.old")
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        with _locked(temporary, output):
            try:
                if replaced.exists() and not final.exists():  # a run was killed while it replaced this one
                    os.replace(replaced, final)
                shutil.rmtree(replaced, ignore_errors=True)
                _check_free(final, output, overwrite, marker)
                for left in temporary.iterdir():  # by a killed run
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
                yield temporary
                if final.exists():
                    os.replace(final, replaced)
                os.replace(temporary, final)
                shutil.rmtree(replaced, ignore_errors=True)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror or error})") from error


def _check_free(final: Path, output: str | Path, overwrite: bool, marker: str) -> None:
    if not final.exists() or not any(final.iterdir()):
        return
    if not (final / marker).exists():
        raise UserError(f"{output}: exists and holds other files; name a new folder")
    if not overwrite:
        raise UserError(f"{output}: holds a prepared set already; name a new folder, or ask to overwrite it")


@contextlib.contextmanager
def _locked(folder: Path, output: str | Path) -> Iterator[None]:
    """Keeps other runs from writing the same output; the lock ends with the process, however that ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"{output}: another run is writing it; wait for it, or name another folder") from None
    finally:
        os.close(handle)


@contextlib.contextmanager
def _new_remote_folder(output: str, overwrite: bool) -> Iterator[Path]:
    marker = join(output, FILE_NAME)
    if exists(marker):
        if not overwrite:
            raise UserError(f"{output}: holds a prepared set already; name a new folder, or ask to overwrite it")
        g_pathmgr.rm(marker)
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)
        files = sorted(path for path in Path(temporary).rglob("*") if path.is_file() and path.name != FILE_NAME)
        for path in [*files, Path(temporary) / FILE_NAME]:
            target = join(output, str(path.relative_to(temporary)))
            g_pathmgr.mkdirs(os.path.dirname(target))
            g_pathmgr.copy_from_local(str(path), target, overwrite=True)


class PartWriter:
    """Sends every row to its part file; the train rows end up in random order.

    A part is about `PART_ROWS` rows, so that it can be shuffled in memory once it is complete. Train rows are dealt at
    random to the next `OPEN_PARTS` parts and shuffled inside them: a permutation that is random over all train rows, or
    if they are more than `OPEN_PARTS` parts, over as many at a time. The other splits keep the order of the source.

    Use it as a context manager; when the block ends well, all parts are complete.

    Args:
        folder: Where `train/`, `validation/` and `test/` are made.
        train_rows: How many there will be.
        seed: Of the order of the train rows.

    Attributes:
        files: Of each split, relative to the folder.
    """

    def __init__(self, folder: Path, train_rows: int, seed: int) -> None:
        self.files: dict[SplitName, list[str]] = {split: [] for split in SPLITS}
        self._folder, self._seed, self._train_parts = folder, seed, -(-train_rows // PART_ROWS)
        self._deal = np.random.default_rng([seed, 0])
        self._written = dict.fromkeys(SPLITS, 0)
        self._finished = dict.fromkeys(SPLITS, 0)
        # Parts are finished beside the encoding of the rows that follow; each takes the memory of a part, a few times.
        self._finisher = ThreadPoolExecutor(2)
        self._finishing: list[Future[None]] = []

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        if not failed:
            for split in SPLITS:
                self._finish(split, max(self._train_parts, -(-self._written[split] // PART_ROWS)))
        self._finisher.shutdown(cancel_futures=bool(failed))
        for done in self._finishing if not failed else []:
            done.result()

    def write(self, rows: pl.DataFrame, split_of: npt.NDArray[np.int8]) -> None:
        """Takes the next rows of the source, and the index into `SPLITS` of each."""
        for index, split in enumerate(SPLITS):
            mine = np.flatnonzero(split_of == index)
            if not len(mine):
                continue
            numbers = self._written[split] + np.arange(len(mine))
            part_of = self._dealt(numbers) if split == "train" else numbers // PART_ROWS
            order = part_of.argsort(kind="stable")
            table = rows[mine[order]].to_arrow()
            parts, starts = np.unique(part_of[order], return_index=True)
            for part, start, stop in zip(parts, starts, [*starts[1:], len(mine)], strict=True):
                raw = self._raw(split, part)
                raw.parent.mkdir(exist_ok=True)
                with open(raw, "ab") as file, pa.ipc.new_stream(file, table.schema) as stream:
                    stream.write_table(table.slice(start, stop - start))
            self._written[split] += len(mine)
            together = OPEN_PARTS if split == "train" else 1
            self._finish(split, self._written[split] // (together * PART_ROWS) * together)

    def _dealt(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        first = numbers // (OPEN_PARTS * PART_ROWS) * OPEN_PARTS
        open_parts = np.minimum(self._train_parts - first, OPEN_PARTS)
        return first + (self._deal.random(len(numbers)) * open_parts).astype(np.int64)

    def _finish(self, split: SplitName, complete: int) -> None:
        """Starts to turn parts before number `complete` into Parquet files."""
        for part in range(self._finished[split], complete):
            if self._raw(split, part).exists():
                self.files[split].append(f"{split}/part-{part:05d}.parquet")
                self._finishing.append(self._finisher.submit(self._write_parquet, split, part))
        self._finished[split] = max(self._finished[split], complete)

    def _write_parquet(self, split: SplitName, part: int) -> None:
        raw = self._raw(split, part)
        tables = []
        with open(raw, "rb") as file:
            while file.tell() < raw.stat().st_size:
                with pa.ipc.open_stream(file) as stream:
                    tables.append(stream.read_all())
        rows = pl.DataFrame(pl.from_arrow(pa.concat_tables(tables)))
        if split == "train":
            rows = rows[np.random.default_rng([self._seed, 1, part]).permutation(rows.height)]
        # dictionary pages and LZ4 decode faster than anything else that is not twice the size
        target = raw.with_name(f"part-{part:05d}.parquet")
        rows.write_parquet(target, compression="lz4", statistics=False, row_group_size=ROW_GROUP_ROWS)
        raw.unlink()

    def _raw(self, split: SplitName, part: int) -> Path:
        return self._folder / split / f"{part}.arrow"
