"""`schema.json`: what a prepared data set holds, field by field and split by split."""

from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError, model_validator

from sseds_rec.errors import UserError
from sseds_rec.files import read_json, write_text

FILE_NAME = "schema.json"
LABEL = "label"  # the name of the label column in every part file

Kind = Literal["categorical", "numeric", "sequence"]
Transform = Literal["vocabulary", "log2_bucket", "log1p"]
SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Field(_Strict):
    """One input of the model: a column of the part files.

    Attributes:
        name: Column name, and the KJT key of an embedded field.
        kind: What the raw column held.
        transform: `vocabulary` looks the value up; `log2_bucket` looks up the bucket of
            `log2_bucket()`; `log1p` keeps one float32, sign(x)·log(1+|x|), 0 where empty.
        cardinality: Rows of the embedding table, the reserved ids 0 (empty) and 1 (rare or unseen) included.
            None for a dense input.
        vocabulary: Parquet file with columns value, count, id, relative to the folder. None for a dense input.
        min_count: Values seen less often in the train split share id 1. None for a dense input.
    """

    name: str
    kind: Kind
    transform: Transform
    cardinality: PositiveInt | None = None
    vocabulary: str | None = None
    min_count: int | None = None

    @model_validator(mode="after")
    def _sized_unless_dense(self) -> "Field":
        if self.is_sparse == (self.cardinality is None):
            a_or_no = "a" if self.is_sparse else "no"
            raise ValueError(f"field {self.name!r}: {self.transform} goes with {a_or_no} cardinality")
        return self

    @property
    def is_sparse(self) -> bool:
        """Whether the field has an embedding table."""
        return self.transform != "log1p"


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

    @classmethod
    def load(cls, path: str | Path) -> "Schema":
        """Reads `schema.json` from a prepared folder, or the file itself.

        Raises:
            UserError: It is missing, not JSON, or not a schema this version can read.
        """
        file = Path(path)
        if file.is_dir() or file.suffix != ".json":
            file = file / FILE_NAME
        if not file.exists():
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
