"""Raw rows to a prepared set, what all recipes end in: two passes, one that counts and one that encodes."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import polars as pl

from sseds_rec.data.cells import OnError, Reader, Rejects, read_rows
from sseds_rec.data.counting import ValueCounts
from sseds_rec.data.parts import PartWriter, new_folder
from sseds_rec.data.progress import shown
from sseds_rec.data.schema import LABEL, SPLITS, Counts, Field, Schema, Split, SplitName
from sseds_rec.data.sources import Source, check_columns
from sseds_rec.data.splits import LabelSpec, SplitSpec, plan_split
from sseds_rec.data.transforms import FieldSpec
from sseds_rec.data.vocabulary import Vocabulary, encode, hash_ids
from sseds_rec.errors import UserError
from sseds_rec.files import join

REJECTED = "rejected.csv"


class PrepareOptions(TypedDict, total=False):
    """What all recipes that read files let their users choose.

    Attributes:
        overwrite: Replace an earlier prepared set.
        on_error: What to do with a row that cannot be read: refuse the input, or skip, count and list it in
            `rejected.csv`.
        vocabulary: A prepared set whose ids are used instead of counting anew.
        grow: Give ids to values that the vocabulary lacks and that are frequent in these train rows, after its own.
    """

    overwrite: bool
    on_error: OnError
    vocabulary: str | Path | None
    grow: bool


def prepare_source(
    source: Source,
    output: str | Path,
    *,
    label: str,
    fields: Sequence[FieldSpec],
    splits: SplitSpec,
    positive: str | None = None,
    origin: dict[str, Any],
    overwrite: bool = False,
    on_error: OnError = "refuse",
    vocabulary: str | Path | None = None,
    grow: bool = False,
    beside: Callable[[Path], None] | None = None,
) -> Schema:
    """What every recipe ends in. Memory is bounded by the size of a part and of the vocabularies, whatever the rows.

    Args not named here are those of `table.prepare_table` and `PrepareOptions`.

    Args:
        source: The rows; they are read twice, or by time or order three times.
        fields: In the order in which models will see them.
        splits: How to divide.
        origin: Starts the schema's `source`.
        beside: Writes further files into the folder.
    """
    _check_fields(source, label, fields, splits)
    vocabularies = _known(vocabulary, grow, fields)
    with new_folder(output, overwrite) as folder:
        readers: list[Reader] = [LabelSpec(label, positive), *fields]
        key, start_dividing = plan_split(source, splits, readers, on_error)
        readers += [key] if key else []
        rejects = Rejects(on_error, folder / REJECTED)

        counted = [spec.name for spec in fields if spec.has_vocabulary and (grow or spec.name not in vocabularies)]
        counts = ValueCounts(counted, folder / ".counts")
        found = {split: Split(rows=0, positives=0, files=[]) for split in SPLITS}
        divide = start_dividing()
        for read in shown("counting", read_rows(source, readers, rejects)):
            split_of = divide(read.rows)
            found = _counted(found, split_of, read.rows[LABEL].to_numpy())
            if counted:
                counts.add(read.rows.select(counted).filter(pl.Series(split_of == 0)))
        if rejects.count and not any(split.rows for split in found.values()):
            raise UserError(f"{rejects.first}; none of the {rejects.count} rows can be read")
        _check_rows(source, found, splits, bool(counted))
        if positive is not None and not any(split.positives for split in found.values()):
            raise UserError(f"{source.name}: no row has {positive!r} in the label column {label!r}")
        summaries = _build(counts, [spec for spec in fields if spec.name in counted], vocabularies)
        shutil.rmtree(folder / ".counts", ignore_errors=True)

        (folder / "vocabulary").mkdir()
        for name, made in vocabularies.items():
            made.save(folder / _vocabulary_file(name))
        divide = start_dividing()
        with PartWriter(folder, found["train"].rows, splits.seed) as writer:
            for read in shown("encoding", read_rows(source, readers, rejects.again())):
                writer.write(_encode(read.rows, fields, vocabularies), divide(read.rows))

        written = sum(split.rows for split in found.values())
        schema = Schema(
            label=label,
            fields=[_field(spec, vocabularies.get(spec.name), summaries.get(spec.name)) for spec in fields],
            seed=splits.seed,
            source={
                **origin,
                "rows": written + rejects.count,
                "written": written,
                "rejected": rejects.count,
                "split_by": splits.by,
                "split": list(splits.fractions),
                **({"vocabulary": str(vocabulary), "grown": grow} if vocabulary else {}),
            },
            splits={split: found[split].model_copy(update={"files": writer.files[split]}) for split in SPLITS},
        )
        if beside is not None:
            beside(folder)
        schema.save(folder)
    return schema


def load_vocabulary(folder: str | Path, field: Field) -> Vocabulary:
    """Reads the vocabulary of a field that has one."""
    if field.vocabulary is None:
        raise ValueError(f"field {field.name!r} has no vocabulary")
    return Vocabulary.load(join(folder, field.vocabulary))


def _check_fields(source: Source, label: str, fields: Sequence[FieldSpec], splits: SplitSpec) -> None:
    names = [name for spec in fields for name in (spec.name, spec.weights) if name]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"column {twice[0]!r} is listed twice among the fields")
    if label in names:
        raise UserError(f"column {label!r} is listed both as the label and as a field")
    if LABEL in names:
        raise UserError(f"column {LABEL!r}: no field can have this name, the encoded label has it; rename the column")
    if all(spec.transform == "log1p" for spec in fields):
        raise UserError("no field has an embedding table; list a categorical, sequence or bucketed numeric column")
    for spec in fields:
        if spec.min_count < 1:
            raise UserError(f"min-count {spec.min_count}: must be at least 1")
        if spec.kind == "sequence" and not spec.separator:
            raise UserError("separator: must not be empty")
    columns = [column for spec in fields for column in spec.columns]
    check_columns(source, [label, *columns, *([splits.column] if splits.column else [])])


def _known(folder: str | Path | None, grow: bool, fields: Sequence[FieldSpec]) -> dict[str, Vocabulary]:
    """The vocabularies of an earlier set, which must have the same fields."""
    if folder is None:
        if grow:
            raise UserError("grow: name the prepared set whose vocabulary is to grow")
        return {}
    earlier = {field.name: field for field in Schema.load(folder).fields}
    for spec in fields:
        field = earlier.get(spec.name)
        if field is None:
            raise UserError(f"{folder}: has no field {spec.name!r}; its vocabulary fits the same fields only")
        mine = (spec.kind, spec.transform, spec.rows or field.cardinality)
        if mine != (field.kind, field.transform, field.cardinality):
            there = f"{field.kind}, {field.transform}, {field.cardinality} rows"
            raise UserError(f"{folder}: field {spec.name!r} is {there} there, not {', '.join(map(str, mine))}")
    return {spec.name: load_vocabulary(folder, earlier[spec.name]) for spec in fields if spec.has_vocabulary}


def _counted(
    so_far: dict[SplitName, Split], split_of: npt.NDArray[np.int8], labels: npt.NDArray[np.int8]
) -> dict[SplitName, Split]:
    counts = {}
    for index, (name, split) in enumerate(so_far.items()):
        mine = labels[split_of == index]
        counts[name] = Split(rows=split.rows + len(mine), positives=split.positives + int(mine.sum()), files=[])
    return counts


def _build(counts: ValueCounts, fields: Sequence[FieldSpec], vocabularies: dict[str, Vocabulary]) -> dict[str, Counts]:
    """Makes the fields' vocabularies, or lets them grow; returns what was counted, in short."""
    summaries = {}
    for spec in fields:
        built = Vocabulary.build(counts.merged(spec.name), spec.min_count, vocabularies.get(spec.name))
        vocabularies[spec.name], summaries[spec.name] = built
    return summaries


