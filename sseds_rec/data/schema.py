"""`schema.json`: what a prepared data set holds, field by field and split by split."""

import os
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError, model_validator

from sseds_rec.errors import UserError
from sseds_rec.files import exists, join, read_json, write_text

FILE_NAME = "schema.json"
LABEL = "label"  # the name of the label column in every part file

Kind = Literal["categorical", "numeric", "sequence"]
Transform = Literal["vocabulary", "log2_bucket", "log1p", "hash", "raw", "modulo", "stored"]
SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Magnitude(_Strict):
    """The values seen at least `least` times and fewer than ten times as often: how many, and how often in all."""

    least: int
    values: int
    count: int


class Counts(_Strict):
    """What the train split holds of one field.

    Attributes:
        empty: Empty cells.
        rare: Cells whose value shares the id of the rare ones.
        magnitudes: The values by their number of occurrences: 1 to 9, 10 to 99, and so on. They add up to all values seen.
    """

    empty: int
    rare: int
    magnitudes: list[Magnitude]


class Field(_Strict):
    """One input of the model: a column of the files.

    Attributes:
        name: Name of the input, and the KJT key of an embedded field.
        kind: What the raw column held.
        transform: How the cells become ids or floats. In a prepared set: `vocabulary` looks the value up;
            `log2_bucket` looks up the bucket of `log2_bucket()`; `hash` hashes it to 1..cardinality-1, 0 where empty;
            `raw` keeps any 64-bit id, null where empty, for managed collision to map to a row of the table; `log1p`
            keeps one float32, sign(x)·log(1+|x|), 0 where empty. In a set of another tool: `modulo` takes id %
            cardinality when reading; `stored` takes the ids, or without a cardinality the floats, as they are.
        cardinality: Rows of the embedding table; of `vocabulary` and `log2_bucket` the reserved ids 0 (empty) and 1
            (rare or unseen) included. None for a dense input.
        vocabulary: Parquet file with columns value, count, id, relative to the folder. Of `vocabulary` and
            `log2_bucket` only.
        min_count: Values seen less often in the train split share id 1. Of `vocabulary` and `log2_bucket` only.
        weights: Column with one float32 for each id of a sequence field, by which its embedding is multiplied. None
            for the mean over the sequence, or in a weighted set 1/length each.
        column: Column of the files, if it is not called as the field.
        counts: Of the values, where they were counted; how often each one occurs is in the vocabulary.
    """

    name: str
    kind: Kind
    transform: Transform
    cardinality: PositiveInt | None = None
    vocabulary: str | None = None
    min_count: int | None = None
    weights: str | None = None
    column: str | None = None
    counts: Counts | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> "Field":
        if self.transform == "log1p" and self.is_sparse:
            raise ValueError(f"field {self.name!r}: log1p goes with no cardinality")
        if self.transform not in ("log1p", "stored") and not self.is_sparse:
            raise ValueError(f"field {self.name!r}: {self.transform} goes with a cardinality")
        for key in ("vocabulary", "min_count"):
            if self.transform not in ("vocabulary", "log2_bucket") and getattr(self, key) is not None:
                raise ValueError(f"field {self.name!r}: {self.transform} goes with no {key}")
        if self.weights is not None and self.kind != "sequence":
            raise ValueError(f"field {self.name!r}: weights go with a sequence, this field is {self.kind}")
        return self

    @property
    def is_sparse(self) -> bool:
        """Whether the field has an embedding table."""
        return self.cardinality is not None

    @property
    def is_single(self) -> bool:
        """Whether every row has exactly one id: neither a sequence nor a raw id, which may be absent."""
        return self.kind != "sequence" and self.transform != "raw"

    @property
    def stored_in(self) -> str:
        """The files' column."""
        return self.name if self.column is None else self.column


class Split(_Strict):
    """One split: its rows, how many have label 1, and its part files, relative to the folder."""

    rows: int
    positives: int
    files: list[str]


class Schema(_Strict):
    """A prepared data set.

    Attributes:
        version: Format of this file.
        label: Name the label column had in the source; in the part files it is `label`.
        fields: The inputs, in the order in which models see them.
        seed: Seed of the split and of the stored order of the train rows.
        source: Where the rows came from and what was done to them, for people.
        splits: `train`, `validation` and `test`.
    """

    version: Literal[1] = 1
    label: str
    fields: list[Field]
    seed: int
    source: dict[str, Any]
    splits: dict[SplitName, Split]

    @property
    def sparse_fields(self) -> list[Field]:
        """Fields with an embedding table, in order: the keys of the KJT."""
        return [field for field in self.fields if field.is_sparse]

    @property
    def dense_fields(self) -> list[Field]:
        """Fields that enter as one float, in order: the columns of the dense tensor."""
        return [field for field in self.fields if not field.is_sparse]

    @property
    def is_weighted(self) -> bool:
        """Whether any field has per-id weights; the KJTs then have weights for all fields, to be pooled by their sum."""
        return any(field.weights is not None for field in self.fields)

    @classmethod
    def load(cls, path: str | Path) -> "Schema":
        """Reads `schema.json` from a prepared folder, or the file itself.

        Raises:
            UserError: It is missing, not JSON, or not a schema this version can read.
        """
        file = str(path) if os.path.basename(str(path)) == FILE_NAME else join(path, FILE_NAME)
        if not exists(file):
            raise UserError(f"{file}: no such file; make the data set with `sseds prepare`")
        content = read_json(file)
        found = content.get("version") if isinstance(content, dict) else None
        if found != 1:
            raise UserError(f"{file}: version is {found!r}, this program reads version 1; prepare the data set again")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(step) for step in first["loc"])
            raise UserError(f"{file}: {key or 'content'}: {first['msg']}; prepare the data set again") from None

    def save(self, folder: str | Path) -> Path:
        """Writes `schema.json` into `folder`, whole or not at all, and returns its path."""
        return write_text(Path(folder) / FILE_NAME, self.model_dump_json(indent=1) + "\n")
