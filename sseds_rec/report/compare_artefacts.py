"""Read what a comparison left on disk, with one clear line when something is missing or odd."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from pydantic import BaseModel, Field, FiniteFloat, ValidationError

from sseds_rec.errors import UserError
from sseds_rec.files import read_json

RESULTS = {
    "model": pl.String, "method": pl.String, "variant": pl.String, "role": pl.String, "budget": pl.Float64, "seed": pl.Int64,
    "learning_rate": pl.Float64, "embedding_l2": pl.Float64,
    "auc": pl.Float64, "logloss": pl.Float64, "validation_auc": pl.Float64, "auc_before_retraining": pl.Float64,
    "embedding_parameters": pl.Int64, "stored_parameters": pl.Int64, "budget_parameters": pl.Int64, "missed": pl.Boolean,
    "dense_bytes": pl.Int64, "csr_bytes": pl.Int64, "parameters": pl.Int64,
    "pretrain_seconds": pl.Float64, "search_seconds": pl.Float64, "retrain_seconds": pl.Float64,
    "inference_samples_per_second": pl.Float64, "run": pl.String,
}  # fmt: skip
WIDTHS = {
    "model": pl.String, "method": pl.String, "budget": pl.Float64, "seed": pl.Int64,
    "field": pl.String, "rows": pl.Int64, "original_dim": pl.Int64, "dim": pl.Int64,
}  # fmt: skip
SALIENCY = {
    "model": pl.String, "method": pl.String, "seed": pl.Int64,
    "field": pl.String, "column": pl.Int64, "score": pl.Float64,
}  # fmt: skip
_CELL = ["model", "method", "variant", "budget", "seed"]


class Data(BaseModel):
    """The prepared data set: number of rows of each split, number of fields."""

    path: str
    train_rows: int
    validation_rows: int
    test_rows: int
    fields: int


class About(BaseModel):
    """`compare.json`: what was asked, on what it ran, and which cells are not finished."""

    command: str
    config: str
    data: Data
    models: list[str]
    methods: list[str]
    budgets: list[float]
    seeds: list[int]
    learning_rates: list[float]
    embedding_l2: list[float]
    tune_budget: float = Field(gt=0, le=1)
    processes: int
    seconds: FiniteFloat | None
    environment: dict[str, Any]
    missing: list[Any]


@dataclass(frozen=True)
class Grid:
    """One comparison.

    Attributes:
        results: the trained models that are compared, columns as `RESULTS`.
        ablations: variants of them, same columns.
        trials: the runs that learning rate and L2 were chosen by, same columns.
        widths: dim of every field, columns as `WIDTHS`.
        saliency: scores of every column of every field, columns as `SALIENCY`.
    """

    folder: Path
    about: About
    results: pl.DataFrame
    ablations: pl.DataFrame
    trials: pl.DataFrame
    widths: pl.DataFrame
    saliency: pl.DataFrame

    @property
    def models(self) -> list[str]:
        """Models with a result, in the order in which they were asked for."""
        return in_order(self.results["model"], self.about.models)

    @property
    def methods(self) -> list[str]:
        return in_order(self.results["method"], self.about.methods)

    @property
    def budgets(self) -> list[float]:
        """Budgets with a result, the largest first."""
        return sorted(set(self.results["budget"].drop_nulls()), reverse=True)

    @property
    def shown_budget(self) -> float | None:
        """The budget that figures of a single one show: that of the tuning, or the one nearest to it."""
        return min(self.budgets, key=lambda b: abs(math.log(b / self.about.tune_budget)), default=None)

    @property
    def is_shown(self) -> pl.Expr:
        """Whether a row is at the budget that figures show."""
        return pl.col("budget").eq_missing(pl.lit(self.shown_budget, pl.Float64))


def in_order(names: Iterable[str], asked: Sequence[str]) -> list[str]:
    """The distinct names: those asked for in that order, then any others."""
    found = list(dict.fromkeys(names))
    return [name for name in asked if name in found] + [name for name in found if name not in asked]


def read_grid(folder: Path) -> Grid:
    """Read the tables of a comparison, finished or not.

    Raises:
        UserError: a file is missing, damaged, or not as it should be; names it.
    """
    about = _about(folder / "compare.json")
    rows = _table(folder / "results.parquet", RESULTS, unique=[*_CELL, "role", "learning_rate", "embedding_l2"])
    return Grid(
        folder=folder,
        about=about,
        results=_results(folder / "results.parquet", rows),
        ablations=rows.filter(pl.col("role") == "ablation"),
        trials=rows.filter(pl.col("role") == "trial"),
        widths=_table(folder / "widths.parquet", WIDTHS, unique=["model", "method", "budget", "seed", "field"]),
        saliency=_table(folder / "saliency.parquet", SALIENCY, unique=["model", "method", "seed", "field", "column"]),
    )


def _about(path: Path) -> About:
    content = read_json(path)
    try:
        return About.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "content"
        raise UserError(f"{path}: {where}: {first['msg']}; run `sseds compare` again") from None


def _table(path: Path, schema: dict[str, type[pl.DataType]], unique: list[str]) -> pl.DataFrame:
    try:
        frame = pl.read_parquet(path, glob=False)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run `sseds compare` first") from None
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    for name, kind in schema.items():
        if name not in frame.columns:
            raise UserError(f"{path}: has no column {name!r}; run `sseds compare` again")
        try:
            frame = frame.with_columns(pl.col(name).cast(kind))
        except pl.exceptions.PolarsError:
            found = frame.schema[name]
            raise UserError(f"{path}: column {name!r} is {found}, {kind.__name__} is expected") from None
    frame = frame.select(*schema)
    if "variant" in schema:
        frame = frame.with_columns(pl.col("variant").fill_null(""))
    for name in unique:
        if name != "budget" and frame[name].null_count():
            raise UserError(f"{path}: column {name!r} has an empty value; run `sseds compare` again")
    if (twice := frame.filter(frame.select(unique).is_duplicated())).height:
        raise UserError(
            f"{path}: two rows of {_words(twice.select(unique).row(0, named=True))}; run `sseds compare` again"
        )
    return frame


def _results(path: Path, rows: pl.DataFrame) -> pl.DataFrame:
    results = rows.filter(pl.col("role") == "result", pl.col("variant") == "")
    if (twice := results.filter(results.select(_CELL).is_duplicated())).height:
        raise UserError(
            f"{path}: two results of {_words(twice.select(_CELL).row(0, named=True))}; run `sseds compare` again"
        )
    for budget in results["budget"].drop_nulls():
        if not 0 < budget <= 1:
            raise UserError(f"{path}: budget {budget} is not between 0 and 1")
    return results


def _words(cell: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in cell.items() if value not in (None, ""))
