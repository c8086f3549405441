"""Training state on disk: DCP folders that appear complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torchrec.optim.keyed import KeyedOptimizer

from sseds_rec.distributed.checkpoint import first_reason, load_checkpoint, stored_shapes
from sseds_rec.distributed.runtime import Runtime
from sseds_rec.errors import UserError
from sseds_rec.files import read_json, write_json

_PROGRESS = "progress.json"


class Progress(BaseModel):
    """Where training stands, beside the tensors.

    Attributes:
        step: optimizer steps done.
        epoch: current epoch, from 0.
        loader: position in the epoch, as the loader's `state_dict` gives it.
        best_auc: best validation AUC so far, at `best_step`.
        peak_auc: best validation AUC after an epoch of training: a trained model's own, before the first, does not count.
        bad_epochs: epochs since then.
        reductions: how often the learning rates have been reduced.
        seconds: spent training and validating, over all sessions.
        train_seconds: of these, in training steps.
        samples: rows trained on, over all ranks.
    """

    model_config = ConfigDict(extra="forbid")

    step: int = 0
    epoch: int = 0
    loader: dict[str, Any] = {}
    best_auc: float = -1.0
    best_step: int = -1
    peak_auc: float = -1.0
    bad_epochs: int = 0
    reductions: int = 0
    seconds: float = 0.0
    train_seconds: float = 0.0
    samples: int = 0


class _Record(Progress):
    """What `progress.json` holds."""

    fingerprint: str


class CheckpointStore:
    """`<folder>/step-00000131/`, one folder a checkpoint; all ranks call its methods.

    A checkpoint appears under its name when it is whole, and others go after that, so there is a whole one at any time.

    Args:
        folder: where the checkpoints go; what a killed process left half written or half removed there goes away.
        runtime: of this process.
        keep: how many of the last ones to keep, besides the best.
        asynchronous: copy the state to host memory and write it in a thread, while training goes on. One is written
            at a time: the next one, and `finish`, wait for it.
        fingerprint: of the settings the training depends on; `load` refuses a checkpoint with another.
    """

    def __init__(
        self, folder: Path, runtime: Runtime, keep: int = 1, asynchronous: bool = False, fingerprint: str = ""
    ) -> None:
        self.folder, self.runtime, self.keep, self.fingerprint = folder, runtime, keep, fingerprint
        self._thread = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        # Not the group of training, whose collectives the thread's would get between.
        self._group = dist.new_group(backend="gloo") if asynchronous else None
        self._writing: Future[None] | None = None
        runtime.on_main(self._tidy)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps of complete checkpoints, oldest first."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("step-*"))

    def save(self, model: nn.Module, optimizer: KeyedOptimizer, progress: Progress) -> None:
        """Writes a checkpoint of this step, and then removes all but the last ones and the best.

        Raises:
            UserError: it, or the asynchronous one before it, cannot be written.
        """
        self.finish()
        state = _state(model, optimizer, self.runtime)
        target = self.path(progress.step)
        beside = {_PROGRESS: {"fingerprint": self.fingerprint, **progress.model_dump()}}
        best_step = progress.best_step
        if self._thread is None:
            _save(target, state, self.runtime, beside)
            self.runtime.on_main(lambda: self._keep_last(best_step))
            return
        temporary = _begin(target, self.runtime)
        stager = BlockingAsyncStager()  # DCP's default one cannot copy ShardedTensors
        written = dcp.async_save(state, checkpoint_id=temporary, process_group=self._group, async_stager=stager)

        def complete() -> None:
            with _failure_in_one_line(target):
                written.result()  # type: ignore[union-attr]
            if self.runtime.is_main:
                _publish(temporary, target, beside)
                self._keep_last(best_step)

        self._writing = self._thread.submit(complete)

    def finish(self) -> None:
        """Waits for the checkpoint that is being written, if there is one.

        Raises:
            UserError: it cannot be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            self.runtime.on_main(writing.result)
            writing.result()

    def load(self, step: int, model: nn.Module, optimizer: KeyedOptimizer) -> Progress:
        """Restores model, optimizer and random state in place; the number of ranks and the placement of tables may be new.

        Before it, the optimizer has made no step if the checkpoint is one of step 0.

        Raises:
            UserError: the checkpoint is damaged, of another version, of other settings, or of a placement whose optimizer
                states differ in kind.
        """
        path = self.path(step)
        try:
            record = _Record.model_validate(read_json(path / _PROGRESS))
        except ValidationError as error:
            name = ".".join(map(str, error.errors()[0]["loc"])) or "content"
            raise UserError(
                f"{path / _PROGRESS}: {name} is not as this version writes it; go on with the version that did, "
                "or run its stage again"
            ) from None
        if record.fingerprint != self.fingerprint:
            raise UserError(
                f"{path}: it was trained under another config; train on with that one, or choose another --run-dir"
            )
        if record.step:  # before the first, optimizers have no state
            optimizer.init_state()
        state = _state(model, optimizer, self.runtime)
        if not {f"rng.{name}" for name in state["rng"]} <= set(stored_shapes(path)):
            del state["rng"]  # another number of ranks: new ranks go on with their own seed
        load_checkpoint(state, path, "resume with the sharding.type that it was saved under, or run its stage again")
        model.load_state_dict(state["model"])
        states = optimizer.state_dict()["state"] | state.get("optimizer", {"state": {}})["state"]
        optimizer.load_state_dict({"state": states})
        progress = Progress.model_validate(record.model_dump(exclude={"fingerprint"}))
        optimizer.set_optimizer_step(progress.step)  # fused Adam's own count is in no state dict
        if "rng" in state:
            _set_rng(state["rng"], self.runtime)
        return progress

    def _keep_last(self, best_step: int) -> None:
        for step in self.steps()[: -self.keep]:
            if step != best_step:
                hidden = self.folder / f".{self.path(step).name}.removed"
                os.replace(self.path(step), hidden)
                shutil.rmtree(hidden)

    def _tidy(self) -> None:
        """Ends what a killed process had begun."""
        for left in self.folder.glob(".step-*"):
            if left.suffix == ".tmp" and (left / _PROGRESS).exists():  # whole, only its name was missing
                _rename(left, self.folder / left.stem.removeprefix("."))
            else:
                shutil.rmtree(left)


