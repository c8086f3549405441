"""The folder of a comparison: that its cells are all of one experiment, and what `compare.json` says of it."""

from __future__ import annotations

import sys
from pathlib import Path
from shlex import join
from typing import Any

import torch

from sseds_rec.compare.cells import Cell, grid_of_rates
from sseds_rec.compare.pool import gpus_of, processes_of
from sseds_rec.config import Config, changed_keys, load_config, with_settings
from sseds_rec.data.dataset import open_dataset
from sseds_rec.distributed.runtime import ALONE, Runtime
from sseds_rec.errors import UserError
from sseds_rec.files import read_json
from sseds_rec.harness import pipeline_for
from sseds_rec.run_directory import RunDirectory, environment

#: What may change from one call to the next: it adds or leaves out cells, and changes none.
_GRID = {"methods", "budgets", "models", "seeds", "learning_rates", "embedding_l2", "ablations", "processes"}


def open_comparison(folder: Path, config: Config, source: str) -> tuple[Config, dict[str, Any]]:
    """Begins or goes on with a comparison.

    Args:
        folder: of the comparison.
        config: of this call; recorded in `config.yaml`.
        source: where it was read.

    Returns:
        The config, with the budget of the trials that the first call had, and what `compare.json` says, with the seconds that
        earlier calls took.

    Raises:
        UserError: the folder is of another experiment (names the key), the data are missing, or no cell could run.
    """
    recorded = folder / "config.yaml"
    before = load_config(recorded) if recorded.exists() else None
    if config.compare.tune_budget is None:
        tuned_at = before.compare.tuned_at if before else config.compare.tuned_at
        if tuned_at not in config.compare.budgets:
            raise UserError(
                f"{folder} tunes its methods at a budget of {tuned_at:g}, so that has to be one of compare.budgets"
            )
        config = with_settings(config, {"compare.tune_budget": tuned_at})
    if before is not None:
        for key, (old, new) in changed_keys(before, config).items():
            if key.removeprefix("compare.") not in _GRID:
                raise UserError(f"{folder} compares with {key}={old}, now it is {new}; choose another --run-dir")
    schema = open_dataset(config.data).schema
    _check(config, folder)
    folder.mkdir(parents=True, exist_ok=True)
    config.save(recorded)
    section = config.compare
    written = folder / "compare.json"
    return config, {
        "command": join(["sseds", *sys.argv[1:]]),
        "config": source,
        "data": {
            "path": config.data.path,
            **{f"{name}_rows": split.rows for name, split in schema.splits.items()},
            "fields": len(schema.sparse_fields),
        },
        "models": section.models,
        "methods": section.names,
        "budgets": section.budgets,
        "seeds": [config.seed + number for number in range(section.seeds)],
        "learning_rates": section.learning_rates,
        "embedding_l2": section.embedding_l2,
        "tune_budget": section.tuned_at,
        "processes": processes_of(config),
        "seconds": read_json(written)["seconds"] if written.exists() else 0.0,
        "environment": environment(Runtime(0, 1, torch.device("cuda" if gpus_of(config) else "cpu"))),
    }


def _check(config: Config, folder: Path) -> None:
    """Refuses what every cell would refuse. What one method cannot do is said of its cells, and the others go on."""
    section = config.compare
    for model in section.models:
        for method in ["full", *(["drop_ids"] if section.id_fields else [])]:
            cell = Cell(model, method, None, config.seed, grid_of_rates(section)[0])
            pipeline_for(cell.config(config), RunDirectory(folder), ALONE)
