"""A plan in the words of other systems: the tables that stay and their widths, to build a slim model without this package.

What is written is text, of plain names and numbers; neither torch nor the other system is needed to write it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import yaml

from sseds_rec.errors import UserError
from sseds_rec.files import is_local, join, write_text

if TYPE_CHECKING:
    from sseds_rec.search.plan import DimensionPlan, TablePlan

Format = Literal["torchrec", "fuxictr", "easyrec"]


def plan_path(plan_or_run: str) -> str:
    """Where the plan is: the file itself, or that of a run directory.

    Raises:
        UserError: it is a folder without one.
    """
    if not is_local(plan_or_run) or not Path(plan_or_run).is_dir():
        return plan_or_run
    path = join(plan_or_run, "search", "plan.json")
    if not Path(path).exists():
        raise UserError(f"{path}: no such file; run `sseds search` first, or name the plan itself")
    return path


def export_plan(plan: DimensionPlan, form: Format) -> str:
    """The slim tables of a plan as text for another system, see `docs/export.md`.

    Example::

        Path("tables.json").write_text(export_plan(sr.DimensionPlan.load("plan.json"), "torchrec"))

    Args:
        plan: any plan; of rotated tables the widths are those of the kept coordinates.
        form: "torchrec", the fields of `EmbeddingBagConfig`s, as JSON; "fuxictr", `use_features` and `feature_specs` of its model
            config, as YAML; "easyrec", `feature_configs` of TorchEasyRec, as protobuf's JSON. FuxiCTR gets
            `embedding_dim`, the others `stored_dim`, since they run on FBGEMM's kernels.

    Raises:
        UserError: no such format; no table keeps a column; or the format takes one width a feature and two tables serve one.
    """
    if form not in _WRITERS:
        raise UserError(f"unknown format {form!r}; choose one of {', '.join(_WRITERS)}")
    if not any(table.kept for table in plan.tables.values()):
        raise UserError(
            "the plan keeps no column of any table, so there is nothing to export; search with a larger budget"
        )
    return _WRITERS[form](plan)


def torchrec_tables(plan: DimensionPlan) -> list[dict[str, Any]]:
    """Fields of the slim tables' `EmbeddingBagConfig`s, pooling by its name, dropped tables gone."""
    return [
        {
            "name": name,
            "num_embeddings": table.rows,
            "embedding_dim": table.stored_dim,
            "feature_names": _features_of(name, table),
            "pooling": table.pooling,
        }
        for name, table in plan.tables.items()
        if table.kept
    ]


def dropped_features(plan: DimensionPlan) -> list[str]:
    """Features that no table of the slim model looks up."""
    kept = {feature for name, table in plan.tables.items() if table.kept for feature in _features_of(name, table)}
    every = [feature for name, table in plan.tables.items() for feature in _features_of(name, table)]
    return [feature for feature in dict.fromkeys(every) if feature not in kept]


def write_export(text: str, output: Path, plan_file: str) -> Path:
    """Writes an export atomically.

    Raises:
        UserError: the folder is missing, `output` is one, or is the plan.
    """
    if output.is_dir():
        raise UserError(f"{output}: is a folder; name a file in it")
    if not output.parent.is_dir():
        raise UserError(f"{output}: there is no folder {output.parent}; make it first")
    if is_local(plan_file) and output.exists() and output.samefile(plan_file):
        raise UserError(f"{output}: is the plan itself; name another file")
    return write_text(output, text)


def _torchrec(plan: DimensionPlan) -> str:
    return _json(torchrec_tables(plan))


def _fuxictr(plan: DimensionPlan) -> str:
    specs: list[dict[str, Any]] = []
    for name, features in _by_table(plan, "FuxiCTR").items():
        first = features[0]
        for feature in features:
            shared = {} if feature == first else {"share_embedding": first}
            specs.append({"name": feature, "embedding_dim": plan.tables[name].embedding_dim, **shared})
    # It is a list of what stays: FuxiCTR has no word for a field that goes, and a spec of one that is not used is an error.
    used = {"use_features": [spec["name"] for spec in specs]}
    return (
        "# The plan drops these features, so use_features has all others; add those without a table (numeric, meta):\n"
        f"# {json.dumps(dropped_features(plan))}\n" + _yaml(used) + _yaml({"feature_specs": specs})
    )


def _easyrec(plan: DimensionPlan) -> str:
    configs = []
    for name, features in _by_table(plan, "TorchEasyRec").items():
        table = plan.tables[name]
        pooling = {} if table.pooling == "NONE" else {"pooling": table.pooling.lower()}  # a sequence has none
        for feature in features:
            one = {
                "feature_name": feature,
                # Features that have it in common share a table. TorchRec makes a module's name of it, which has no dots.
                "embedding_name": name.replace(".", "_"),
                "embedding_dim": table.stored_dim,
                "num_buckets": table.rows,
            }
            configs.append({"id_feature": one | pooling})
    return _json({"feature_configs": configs})


_WRITERS: dict[str, Callable[[DimensionPlan], str]] = dict(
    zip(get_args(Format), (_torchrec, _fuxictr, _easyrec), strict=True)
)


def _features_of(name: str, table: TablePlan) -> list[str]:
    return table.feature_names or [name]


def _by_table(plan: DimensionPlan, system: str) -> dict[str, list[str]]:
    """Kept table -> its features, for a system that knows a table by its features."""
    kept = {name: _features_of(name, table) for name, table in plan.tables.items() if table.kept}
    table_of: dict[str, str] = {}
    for name, features in kept.items():
        for feature in features:
            other = table_of.setdefault(feature, name)
            if other != name:
                raise UserError(
                    f"feature {feature}: tables {other} and {name} both serve it, but {system} takes one width a feature; "
                    "use --format torchrec"
                )
    return kept


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120)
