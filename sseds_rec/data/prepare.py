"""Raw rows to a prepared set: three passes over a source (labels and splits, counts, encoded rows)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import polars as pl

from sseds_rec.data.parts import PartWriter, new_folder
from sseds_rec.data.schema import LABEL, SPLITS, Field, Schema, Split
from sseds_rec.data.sources import Files, Source, check_columns
from sseds_rec.data.splits import SplitSpec, read_labels_and_splits
from sseds_rec.data.transforms import FieldSpec
from sseds_rec.data.vocabulary import Vocabulary, count_values
from sseds_rec.errors import UserError


def prepare_table(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    label: str,
    categorical: Sequence[str] = (),
    numeric: Sequence[str] = (),
    sequence: Sequence[str] = (),
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
) -> Schema:
    """Prepares any CSV, TSV or Parquet table.

    Args:
        inputs: Files with the same columns; see `sources.Files` for the formats.
        output: Folder to make.
        label: Column with 0/1 or true/false, or with `positive` among its values.
        categorical: Columns whose values are looked up; the fields come in this order, then numeric, then sequence.
        numeric: Columns of numbers.
        sequence: Columns with any number of values: a list, or text with `separator` in between.
        numeric_as: Log² buckets with an embedding table, or one dense float each.
        split: Fractions of train, validation and test.
        split_by: `random`, `time:COLUMN` or `column:COLUMN`; see `SplitSpec`.
        min_count: Values seen less often in the train split share one id.
        seed: Of the split and of the stored order of the train rows.
        positive: The label that counts as 1; any other counts as 0.
        separator: Between the elements of a sequence.
        columns: Names of all columns, for CSV and TSV files without a header line.
        missing: Cells to read as empty, for example `NA`.
        overwrite: Replace an earlier prepared set.

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
    splits = SplitSpec(split_by, split, seed)
    return prepare_source(
        Files([str(path) for path in inputs], columns, missing),
        output,
        label=label,
        fields=fields,
        splits=splits,
        positive=positive,
        origin={"recipe": "table", "inputs": [str(path) for path in inputs]},
        overwrite=overwrite,
    )


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
) -> Schema:
    """What every recipe ends in. `origin` starts the schema's `source`; for the rest see `prepare_table`."""
    _check_fields(source, label, fields, splits)
    with new_folder(output, overwrite) as folder:
        label_of, split_of = read_labels_and_splits(source, label, positive, splits)
        vocabularies = _count(source, fields, split_of)
        (folder / "vocabulary").mkdir()
        for name, vocabulary in vocabularies.items():
            vocabulary.save(folder / _vocabulary_file(name))

        writer = PartWriter(folder, split_of, splits.seed)
        row = 0
        for chunk in source.chunks(spec.name for spec in fields):
            labels = pl.Series(LABEL, label_of[row : row + chunk.frame.height])
            row += chunk.frame.height
            columns = (spec.values(chunk.frame[spec.name], chunk.where) for spec in fields)
            writer.write(pl.DataFrame([labels, *(_encode(column, vocabularies) for column in columns)]))
        writer.close()

        rows = {split: split_of == index for index, split in enumerate(SPLITS)}
        schema = Schema(
            label=label,
            fields=[_field(spec, vocabularies.get(spec.name)) for spec in fields],
            seed=splits.seed,
            source={**origin, "rows": len(label_of), "split_by": splits.by, "split": list(splits.fractions)},
            splits={
                split: Split(rows=int(mine.sum()), positives=int(label_of[mine].sum()), files=writer.files[split])
                for split, mine in rows.items()
            },
        )
        schema.save(folder)
    return schema


def load_vocabulary(folder: str | Path, field: Field) -> Vocabulary:
    """Reads the vocabulary of a field with an embedding table."""
    if field.vocabulary is None:
        raise ValueError(f"field {field.name!r} has no vocabulary")
    return Vocabulary.load(Path(folder) / field.vocabulary)


def _check_fields(source: Source, label: str, fields: Sequence[FieldSpec], splits: SplitSpec) -> None:
    names = [spec.name for spec in fields]
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
    check_columns(source, [label, *names, *([splits.column] if splits.column else [])])


def _count(source: Source, fields: Sequence[FieldSpec], split_of: Any) -> dict[str, Vocabulary]:
    counts: dict[str, pl.DataFrame] = {}
    row = 0
    for chunk in source.chunks(spec.name for spec in fields):
        in_train = pl.Series(split_of[row : row + chunk.frame.height] == 0)
        row += chunk.frame.height
        for spec in fields:
            values = spec.values(chunk.frame[spec.name], chunk.where)  # of all rows: bad cells are refused early
            if spec.transform != "log1p":
                counts[spec.name] = count_values(values.filter(in_train), counts.get(spec.name))
    least = {spec.name: spec.min_count for spec in fields}
    return {name: Vocabulary.build(counted, least[name]) for name, counted in counts.items()}


def _encode(values: pl.Series, vocabularies: dict[str, Vocabulary]) -> pl.Series:
    vocabulary = vocabularies.get(values.name)
    return values if vocabulary is None else vocabulary.encode(values)


def _field(spec: FieldSpec, vocabulary: Vocabulary | None) -> Field:
    if vocabulary is None:
        return Field(name=spec.name, kind=spec.kind, transform=spec.transform)
    return Field(
        name=spec.name,
        kind=spec.kind,
        transform=spec.transform,
        cardinality=vocabulary.cardinality,
        vocabulary=_vocabulary_file(spec.name),
        min_count=spec.min_count,
    )


def _vocabulary_file(name: str) -> str:
    return f"vocabulary/{quote(name, safe=' ')}.parquet"  # a column may be called a/b
