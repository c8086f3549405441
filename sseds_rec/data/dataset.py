"""A data set, whoever wrote it: its schema, and its rows block by block."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from sseds_rec.data.config import DataConfig, ParquetConfig, TorchRecNpyConfig
from sseds_rec.data.foreign import ForeignParquet
from sseds_rec.data.npy import TorchRecNpy
from sseds_rec.data.parquet import ParquetBlocks
from sseds_rec.data.rows import Rows
from sseds_rec.data.schema import LABEL, Schema, SplitName
from sseds_rec.errors import UserError
from sseds_rec.files import join

_AGAIN = "prepare the data set again"


class Blocks(Protocol):
    """The rows of one split, in blocks that fit in memory.

    Attributes:
        sizes: Rows of each block, none of them 0.
    """

    sizes: list[int]

    def read(self, index: int) -> Rows:
        """Reads one block, checked; any number of threads may at once.

        Raises:
            UserError: The file is damaged, or a cell is not what the schema says; names file, row and field.
        """


class Dataset(Protocol):
    """Rows to train on; can be sent to other processes.

    Attributes:
        path: Where it lies, for messages.
        schema: What it holds.
    """

    path: str
    schema: Schema

    def blocks(self, split: SplitName) -> Blocks:
        """The rows of a split.

        Raises:
            UserError: A file is missing or damaged.
        """


class PreparedSet:
    """A set that `sseds prepare` wrote: Parquet parts and `schema.json`.

    Raises:
        UserError: There is none, or its schema is not one this version can read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self.schema = Schema.load(path)

    def blocks(self, split: SplitName) -> ParquetBlocks:
        files = [join(self.path, file) for file in self.schema.splits[split].files]
        blocks = ParquetBlocks(files, self.schema.fields, LABEL, _AGAIN)
        found, said = sum(blocks.sizes), self.schema.splits[split].rows
        if found != said:
            raise UserError(f"{self.path}: the {split} files hold {found} rows, schema.json says {said}; {_AGAIN}")
        return blocks


def open_dataset(config: DataConfig) -> Dataset:
    """Opens the data of a config's `data` section.

    Of a prepared set this reads `schema.json`. What other tools wrote has none: opening it takes a pass over the label
    column, and for table sizes that the config does not give a pass over the ids. On several ranks, let one do it.

    Raises:
        UserError: Files are missing, damaged or not what the config says; names the file.
    """
    if isinstance(config, TorchRecNpyConfig):
        return TorchRecNpy(config)
    if isinstance(config, ParquetConfig):
        return ForeignParquet(config)
    return PreparedSet(config.path)
