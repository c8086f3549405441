"""The windows of a folder: prepared sets whose ids grow, read as rows to predict and as rows to train on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import overload

import polars as pl
import torch
from iopath.common.file_io import g_pathmgr
from torch import Tensor

from sseds_rec.data.dataset import Blocks, PreparedSet
from sseds_rec.data.prepare import load_vocabulary
from sseds_rec.data.rows import Rows
from sseds_rec.data.schema import FILE_NAME, SPLITS, Field, Schema, Split, SplitName
from sseds_rec.data.vocabulary import RARE
from sseds_rec.errors import UserError
from sseds_rec.files import check_store, exists, join

_GROW = "prepare it with --vocabulary {before} --grow"


@dataclass(frozen=True)
class Window:
    """Rows of one stretch of time, whatever splits its set has.

    Attributes:
        name: of its folder.
        dataset: the prepared set.
        before: rows of each field's table before its ids came; None for the first window.
    """

    name: str
    dataset: PreparedSet
    before: dict[str, int] | None

    @property
    def rows(self) -> int:
        return sum(split.rows for split in self.dataset.schema.splits.values())

    @property
    def positives(self) -> int:
        return sum(split.positives for split in self.dataset.schema.splits.values())

    @property
    def table_rows(self) -> dict[str, int]:
        """Rows of each field's table that have an id once the window's ids are known."""
        return {field.name: field.cardinality or 0 for field in self.dataset.schema.sparse_fields}

    def blocks(self, as_known_before: bool) -> list[Blocks]:
        """All rows; `as_known_before` as they were encoded before the window's new ids were given."""
        blocks = [self.dataset.blocks(name) for name, split in self.dataset.schema.splits.items() if split.rows]
        if not as_known_before or self.before is None:
            return [*blocks]
        return [_Known(own, self.dataset.schema.sparse_fields, self.before) for own in blocks]


