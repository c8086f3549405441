"""Read what a run left on disk, as plain Python and numpy, with one clear line when something is missing or odd.

The report depends on the files of the run directory only: it can be written on another machine, long after the run.
"""

import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml

from sseds_rec.errors import UserError

T = TypeVar("T")

PLAN_VERSION = 1
BYTES_PER_PARAMETER = 4  # float32
MIB = 2**20


@dataclass(frozen=True)
class Table:
    """One embedding table before and after the search.

    Attributes:
        name: table name as in the plan.
        rows: number of embeddings.
        original_dim: embedding dim before the search, D.
        kept: indices of the columns that the plan keeps, in [0, D).
        stored_dim: dim in memory, `len(kept)` or more where the kernels need padding.
        saliency: scores of its columns, float64 [D]; all tables together sum to 1 (Eq. 11), or are 0 if nothing was scored.
        errors: their standard errors, float64 [D], where there was more than one batch to know them from.
    """

    name: str
    rows: int
    original_dim: int
    kept: tuple[int, ...]
    stored_dim: int
    saliency: np.ndarray
    errors: np.ndarray | None = None

    @property
    def label(self) -> str:
        return printable(self.name)

    @property
    def dim(self) -> int:
        return len(self.kept)

    @property
    def parameters_before(self) -> int:
        return self.rows * self.original_dim

    @property
    def parameters_after(self) -> int:
        return self.rows * self.dim

    @property
    def mib_before(self) -> float:
        return self.parameters_before * BYTES_PER_PARAMETER / MIB

    @property
    def mib_after(self) -> float:
        return self.rows * self.stored_dim * BYTES_PER_PARAMETER / MIB

    @property
    def saliency_share(self) -> float:
        """Part of the saliency of all tables that this table holds, in [0, 1]."""
        return float(self.saliency.sum())

    @property
    def saliency_kept(self) -> float | None:
        """Part of the table's own saliency that its kept columns hold; None where it has none at all."""
        total = self.saliency.sum()
        return float(self.saliency[list(self.kept)].sum() / total) if total > 0 else None


@dataclass(frozen=True)
class Curves:
    """Learning curves of one training stage: pairs (epoch, value), in order of step."""

    train_loss: list[tuple[float, float]]
    validation_auc: list[tuple[float, float]]


@dataclass(frozen=True)
class Run:
    """The artefacts of one finished run; `curves` has the keys `pretrain` and `retrain`; `audit` is None if there was none."""

    directory: Path
    config: dict[str, Any]
    config_text: str
    environment: dict[str, Any]
    metrics: dict[str, Any]
    plan: dict[str, Any]
    tables: list[Table]
    audit: dict[str, Any] | None
    curves: dict[str, Curves]

    @property
    def is_scored(self) -> bool:
        """Whether the search scored columns; some methods choose widths without."""
        return "criterion" in self.plan.get("search", {})


def read_run(run_dir: Path) -> Run:
    """Read the artefacts of a finished run.

    Raises:
        UserError: an artefact is missing, cannot be parsed, or does not fit the others; names the file.
    """
    config_text = _read(run_dir / "config.yaml", lambda path: path.read_text(encoding="utf-8"))
    plan = _read(run_dir / "search" / "plan.json", _json_object)
    metrics = _read(run_dir / "metrics.json", _json_object)
    for stage in ("pretrain", "retrain"):
        if not isinstance(metrics.get(stage), dict):
            raise UserError(f"{run_dir / 'metrics.json'}: no `{stage}` metrics; finish the run with `sseds run` first")
    return Run(
        directory=run_dir,
        config=_read(run_dir / "config.yaml", lambda _: _mapping(yaml.safe_load(config_text))),
        config_text=config_text,
        environment=_read(run_dir / "environment.json", _json_object),
        metrics=metrics,
        plan=plan,
        tables=_tables(run_dir / "search", plan),
        audit=_read(audit, _json_object) if (audit := run_dir / "search" / "audit.json").exists() else None,
        curves={stage: _curves(run_dir / stage / "history.jsonl") for stage in ("pretrain", "retrain")},
    )


def printable(name: str) -> str:
    """The name with what cannot be printed (control characters, lone surrogates) replaced."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)


def read_json_object(path: Path, parse: Callable[[dict[str, Any]], T]) -> T:
    """What `parse` makes of a JSON file of the run.

    Raises:
        UserError: the file is missing, damaged or not as `parse` expects it.
    """
    content: dict[str, Any] = _read(path, _json_object)
    try:
        return parse(content)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: is not as it should be: {error!r}") from error


def _read(path: Path, parse: Callable[[Path], Any]) -> Any:
    try:
        return parse(path)
    except FileNotFoundError:
        raise UserError(f"{path}: missing, the report needs it; finish the run with `sseds run` first") from None
    except (OSError, ValueError, TypeError, yaml.YAMLError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"expected a mapping of keys to values, found {type(value).__name__}")
    return value


def _json_object(path: Path) -> dict[str, Any]:
    return _mapping(json.loads(path.read_text(encoding="utf-8")))


def _arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as archive:
        return {name: np.asarray(archive[name], dtype=np.float64) for name in archive.files}


def _tables(search: Path, plan: dict[str, Any]) -> list[Table]:
    path = search / "plan.json"
    if plan.get("version") != PLAN_VERSION:
        raise UserError(f"{path}: version {plan.get('version')!r}, this release reads version {PLAN_VERSION}")
    where = "the plan"
    scored = "criterion" in plan.get("search", {})
    saliency = _read(search / "saliency.npz", _arrays) if scored else {}
    errors = _read(errors_path, _arrays) if (errors_path := search / "saliency_errors.npz").exists() else {}
    tables = []
    try:
        plan["reached"]["parameters"]["fraction"], plan["reached"]["dims"]["fraction"]  # the page's first numbers
        for name, entry in plan["tables"].items():
            where = f"table {name!r}"
            dim, kept = entry["original_dim"], tuple(entry["kept"])
            if (scores := saliency.get(name) if scored else np.zeros(dim)) is None:
                raise UserError(f"{search / 'saliency.npz'}: no scores for {where} of {path}")
            if scores.shape != (dim,):
                found = list(scores.shape)
                raise UserError(f"{search / 'saliency.npz'}: {where} has scores {found}, {path} expects [{dim}]")
            if not all(0 <= column < dim for column in kept):
                raise UserError(f"{path}: {where} keeps a column outside 0..{dim - 1}")
            if (own := errors.get(name)) is not None and own.shape != (dim,):
                raise UserError(f"{errors_path}: {where} has errors {list(own.shape)}, {path} expects [{dim}]")
            tables.append(Table(name, entry["rows"], dim, kept, entry["stored_dim"], scores, own))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: {where} is not as it should be: {error!r}") from error
    if not tables:
        raise UserError(f"{path}: `tables` is empty, there is nothing to report")
    return tables


def _curves(path: Path) -> Curves:
    points: dict[str, dict[int, tuple[float, float]]] = {"loss": {}, "auc": {}}
    for number, line in enumerate(_read(path, lambda p: p.read_text(encoding="utf-8")).splitlines(), start=1):
        try:
            event = json.loads(line)
            if event["kind"] == "train" or event["split"] == "validation":
                value = "loss" if event["kind"] == "train" else "auc"
                # A resumed run repeats steps: the last one holds.
                points[value][int(event["step"])] = (float(event["epoch"]), float(event[value]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number}: not a history event ({error!r}); delete the line") from error
    loss, auc = ([p for _, p in sorted(points[value].items()) if np.isfinite(p).all()] for value in ("loss", "auc"))
    return Curves(train_loss=loss, validation_auc=auc)