def save_weights(path: Path, model: nn.Module, runtime: Runtime) -> None:
    """Writes a checkpoint of the model's weights alone; replaces what is there."""
    _save(path, {"model": model.state_dict()}, runtime, {})


def load_weights(path: Path, model: nn.Module) -> None:
    """Loads a checkpoint's model weights, saved under any sharding, into a sharded model.

    Raises:
        UserError: the checkpoint lacks a weight or holds it in another shape (names it).
    """
    stored = stored_shapes(path)
    state = model.state_dict()
    for name, tensor in state.items():
        held = stored.get(f"model.{name}")
        if held != list(tensor.shape):
            raise UserError(
                f"{path}: {name} is {list(tensor.shape)} in the model, the checkpoint holds {held or 'nothing'}"
            )
    load_checkpoint({"model": state}, path)
    model.load_state_dict(state)


def _save(target: Path, state: dict[str, Any], runtime: Runtime, beside: dict[str, Any]) -> None:
    """Writes a checkpoint, and JSON files beside it, under a temporary name, and renames it; all ranks call it."""
    temporary = _begin(target, runtime)
    with _failure_in_one_line(target):
        dcp.save(state, checkpoint_id=temporary)
    runtime.on_main(lambda: _publish(temporary, target, beside))


def _begin(target: Path, runtime: Runtime) -> Path:
    """Makes the empty folder of a temporary name in which a checkpoint is written."""
    temporary = target.with_name(f".{target.name}.tmp")

    def make() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    runtime.on_main(make)
    return temporary


def _publish(temporary: Path, target: Path, beside: dict[str, Any]) -> None:
    """Gives a written checkpoint its name."""
    for name, content in beside.items():
        write_json(temporary / name, content)
    _rename(temporary, target)


def _rename(temporary: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)


@contextmanager
def _failure_in_one_line(target: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointException as error:  # on all ranks, whichever failed
        raise UserError(f"{target}: the checkpoint cannot be written ({first_reason(error)})") from None


def _state(model: nn.Module, optimizer: KeyedOptimizer, runtime: Runtime) -> dict[str, Any]:
    rng = {f"rank{runtime.rank}": torch.get_rng_state()}
    if runtime.device.type == "cuda":
        rng[f"rank{runtime.rank}_cuda"] = torch.cuda.get_rng_state(runtime.device)
    # SGD, say, keeps no state, and DCP looks for empty entries on loading that it leaves out on saving.
    states = {name: state for name, state in optimizer.state_dict()["state"].items() if state}
    return {"model": model.state_dict(), "rng": rng} | ({"optimizer": {"state": states}} if states else {})


def _set_rng(rng: dict[str, Tensor], runtime: Runtime) -> None:
    torch.set_rng_state(rng[f"rank{runtime.rank}"])
    if runtime.device.type == "cuda":
        torch.cuda.set_rng_state(rng[f"rank{runtime.rank}_cuda"], runtime.device)