class Windows(Sequence[Window]):
    """The windows of a folder, in the order of their names.

    Args:
        folder: has a folder for each window, with a prepared set.

    Attributes:
        schema: of the last window: its tables have room for the ids of all, see `reserve`.

    Raises:
        UserError: there are none, or one has other fields or other ids than the one before (names it).
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        names = sorted(g_pathmgr.ls(check_store(folder))) if g_pathmgr.isdir(check_store(folder)) else []
        there = [
            name for name in names if name[0] != "." and exists(join(folder, name, FILE_NAME))
        ]  # not half-made ones
        sets = [(name, PreparedSet(join(folder, name))) for name in there]
        if not sets:
            raise UserError(
                f"{folder}: holds no windows, folders with a prepared set each; for those of the flights: "
                f"sseds prepare flights --windows week --output {folder}"
            )
        self._windows: list[Window] = []
        for name, dataset in sets:
            before = self._windows[-1] if self._windows else None
            if before is not None:
                _check_fields(before, dataset)
            self._windows.append(Window(name, dataset, before.table_rows if before else None))
        self.schema = sets[-1][1].schema

    def reserve(self, spare: float, begun_with: dict[str, int] | None) -> None:
        """Gives the tables the rows of a run: those of the last window and room for ids to come, or what it began with.

        Args:
            spare: share of the last window's rows by which tables with a vocabulary are larger.
            begun_with: rows of each field's table, of a run that has begun.

        Raises:
            UserError: windows that came since have more ids than that, or other tables (names the fields).
        """
        fields = []
        if begun_with is not None and set(begun_with) != set(self[-1].table_rows):
            raise UserError(
                f"{self.folder}: a run has begun with tables of {', '.join(begun_with)}, and now they are of "
                f"{', '.join(self[-1].table_rows)}; begin another --run-dir"
            )
        for field in self.schema.fields:
            rows = self[-1].table_rows.get(field.name)
            if rows is not None:
                room = math.ceil(rows * (1 + spare)) if field.vocabulary is not None else rows
                room = begun_with[field.name] if begun_with is not None else room
                if rows > room:
                    raise UserError(
                        f"{self.folder}: field {field.name!r} has {rows:,} ids by now, and the tables of this run have room for "
                        f"{room:,}; begin another --run-dir, with online.spare=0.5, say, for ids to come"
                    )
                field = field.model_copy(update={"cardinality": room})
            fields.append(field)
        self.schema = self.schema.model_copy(update={"fields": fields})

    def __len__(self) -> int:
        return len(self._windows)

    @overload
    def __getitem__(self, index: int) -> Window: ...

    @overload
    def __getitem__(self, index: slice) -> list[Window]: ...

    def __getitem__(self, index: int | slice) -> Window | list[Window]:
        return self._windows[index]

    def check_ids(self) -> None:
        """Compares all vocabularies, in a pass over them.

        Raises:
            UserError: an id means another value in the window after (names window and field).
        """
        known: dict[str, pl.Series] = {}
        for number, window in enumerate(self):
            for field in window.dataset.schema.fields:
                if field.vocabulary is None:
                    continue
                values = load_vocabulary(window.dataset.path, field).table["value"]
                if number and not known[field.name].equals(values[: len(known[field.name])]):
                    earlier = self[number - 1]
                    raise UserError(
                        f"{window.dataset.path}: ids of field {field.name!r} are others than in window {earlier.name}; "
                        + _GROW.format(before=earlier.dataset.path)
                    )
                known[field.name] = values

    def warm_up(self, windows: int) -> WindowRows:
        """The first windows as a set: the last of them validates, those before train, and the one after them tests.

        Raises:
            UserError: there are not so many, and one more.
        """
        if windows >= len(self):
            raise UserError(
                f"online.warm_up={windows}: {self.folder} has {len(self)} windows, and one at least must follow the warm-up"
            )
        first, validation, test = self[: windows - 1], self[windows - 1], self[windows]
        return WindowRows(self, {"train": first, "validation": [validation], "test": [test]}, ("validation", "test"))

    def rows(self, window: Window) -> WindowRows:
        """A window as a set: all its rows in every split, in the train split with its new ids, in the others without."""
        return WindowRows(self, {split: [window] for split in SPLITS}, ("validation", "test"))


class WindowRows:
    """A `Dataset` whose splits are windows, with the tables of the last window.

    Args:
        windows: all of them.
        parts: the windows of each split.
        predicted: the splits whose rows are as they were encoded before their window's new ids were given.
    """

    def __init__(
        self, windows: Windows, parts: dict[SplitName, Sequence[Window]], predicted: Sequence[SplitName]
    ) -> None:
        self.path, self._parts, self._predicted = windows.folder, parts, predicted
        splits = {
            name: Split(rows=sum(w.rows for w in own), positives=sum(w.positives for w in own), files=[])
            for name, own in parts.items()
        }
        self.schema: Schema = windows.schema.model_copy(update={"splits": splits})

    def blocks(self, split: SplitName) -> Blocks:
        return _Joined([b for window in self._parts[split] for b in window.blocks(split in self._predicted)])


class _Joined:
    """Blocks of several sets, one after the other."""

    def __init__(self, parts: Sequence[Blocks]) -> None:
        self._places = [(part, index) for part in parts for index in range(len(part.sizes))]
        self.sizes = [part.sizes[index] for part, index in self._places]

    def read(self, index: int) -> Rows:
        part, place = self._places[index]
        return part.read(place)


class _Known:
    """Blocks as an earlier vocabulary encodes them: since ids are only appended, later ones were rare values then."""

    def __init__(self, blocks: Blocks, fields: Sequence[Field], table_rows: dict[str, int]) -> None:
        self.sizes, self._blocks = blocks.sizes, blocks
        self._fields, self._rows = fields, table_rows

    def read(self, index: int) -> Rows:
        rows = self._blocks.read(index)
        single = torch.tensor([self._limit(f) for f in self._fields if f.is_single], dtype=torch.int64)
        several = [self._limit(f) for f in self._fields if not f.is_single]
        ragged = (
            replace(own, values=_limited(own.values, torch.tensor(limit)))
            for own, limit in zip(rows.ragged, several, strict=True)
        )
        return replace(rows, ids=_limited(rows.ids, single[:, None]), ragged=tuple(ragged))

    def _limit(self, field: Field) -> int:
        return self._rows[field.name] if field.vocabulary is not None else torch.iinfo(torch.int64).max


def _limited(ids: Tensor, limits: Tensor) -> Tensor:
    return ids.masked_fill(ids >= limits, RARE)


def _check_fields(before: Window, dataset: PreparedSet) -> None:
    """Refuses a set that is not grown from the window before."""
    fields = {field.name: field for field in before.dataset.schema.fields}
    names = [field.name for field in dataset.schema.fields]
    if list(fields) != names:
        raise UserError(
            f"{dataset.path}: its fields are {', '.join(names)}; those of {before.name}: {', '.join(fields)}"
        )
    for field in dataset.schema.fields:
        old = fields[field.name]
        kind, was = (field.kind, field.transform, field.weights), (old.kind, old.transform, old.weights)
        grows = field.vocabulary is not None and (field.cardinality or 0) >= (old.cardinality or 0)
        if kind != was or not (grows or field.cardinality == old.cardinality):
            raise UserError(
                f"{dataset.path}: field {field.name!r} is {field.transform} with {field.cardinality} rows, in window "
                f"{before.name} {old.transform} with {old.cardinality}; " + _GROW.format(before=before.dataset.path)
            )


def one_class(windows: Sequence[Window]) -> str | None:
    """The first window whose labels are all the same, so that its AUC is undefined."""
    return next((window.name for window in windows if not 0 < window.positives < window.rows), None)
