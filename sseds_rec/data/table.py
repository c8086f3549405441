"""The recipe `table`: any CSV, TSV or Parquet table."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from typing_extensions import Unpack

from sseds_rec.data.prepare import PrepareOptions, prepare_source
from sseds_rec.data.schema import Schema
from sseds_rec.data.sources import Files
from sseds_rec.data.splits import SplitSpec
from sseds_rec.data.transforms import FieldSpec, numeric_transform
from sseds_rec.errors import UserError


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
    **options: Unpack[PrepareOptions],
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
        options: See `PrepareOptions`.

    Returns:
        The schema, as written to `output`.

    Raises:
        UserError: Bad input; the line names the file, the row and the column. Nothing is left in `output`.
    """
    transform = numeric_transform(numeric_as)
    fields = [
        *(FieldSpec(name, "categorical", min_count=min_count) for name in categorical),
        *(FieldSpec(name, "numeric", transform, min_count=min_count) for name in numeric),
        *(FieldSpec(name, "sequence", min_count=min_count, separator=separator) for name in sequence),
    ]
    return prepare_source(
        Files(inputs, columns, missing),
        output,
        label=label,
        fields=with_tables(fields, hashed or {}, raw or {}, weights or {}),
        splits=SplitSpec(split_by, split, seed),
        positive=positive,
        origin={"recipe": "table", "inputs": [str(path) for path in inputs]},
        **options,
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
        if not 2 <= rows <= 2**62:
            raise UserError(f"{option} {name}={rows}: a table has at least 2 rows, and at most 2^62")
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
