"""The typed config: YAML in, dotted overrides on top, unknown keys refused."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from sseds_rec.compare.config import CompareConfig
from sseds_rec.data.config import FORMATS, DataConfig
from sseds_rec.distributed.sharding_config import ShardingConfig
from sseds_rec.errors import UserError
from sseds_rec.files import open_file, write_text
from sseds_rec.models.registry import ModelConfig
from sseds_rec.models.ticket import Dense, Tables
from sseds_rec.online.config import OnlineConfig
from sseds_rec.search.config import SearchConfig
from sseds_rec.slim.alignment import Init
from sseds_rec.training.config import TrainConfig


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


#: What `--paper` sets (Algorithm 1): one training batch, the mean gradient's magnitude, ranked as it is, cut at the budget.
PAPER: dict[str, dict[str, Any]] = {
    "search": {
        "criterion": "snip",
        "batch_size": None,
        "num_batches": 1,
        "rescale_batches": 0,
        "rounds": 1,
        "split": "train",
        "min_dim": 0,
        "exponent": 0.0,
        "order": "stop",
        "floor_share": 0.0,
        "tables": {},
    }
}


class RetrainConfig(_Section):
    """The `retrain` section: how the slim model starts, and where its training differs from `train`.

    Attributes:
        transform: the transform matrices' start. "random" is the paper; "select" starts as the masked full model.
        tables: the tables' start: "ticket" for the trained columns that were kept, "random" for new ones, drawn as
            pretraining draws them. Rows keep the raw ids that they were given in either case.
        dense: the other weights' start: "kept" for the pretrained ones where shapes allow, "fresh" for the model's own.
        restart_below: tables of the ticket whose scale (`search.rescale_batches`) is below this are drawn anew before the first
            step: the model had learned them by heart, and would go on to. 0 for none.
        epochs: null for that of `train`; 0 trains nothing, so that the stage measures and leaves the start.
        learning_rate, table_learning_rate, warmup_steps, embedding_l2, patience: null for the value of `train`.
    """

    transform: Init = "select"
    tables: Tables = "ticket"
    dense: Dense = "kept"
    restart_below: float = Field(0.75, ge=0, le=2)
    epochs: int | None = Field(None, ge=0)
    learning_rate: float | None = Field(None, gt=0)
    table_learning_rate: float | None = Field(None, gt=0)
    warmup_steps: int | None = Field(None, ge=0)
    embedding_l2: float | None = Field(None, ge=0)
    patience: int | None = Field(None, ge=1)


class EvaluationConfig(_Section):
    """The `evaluation` section: what is measured besides what always is. It changes no training, so it may change at any time.

    Attributes:
        group_field: field with a table and one id a row, by whose ids GAUC groups the rows (users, as a rule); null for no GAUC.
    """

    group_field: str | None = None


class Config(_Section):
    """One experiment. `sseds run` writes it, resolved, to `config.yaml` of the run directory."""

    name: str = Field(pattern=r"^[\w.-]+$")
    seed: int = Field(2022, ge=0, lt=2**32)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    data: DataConfig
    model: ModelConfig = ModelConfig()
    sharding: ShardingConfig = ShardingConfig()
    train: TrainConfig = TrainConfig()
    search: SearchConfig = SearchConfig()
    retrain: RetrainConfig = RetrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    compare: CompareConfig = CompareConfig()
    online: OnlineConfig = OnlineConfig()

    @field_validator("retrain")
    @classmethod
    def _reduces_before_it_stops(cls, retrain: RetrainConfig, info: ValidationInfo) -> RetrainConfig:
        reduce = info.data["train"].reduce_patience if "train" in info.data else None
        if retrain.patience is not None and reduce is not None and reduce >= retrain.patience:
            raise ValueError(
                f"it stops after retrain.patience={retrain.patience}, before train.reduce_patience={reduce} has an effect; "
                "choose a larger patience"
            )
        return retrain

    def retrain_as_train(self) -> TrainConfig:
        """The `train` section with what `retrain` overrides."""
        own = self.retrain.model_dump(exclude={"transform", "tables", "dense", "restart_below"}, exclude_none=True)
        return self.train.model_copy(update=own)

    def save(self, path: Path) -> None:
        """Writes YAML that `load_config` reads back."""
        write_text(path, yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))


def load_config(path: str | Path, overrides: list[str] | None = None, paper: bool = False) -> Config:
    """Reads a YAML config and applies `key.sub=value` overrides, values parsed as YAML.

    Args:
        path: the file.
        overrides: e.g. ["search.budget.parameters=0.05", "train.epochs=2"].
        paper: apply `PAPER` before the overrides.

    Raises:
        UserError: no such file, not YAML, an override that is not key=value, an unknown key (with the nearest valid name), or
            a value that the key does not take.
    """
    try:
        with open_file(path) as file:
            tree = yaml.safe_load(file.read().decode("utf-8")) or {}
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a config is a mapping of sections, this is a {type(tree).__name__}")
    if paper:
        for section, values in PAPER.items():
            tree[section] = {**(tree.get(section) or {}), **values}
    for override in overrides or []:
        _override(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{path}: {_explain(error)}") from None


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """A config with other values.

    Args:
        config: stays as it is.
        settings: dotted key -> value; of a section, all of it.

    Raises:
        UserError: a key does not take its value.
    """
    tree = config.model_dump(mode="json")
    for key, value in settings.items():
        *sections, last = key.split(".")
        below = tree
        for section in sections:
            below = below[section]
        below[last] = value
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(error)) from None


def changed_keys(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old, new) of every value that differs."""
    before, after = flatten(old.model_dump(mode="json")), flatten(new.model_dump(mode="json"))
    return {key: (before.get(key), after.get(key)) for key in {**before, **after} if before.get(key) != after.get(key)}


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} is not key=value, as in train.epochs=2")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"override {override!r}: the value is not valid YAML") from None
    *sections, last = key.split(".")
    for section in sections:
        below = tree.setdefault(section, {})
        if not isinstance(below, dict):
            raise UserError(f"override {override!r}: {section} is a value, not a section")
        tree = below
    if sections == ["search", "budget"]:
        tree.clear()  # a budget has one key: the new one replaces the old
    tree[last] = value


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    keys, section = _keys_and_section(first["loc"])
    key = ".".join(keys)
    if first["type"] == "extra_forbidden":
        valid = list(section.model_fields)
        near = difflib.get_close_matches(keys[-1], valid, n=1, cutoff=0.4)
        hint = f"did you mean {'.'.join([*keys[:-1], near[0]])}?" if near else f"valid keys: {', '.join(valid)}"
        return f"unknown key {key}; {hint}"
    if first["type"] == "missing":
        return f"{key} is missing; set it in the file or as {key}=..."
    given = first["input"]
    shown = f"={given!r}" if not isinstance(given, (dict, list)) else ""
    return f"{key}{shown}: {first['msg'].removeprefix('Value error, ')}"


def _keys_and_section(loc: tuple[int | str, ...]) -> tuple[list[str], type[BaseModel]]:
    """The keys that lead to an error, and the section in which the last but one of them is."""
    keys: list[str] = []
    section: type[BaseModel] = Config
    inside: Any = Config  # what the keys so far lead to
    for part in loc:
        if keys == ["data"] and not isinstance(inside, type):
            inside = FORMATS[str(part)]  # of the union, pydantic names the format that it chose
            continue
        keys.append(str(part))
        if isinstance(inside, type) and issubclass(inside, BaseModel):
            section = inside
            inside = inside.model_fields[str(part)].annotation if part in inside.model_fields else None
        else:
            inside = (typing.get_args(inside) or (None,))[-1]  # of dict[str, X] or list[X]
    return keys, section


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
