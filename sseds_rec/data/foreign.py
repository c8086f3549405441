"""Parquet that other tools wrote, its columns mapped in the config."""

from __future__ import annotations

from fnmatch import fnmatchcase

from iopath.common.file_io import g_pathmgr

from sseds_rec.data.config import ParquetConfig, SparseColumn
from sseds_rec.data.parquet import ParquetBlocks
from sseds_rec.data.schema import SPLITS, Field, Schema, Split, SplitName
from sseds_rec.errors import UserError
from sseds_rec.files import exists, join

_ADVICE = "correct the config's data section, or encode the files with `sseds prepare table`"


class ForeignParquet:
    """Parquet files as they are: nothing is encoded again, and nothing is written.

    An empty label or id is refused, an empty list is a row without ids, an empty dense cell is 0. Opening reads the footers
    and the label column.

    Raises:
        UserError: A pattern matches no file, a file is in two splits, or a file is not what the config says.
    """

    def __init__(self, config: ParquetConfig) -> None:
        self.path, self._label = config.path, config.label
        files = {split: _find(config, split) for split in SPLITS}
        splits = [(file, split) for split in SPLITS for file in files[split]]
        of: dict[str, str] = {}
        for file, split in splits:
            if of.setdefault(file, split) != split:
                raise UserError(f"{file}: is in both data.files.{of[file]} and data.files.{split}; name it in one")
        fields = [Field(name=name, kind="numeric", transform="stored") for name in config.dense]
        fields += [_field(name, column) for name, column in config.sparse.items()]
        counted = {}
        for split in SPLITS:
            blocks = ParquetBlocks(files[split], fields, self._label, _ADVICE)
            counted[split] = Split(rows=sum(blocks.sizes), positives=blocks.positives(), files=files[split])
        source = {"format": config.format, "path": config.path}
        self.schema = Schema(label=config.label, fields=fields, seed=0, source=source, splits=counted)

    def blocks(self, split: SplitName) -> ParquetBlocks:
        return ParquetBlocks(self.schema.splits[split].files, self.schema.fields, self._label, _ADVICE)


def _field(name: str, column: SparseColumn) -> Field:
    return Field(
        name=name,
        kind=column.kind,
        transform="modulo" if column.modulo else "stored",
        cardinality=column.cardinality,
        weights=column.weights,
        column=column.column,
    )


def _find(config: ParquetConfig, split: SplitName) -> list[str]:
    found: list[str] = []
    for pattern in getattr(config.files, split):
        matches = _expand(config.path, pattern)
        if not matches:
            raise UserError(f"{join(config.path, pattern)}: no such file, named in data.files.{split}")
        found += matches
    return list(dict.fromkeys(found))


def _expand(folder: str, pattern: str) -> list[str]:
    """Files that match, in order of their names; as elsewhere, `*` does not match names that begin with `.` or `_`."""
    paths = [folder]
    for part in pattern.split("/"):
        if not any(sign in part for sign in "*?["):
            paths = [join(path, part) for path in paths]
            continue
        found = [(path, name) for path in paths if g_pathmgr.isdir(path) for name in sorted(g_pathmgr.ls(path))]
        paths = [join(path, name) for path, name in found if name[0] not in "._" and fnmatchcase(name, part)]
    return [path for path in paths if exists(path)]