def _check_rows(source: Source, found: Mapping[SplitName, Split], splits: SplitSpec, needs_train: bool) -> None:
    total = sum(split.rows for split in found.values())
    if not total:
        raise UserError(f"{source.name}: has no rows")
    for (name, split), share in zip(found.items(), splits.fractions, strict=True):
        if not split.rows and (splits.kind == "column" or share):
            raise UserError(f"{source.name}: split-by {splits.by} leaves no {name} row ({total} rows in all)")
    if needs_train and not found["train"].rows:
        raise UserError(
            f"{source.name}: no row is in the train split, so that there is nothing to make a vocabulary of"
        )


def _encode(rows: pl.DataFrame, fields: Sequence[FieldSpec], vocabularies: Mapping[str, Vocabulary]) -> pl.DataFrame:
    hashed = [hash_ids(rows[spec.name], spec.rows) for spec in fields if spec.transform == "hash" and spec.rows]
    columns = [column for spec in fields for column in (spec.name, spec.weights) if column]
    return encode(rows.with_columns(hashed), vocabularies).select(LABEL, *columns)


def _field(spec: FieldSpec, vocabulary: Vocabulary | None, counts: Counts | None) -> Field:
    return Field(
        name=spec.name,
        kind=spec.kind,
        transform=spec.transform,
        cardinality=spec.rows if vocabulary is None else vocabulary.cardinality,
        vocabulary=None if vocabulary is None else _vocabulary_file(spec.name),
        min_count=None if vocabulary is None else spec.min_count,
        weights=spec.weights,
        counts=counts,
    )


def _vocabulary_file(name: str) -> str:
    return f"vocabulary/{quote(name, safe=' ')}.parquet"  # a column may be called a/b
