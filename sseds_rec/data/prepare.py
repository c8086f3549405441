"""Raw rows to a prepared set: two passes over a source, one that counts and one that encodes."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import numpy as np
import polars as pl

from sseds_rec.data.cells import OnError, Reader, Rejects, read_rows
from sseds_rec.data.counting import ValueCounts
from sseds_rec.data.parts import PartWriter, new_folder
from sseds_rec.data.progress import shown
from sseds_rec.data.schema import LABEL, SPLITS, Counts, Field, Schema, Split
from sseds_rec.data.sources import Files, Source, check_columns
from sseds_rec.data.splits import LabelSpec, SplitSpec, plan_split
from sseds_rec.data.transforms import FieldSpec
from sseds_rec.data.vocabulary import Vocabulary, hash_ids
from sseds_rec.errors import UserError
from sseds_rec.files import join

REJECTED = "rejected.csv"


def prepare_table(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    label: str,
    categorical: Sequence[str] = (),
    numeric: Sequence[str] = (),
    sequence: Sequence[str] = (),
    hashed: Mapping[str, int] | None = None,
    raw: Mapping[str, int] | None = None,
    weights: Mapping[str, str] | None = None,
    numeric_as: Literal["log2_bucket", "dense"] = "log2_bucket",
    split: Sequence[float] = (0.8, 0.1, 0.1),
    split_by: str = "random",
    min_count: int = 10,
    seed: int = 0,
    positive: str | None = None,
    separator: str = "|",
    columns: Sequence[str] = (),
    missing: Sequence[str] = (),
    overwrite: bool = False,
    on_error: OnError = "refuse",
    vocabulary: str | Path | None = None,
    grow: bool = False,
) -> Schema:
    """Prepares any CSV, TSV or Parquet table.

    Args:
        inputs: Files with the same columns; see `sources.Files` for the formats.
        output: Folder to make.
        label: Column with 0/1 or true/false, or with `positive` among its values.
        categorical: Columns whose values are looked up; the fields come in this order, then numeric, then sequence.
        numeric: Columns of numbers.
        sequence: Columns with any number of values: a list, or text with `separator` in between.
        hashed: Categorical or sequence column -> rows of its table, to which its values are hashed: no vocabulary.
        raw: Categorical or sequence column of 64-bit integers -> rows of the table to which TorchRec's managed collision
            maps them in training.
        weights: Sequence column -> column with one number for each of its elements.
        numeric_as: Log² buckets with an embedding table, or one dense float each.
        split: Fractions of train, validation and test; a split of 0 stays empty.
        split_by: `random`, `order`, `time:COLUMN` or `column:COLUMN`; see `SplitSpec`.
        min_count: Values seen less often in the train split share one id.
        seed: Of the split and of the stored order of the train rows.
        positive: The label that counts as 1; any other counts as 0.
        separator: Between the elements of a sequence.
        columns: Names of all columns, for CSV and TSV files without a header line.
        missing: Cells to read as empty, for example `NA`.
        overwrite: Replace an earlier prepared set.
        on_error: What to do with a row that cannot be read: refuse the input, or skip, count and list it in
            `rejected.csv`.
        vocabulary: A prepared set whose ids are used instead of counting anew.
        grow: Give ids to values that the vocabulary lacks and that are frequent in these train rows, after its own.

    Returns:
        The schema, as written to `output`.

    Raises:
        UserError: Bad input; the line names the file, the row and the column. Nothing is left in `output`.
    """
    if numeric_as not in ("log2_bucket", "dense"):
        raise UserError(f"numeric-as {numeric_as!r}: must be log2_bucket or dense")
    transform: Literal["log2_bucket", "log1p"] = "log1p" if numeric_as == "dense" else "log2_bucket"
    fields = [
        *(FieldSpec(name, "categorical", min_count=min_count) for name in categorical),
        *(FieldSpec(name, "numeric", transform, min_count=min_count) for name in numeric),
        *(FieldSpec(name, "sequence", min_count=min_count, separator=separator) for name in sequence),
    ]
    return prepare_source(
        Files([str(path) for path in inputs], columns, missing),
        output,
        label=label,
        fields=with_tables(fields, hashed or {}, raw or {}, weights or {}),
        splits=SplitSpec(split_by, split, seed),
        positive=positive,
        origin={"recipe": "table", "inputs": [str(path) for path in inputs]},
        overwrite=overwrite,
        on_error=on_error,
        vocabulary=vocabulary,
        grow=grow,
    )


def with_tables(
    fields: Sequence[FieldSpec],
    hashed: Mapping[str, int],
    raw: Mapping[str, int],
    weights: Mapping[str, str] | None = None,
) -> list[FieldSpec]:
    """The fields, some of them hashed, raw or weighted instead; for the arguments see `prepare_table`.

    Raises:
        UserError: A name is no categorical or sequence field, or a number of rows is not at least 2.
    """
    kinds = {spec.name: spec.kind for spec in fields}
    for name, rows in [*hashed.items(), *raw.items()]:
        option = "hash" if name in hashed else "raw"
        if kinds.get(name, "numeric") == "numeric":
            raise UserError(f"{option} {name!r}: is no categorical or sequence field; list it as one of them too")
        if rows < 2:
            raise UserError(f"{option} {name}={rows}: a table has at least 2 rows")
        if name in hashed and name in raw:
            raise UserError(f"field {name!r} is listed both under hash and under raw")
    for name in weights or {}:
        if kinds.get(name) != "sequence":
            raise UserError(f"weights {name!r}: is no sequence field; list it as one too")

    def changed(spec: FieldSpec) -> FieldSpec:
        spec = replace(spec, weights=(weights or {}).get(spec.name))
        if spec.name in hashed:
            return replace(spec, transform="hash", rows=hashed[spec.name])
        return replace(spec, transform="raw", rows=raw[spec.name]) if spec.name in raw else spec

    return [changed(spec) for spec in fields]


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

    Args:
        source: The rows; they are read twice, or by time or order three times.
        output: See `prepare_table`, also for the arguments not named here.
        label: See `prepare_table`.
        fields: In the order in which models will see them.
        splits: How to divide.
        positive: See `prepare_table`.
        origin: Starts the schema's `source`.
        overwrite: See `prepare_table`.
        on_error: See `prepare_table`.
        vocabulary: See `prepare_table`.
        grow: See `prepare_table`.
        beside: Writes further files into the folder.
    """
    _check_fields(source, label, fields, splits)
    vocabularies = _known(vocabulary, grow, fields)
    with new_folder(output, overwrite) as folder:
        key, start_dividing = plan_split(source, splits, on_error)
        readers: list[Reader] = [LabelSpec(label, positive), *([key] if key else []), *fields]
        rejects = Rejects(on_error, folder / REJECTED)

        counted = [spec.name for spec in fields if spec.has_vocabulary and (grow or spec.name not in vocabularies)]
        counts = ValueCounts(counted, folder / ".counts")
        rows, positives = np.zeros(3, np.int64), np.zeros(3, np.int64)
        divide = start_dividing()
        for read in shown("counting", read_rows(source, readers, rejects)):
            split_of = divide(read.rows)
            rows += np.bincount(split_of, minlength=3)
            positives += np.bincount(split_of, weights=read.rows[LABEL], minlength=3).astype(np.int64)
            if counted:
                counts.add(read.rows.select(counted).filter(pl.Series(split_of == 0)))
        _check_rows(source, rows.tolist(), splits, bool(counted))
        if positive is not None and not positives.sum():
            raise UserError(f"{source.name}: no row has {positive!r} in the label column {label!r}")

        summaries: dict[str, Counts] = {}
        least = {spec.name: spec.min_count for spec in fields}
        for name in counted:
            built = Vocabulary.build(counts.merged(name), least[name], vocabularies.get(name))
            vocabularies[name], summaries[name] = built
        shutil.rmtree(folder / ".counts", ignore_errors=True)
        (folder / "vocabulary").mkdir()
        for name, made in vocabularies.items():
            made.save(folder / _vocabulary_file(name))

        divide = start_dividing()
        with PartWriter(folder, int(rows[0]), splits.seed) as writer:
            for read in shown("encoding", read_rows(source, readers, Rejects("skip", None) if rejects.count else None)):
                writer.write(_encode(read.rows, fields, vocabularies), divide(read.rows))

        schema = Schema(
            label=label,
            fields=[_field(spec, vocabularies.get(spec.name), summaries.get(spec.name)) for spec in fields],
            seed=splits.seed,
            source={
                **origin,
                "rows": int(rows.sum()) + rejects.count,
                "written": int(rows.sum()),
                "rejected": rejects.count,
                "split_by": splits.by,
                "split": list(splits.fractions),
                **({"vocabulary": str(vocabulary), "grown": grow} if vocabulary else {}),
            },
            splits={
                split: Split(rows=int(rows[index]), positives=int(positives[index]), files=writer.files[split])
                for index, split in enumerate(SPLITS)
            },
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


def _check_rows(source: Source, rows: Sequence[int], splits: SplitSpec, needs_train: bool) -> None:
    total = sum(rows)
    if not total:
        raise UserError(f"{source.name}: has no rows")
    for name, count, share in zip(SPLITS, rows, splits.fractions, strict=True):
        if not count and (splits.kind == "column" or share):
            raise UserError(f"{source.name}: split-by {splits.by} leaves no {name} row ({total} rows in all)")
    if needs_train and not rows[0]:
        raise UserError(
            f"{source.name}: no row is in the train split, so that there is nothing to make a vocabulary of"
        )


def _encode(rows: pl.DataFrame, fields: Sequence[FieldSpec], vocabularies: Mapping[str, Vocabulary]) -> pl.DataFrame:
    columns: list[pl.Expr | pl.Series] = [pl.col(LABEL)]
    for spec in fields:
        values = pl.col(spec.name)
        if spec.has_vocabulary:
            dtype = rows.schema[spec.name]
            cells = int(rows[spec.name].list.len().sum()) if isinstance(dtype, pl.List) else rows.height
            columns.append(vocabularies[spec.name].ids(dtype, cells)(values).alias(spec.name))
        elif spec.transform == "hash" and spec.rows:
            columns.append(hash_ids(rows[spec.name], spec.rows))
        else:
            columns.append(values)
        if spec.weights:
            columns.append(pl.col(spec.weights))
    return rows.select(columns)


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
