"""Part files: encoded rows on disk, written in bounded memory, whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from sseds_rec.data.schema import FILE_NAME, SPLITS
from sseds_rec.errors import UserError

PART_ROWS = 1 << 20
ROW_GROUP_ROWS = 1 << 16


@contextlib.contextmanager
def new_folder(output: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary sibling folder that becomes `output` when the block ends well, and vanishes when it does not.

    Args:
        output: Must not exist, or be an empty folder, or with `overwrite` an earlier prepared set.
        overwrite: Replace an earlier prepared set.

    Raises:
        UserError: `output` holds something else.
    """
    final = Path(output).absolute()
    if final.exists() and not final.is_dir():
        raise UserError(f"{output}: is a file; name a folder for the prepared set")
    if final.exists() and any(final.iterdir()):
        if not (final / FILE_NAME).exists():
            raise UserError(f"{output}: exists and holds other files; name a new folder")
        if not overwrite:
            raise UserError(f"{output}: holds a prepared set already; name a new folder, or ask to overwrite it")
    temporary = final.with_name(f".{final.name}.tmp")
    replaced = final.with_name(f".{final.name}.old")
    for left_by_a_killed_run in (temporary, replaced):
        shutil.rmtree(left_by_a_killed_run, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if final.exists():
            os.replace(final, replaced)
        os.replace(temporary, final)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class PartWriter:
    """Sends every row to its part file; the train rows end up in random order.

    A part is at most `PART_ROWS` rows, so that it can be shuffled in memory once it is complete. Train rows are
    dealt to the parts at random and shuffled inside them: together a uniform permutation. The other splits
    keep the order of the source.

    Args:
        folder: Where `train/`, `validation/` and `test/` are made.
        split_of: Index into `SPLITS` of every row to come.
        seed: Of the order of the train rows.
    """

    def __init__(self, folder: Path, split_of: npt.NDArray[np.int8], seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.files: dict[str, list[str]] = {}
        self._part_of = np.empty(len(split_of), np.uint32)  # index into all files
        first = 0
        for index, split in enumerate(SPLITS):
            mine = split_of == index
            parts = np.arange(mine.sum()) // PART_ROWS
            if split == "train":
                np.random.default_rng([seed, 0]).shuffle(parts)
            self._part_of[mine] = first + parts
            count = int(parts.max()) + 1
            self.files[split] = [f"{split}/part-{part:05d}.parquet" for part in range(count)]
            first += count
        self._row = 0
        self._open: dict[int, pa.ipc.RecordBatchStreamWriter] = {}

    def write(self, rows: pl.DataFrame) -> None:
        """Takes the next rows of the source."""
        part_of = pl.Series("", self._part_of[self._row : self._row + rows.height])
        self._row += rows.height
        for (part,), mine in rows.with_columns(part_of).partition_by("", as_dict=True, include_key=False).items():
            table = mine.to_arrow()
            if part not in self._open:
                self._open[part] = pa.ipc.new_stream(str(self.folder / f"{part}.arrow"), table.schema)
            self._open[part].write_table(table)

    def close(self) -> None:
        """Turns what was collected into Parquet files."""
        for part, name in enumerate(name for names in self.files.values() for name in names):
            self._open.pop(part).close()
            raw = self.folder / f"{part}.arrow"
            with pa.ipc.open_stream(str(raw)) as stream:
                table = stream.read_all()
            if name in self.files["train"]:
                table = table.take(np.random.default_rng([self.seed, 1, part]).permutation(len(table)))
            target = self.folder / name
            target.parent.mkdir(exist_ok=True)
            # dictionary pages and LZ4 decode faster than anything else that is not twice the size
            pq.write_table(table.combine_chunks(), target, row_group_size=ROW_GROUP_ROWS, compression="lz4")
            raw.unlink()
