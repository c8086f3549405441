"""The run directory: what is done, what a changed config would invalidate, and where artefacts lie."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sseds_rec.config import Config, changed_keys, flatten, load_config
from sseds_rec.distributed.runtime import Runtime
from sseds_rec.errors import UserError
from sseds_rec.files import read_json, write_json
from sseds_rec.stages import STAGES, Stage

#: Config section, or key, -> the first stage that it changes; what is not here, such as sharding.type, changes no result.
_FIRST_STAGE = {"seed": 0, "data": 0, "model": 0, "sharding.comm_precision": 0, "train": 0, "search": 1, "retrain": 3}
_FIRST_STAGE["search.pep.budgets"] = len(STAGES)  # only says what of its search is kept

#: Keys of those sections that change none either.
_CHECKPOINTING = {"checkpoint_steps", "keep_checkpoints", "async_checkpoints"}


class RunDirectory:
    """`runs/<name>/`, with a folder for every stage; a stage is done when its `metrics.json` (or page) is there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, *parts: str) -> Path:
        return self.folder.joinpath(*parts)

    def done(self, stage: str) -> bool:
        """Whether a stage has finished."""
        return self.path(stage, "index.html" if stage == "report" else "metrics.json").exists()

    def require(self, what: str, stage: str) -> None:
        """Refuses to go on when a stage has not been run.

        Raises:
            UserError: names the verb to run first.
        """
        if not self.done(stage):
            verb = "train" if stage == "pretrain" else stage
            raise UserError(
                f"{self.folder}: {what} needs the {stage} stage, which has not finished here; run `sseds {verb}` first"
            )

    def finish(self, stage: str, metrics: dict[str, Any]) -> None:
        """Marks a stage done: writes its metrics, and the run's `metrics.json` from those of all stages."""
        write_json(self.path(stage, "metrics.json"), metrics)
        self._write_metrics()

    def _write_metrics(self) -> None:
        """Brings the run's `metrics.json` up to date with the stages'."""
        stages = [s for s in STAGES if self.path(s, "metrics.json").exists()]
        metrics = {s: read_json(self.path(s, "metrics.json")) for s in stages}
        path = self.path("metrics.json")
        if metrics != (read_json(path) if path.exists() else {}):
            write_json(path, metrics)

    def open(self, config: Config, runtime: Runtime, rerun_from: str | None = None) -> None:
        """Begins or goes on with an experiment; all ranks call it.

        Args:
            config: of this call; recorded in `config.yaml`.
            runtime: of this process.
            rerun_from: remove what this stage and those after it left, and do them again.

        Raises:
            UserError: the config differs from the recorded one in something that a finished or begun stage depends on.
        """
        again = STAGES.index(rerun_from) if rerun_from else len(STAGES)
        recorded = self.path("config.yaml")
        if recorded.exists():
            self._refuse_changes(changed_keys(load_config(recorded), config), again)
        runtime.barrier()  # every rank has compared before rank 0 writes

        def begin() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Last stage first: what a kill leaves was made from the stages that are still there.
            for stage in reversed(STAGES):
                _remove(self.path(stage), hide=STAGES.index(stage) >= again)
            self._write_metrics()
            for stage in filter(self.done, STAGES):
                shutil.rmtree(self.path(stage, "checkpoints"), ignore_errors=True)  # of a run killed while it tidied up
            if not recorded.exists() or changed_keys(load_config(recorded), config):
                config.save(recorded)
            if not self.path("environment.json").exists() or again < len(STAGES):
                write_json(self.path("environment.json"), environment(runtime))

        runtime.on_main(begin)

    def _refuse_changes(self, changes: dict[str, tuple[Any, Any]], again: int) -> None:
        for key, (old, new) in changes.items():
            first = _first_stage(key)
            begun = [stage for stage in STAGES[first:again] if self.path(stage).exists()]
            if begun:
                raise UserError(
                    f"{self.folder} was run with {key}={old}, now it is {new}; choose another --run-dir, "
                    f"or redo what depends on it with `sseds run ... --rerun-from {STAGES[first]}`"
                )


def fingerprint(config: Config, stage: Stage) -> str:
    """Sixteen hexadecimal digits that differ if a setting does on which the stage depends.

    Settings left at their default do not count: a key that a later version adds changes nothing.
    """
    settings = flatten(config.model_dump(mode="json", exclude_defaults=True))
    own = {key: value for key, value in settings.items() if _first_stage(key) <= STAGES.index(stage)}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]


def _first_stage(key: str) -> int:
    """Number of the first stage that a config key changes."""
    section, _, name = key.partition(".")
    if name in _CHECKPOINTING:
        return len(STAGES)
    return _FIRST_STAGE.get(key, _FIRST_STAGE.get(section, len(STAGES)))


def _remove(folder: Path, hide: bool) -> None:
    """Removes a folder under another name, so that a kill leaves no half of it that looks finished.

    Args:
        folder: a stage's.
        hide: whether to remove it; if not, only what an earlier, killed call left.
    """
    removed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    if hide and folder.exists():
        os.replace(folder, removed)
        shutil.rmtree(removed)


def environment(runtime: Runtime) -> dict[str, Any]:
    """Versions and hardware, for the report and for whoever repeats the run."""
    packages = {"sseds_rec": "sseds-rec", "torch": "torch", "torchrec": "torchrec", "fbgemm": _fbgemm()}
    versions = {name: _version(package) for name, package in packages.items()}
    device = torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else "cpu"
    return versions | {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "device": device,
        "world_size": runtime.world_size,
    }


def _fbgemm() -> str:
    return "fbgemm-gpu-cpu" if _version("fbgemm-gpu-cpu") != "unknown" else "fbgemm-gpu"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
