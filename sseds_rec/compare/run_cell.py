"""Runs one cell, in a process of the pool: its stages, what it cost, and what its tables hold."""

from __future__ import annotations

import os
import shutil
import traceback
from fractions import Fraction
from pathlib import Path
from typing import Any

from sseds_rec.compare.accounting import count_tables
from sseds_rec.compare.cells import Cell
from sseds_rec.config import Config, load_config
from sseds_rec.distributed.runtime import runtime
from sseds_rec.errors import Preempted, user_message
from sseds_rec.files import read_json, write_json
from sseds_rec.harness import pipeline_for
from sseds_rec.run_directory import RunDirectory

RESULT = "result.json"
#: What a run leaves that is large, by stage.
_WEIGHTS = ("checkpoint", "checkpoints", "tensorboard", "learned")


def run_cell(cell: Cell, config: Config, folder: Path, leader: Cell | None) -> None:
    """Leaves `result.json` in the cell's run directory, or the line of why there is none: {"error": ...}.

    A cell that was killed goes on from what its stages have left. What cells started from is linked, and only read.

    Args:
        cell: to run.
        config: of the comparison.
        folder: of the comparison.
        leader: the cell whose search it shares, which has finished, if that is not its own. Where that search is of no use for
            it, the cell has its own.
    """
    own = folder / cell.folder
    try:
        result = _train(cell, cell.config(config), folder, leader)
    except Preempted:
        raise
    except (
        Exception
    ) as error:  # of this cell alone: a loss that is not finite, a budget that holds no column, no memory
        if (message := user_message(error)) is None:
            traceback.print_exc()
            message = f"{type(error).__name__}: {error} (the traceback is in logs/)"
        result = {"error": message}
    write_json(own / RESULT, result)
    if "error" not in result:  # a run that failed is tried again, from what its stages have left
        for part in ("retrain", "slim", "search"):
            _remove_weights(own / part, but="learned")


def remove_starts(folder: Path) -> None:
    """Removes what other cells could have started from of a cell that none does."""
    for part in ("pretrain", "search"):
        _remove_weights(folder / part)


def _remove_weights(stage: Path, but: str = "") -> None:
    """Of a stage of this cell: what is linked is another's."""
    for path in (stage / name for name in _WEIGHTS if name != but):
        if not stage.is_symlink() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def _train(cell: Cell, config: Config, folder: Path, leader: Cell | None) -> dict[str, Any]:
    run = RunDirectory(folder / cell.folder)
    with runtime(config.device) as place:
        pipeline = pipeline_for(config, run, place)
        run.open(config, place)
        if cell.pretraining is not None:
            _link(run.path("pretrain"), folder / cell.pretraining.folder / "pretrain")
        if leader is not None and _serves(folder / leader.folder, cell):
            _link(run.path("search", "learned"), folder / leader.folder / "search" / "learned")
        stages = ["pretrain"]
        if cell.method != "full":
            slims = cell.pretraining is not None and config.search.method == "sseds"
            stages = ["search", "slim", "retrain"] if slims else ["search", "retrain"]
        for stage in stages:
            if not run.done(stage):
                getattr(pipeline, stage)()
    metrics = {stage: read_json(run.path(stage, "metrics.json")) for stage in stages}
    trained = metrics[stages[-1]]
    counts = count_tables(run.path(stages[-1], "checkpoint"))
    asked = None
    if cell.budget is not None:
        whole = metrics["search"]["reached"]["parameters"]["of"]
        asked = int(Fraction(str(cell.budget)) * whole)  # as `Budget` counts
    pretraining = read_json(run.path("pretrain", "metrics.json")) if cell.pretraining is not None else {}
    return {
        **{key: trained[key] for key in ("auc", "logloss", "validation_auc", "parameters")},
        "auc_before_retraining": metrics.get("slim", {}).get("auc"),
        "embedding_parameters": counts.elements if "csr_bytes" in trained else counts.columns,
        "stored_parameters": counts.stored,
        "budget_parameters": asked,
        "dense_bytes": 4 * counts.stored,
        "csr_bytes": trained.get("csr_bytes"),
        "pretrain_seconds": (pretraining or metrics.get("pretrain", {})).get("seconds", 0.0),
        "search_seconds": metrics.get("search", {}).get("seconds", 0.0),
        "retrain_seconds": metrics.get("retrain", {}).get("seconds", 0.0),
        "inference_samples_per_second": trained["inference_samples_per_second"],
    }


def is_above(result: dict[str, Any]) -> bool:
    """Whether what a cell left missed its budget."""
    asked = result["budget_parameters"]
    return asked is not None and result["embedding_parameters"] > asked


def _serves(leader: Path, cell: Cell) -> bool:
    """Whether a finished cell's search learned something, and for this cell's budget too."""
    if "error" in read_json(leader / RESULT):
        return False
    return cell.method != "pep" or cell.budget in load_config(leader / "config.yaml").search.pep.budgets


def _link(link: Path, target: Path) -> None:
    """Makes `link` stand for a finished cell's folder."""
    link.parent.mkdir(parents=True, exist_ok=True)
    if not os.path.lexists(link):  # a cell that has begun a search of its own goes on with it
        link.symlink_to(os.path.relpath(target, link.parent))
