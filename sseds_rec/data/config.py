"""The `data` section of a config: one of three formats."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, PositiveInt, Tag, model_validator

from sseds_rec.data.schema import SPLITS

#: Columns of TorchRec's preprocessed Criteo.
NUM_DENSE, NUM_SPARSE = 13, 26


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PreparedConfig(_Section):
    """A set that `sseds prepare` wrote.

    Attributes:
        path: its folder.
    """

    path: str
    format: Literal["sseds"] = "sseds"


_Cardinality = Annotated[
    list[PositiveInt],
    Field(min_length=NUM_SPARSE, max_length=NUM_SPARSE),
    BeforeValidator(lambda given: [given] * NUM_SPARSE if isinstance(given, int) else given),
]


class TorchRecNpyConfig(_Section):
    """Criteo as TorchRec's scripts preprocess it: `day_N_dense.npy`, `day_N_sparse.npy`, `day_N_labels.npy`.

    Attributes:
        path: the folder of the days.
        train: numbers of the days to train on; null for all that are not held out.
        validation, test: numbers of the held-out days. Null for both: the last day, the first half of its rows (the larger)
            validation, the rest test, as TorchRec has it; of a single day 80 % train, 10 % validation, 10 % test, in order.
        cardinality: rows of the tables, one number or 26; ids are taken modulo it, as with TorchRec's `hashes`. Null
            for ids that are contiguous already: tables are as large as the ids say, found in one pass.
    """

    path: str
    format: Literal["torchrec_npy"] = "torchrec_npy"
    train: list[Annotated[int, Field(ge=0)]] | None = Field(None, min_length=1)
    validation: list[Annotated[int, Field(ge=0)]] | None = Field(None, min_length=1)
    test: list[Annotated[int, Field(ge=0)]] | None = Field(None, min_length=1)
    cardinality: _Cardinality | None = None

    @model_validator(mode="after")
    def _held_out_apart(self) -> TorchRecNpyConfig:
        if (self.validation is None) != (self.test is None):
            raise ValueError("name the days of both validation and test, or of neither to halve the last day")
        named = [day for split in SPLITS for day in getattr(self, split) or []]
        if twice := [day for day in named if named.count(day) > 1]:
            raise ValueError(f"day {twice[0]} is named twice")
        return self


class SparseColumn(_Section):
    """A column of ids in a foreign Parquet set.

    Attributes:
        cardinality: rows of the table.
        column: name in the files; null for the field's own.
        modulo: take ids modulo `cardinality`; otherwise an id outside [0, cardinality) is refused.
        kind: "categorical" for one id a row, "sequence" for a list of them.
        weights: column with a list of as many floats; of a sequence only.
    """

    cardinality: PositiveInt
    column: str | None = None
    modulo: bool = False
    kind: Literal["categorical", "sequence"] = "categorical"
    weights: str | None = None

    @model_validator(mode="after")
    def _weights_of_a_sequence(self) -> SparseColumn:
        if self.weights is not None and self.kind != "sequence":
            raise ValueError("weights go with kind=sequence")
        return self


_Patterns = Annotated[
    list[str], Field(min_length=1), BeforeValidator(lambda given: [given] if isinstance(given, str) else given)
]


class SplitFiles(_Section):
    """Patterns, one or more a split, of files relative to the set's path; `*`, `?` and `[...]` match within a name."""

    train: _Patterns
    validation: _Patterns
    test: _Patterns


class ParquetConfig(_Section):
    """Parquet that other tools wrote: ids are integers already, and are read as they are.

    Attributes:
        path: the folder the patterns start from.
        files: which files are which split.
        label: column of the label: 0 and 1, or booleans.
        dense: columns of the dense inputs; an empty cell is 0.
        sparse: field -> its column of ids.
    """

    path: str
    format: Literal["parquet"] = "parquet"
    files: SplitFiles
    label: str
    dense: list[str] = []
    sparse: dict[str, SparseColumn]

    @model_validator(mode="after")
    def _each_once(self) -> ParquetConfig:
        names = [*self.dense, *self.sparse]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{twice[0]!r} is listed twice among dense and sparse")
        columns = {*self.dense, *(field.column or name for name, field in self.sparse.items())}
        if self.label in columns:
            raise ValueError(f"column {self.label!r} is both the label and an input")
        return self


FORMATS = {"sseds": PreparedConfig, "torchrec_npy": TorchRecNpyConfig, "parquet": ParquetConfig}


def _format(section: Any) -> Any:
    return section.get("format", "sseds") if isinstance(section, dict) else getattr(section, "format", None)


DataConfig = Annotated[
    Annotated[PreparedConfig, Tag("sseds")]
    | Annotated[TorchRecNpyConfig, Tag("torchrec_npy")]
    | Annotated[ParquetConfig, Tag("parquet")],
    Discriminator(
        _format, custom_error_type="format", custom_error_message=f"data.format must be one of {', '.join(FORMATS)}"
    ),
]
