"""Training state on disk: DCP folders that appear complete or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torchrec.optim.keyed import KeyedOptimizer

from sseds_rec.distributed.checkpoint import load_checkpoint, stored_shapes
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
        bad_epochs: epochs since then.
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
    bad_epochs: int = 0
    seconds: float = 0.0
    train_seconds: float = 0.0
    samples: int = 0


class CheckpointStore:
    """`<folder>/step-00000131/`, one folder a checkpoint.

    Args:
        folder: where the checkpoints go.
        runtime: of this process; all ranks save and load together.
    """

    def __init__(self, folder: Path, runtime: Runtime) -> None:
        self.folder = folder
        self.runtime = runtime

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps of complete checkpoints, oldest first."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("step-*"))

    def save(self, model: nn.Module, optimizer: KeyedOptimizer, progress: Progress) -> None:
        """Writes a checkpoint of this step, and then removes all but it and the best one."""
        state = _state(model, optimizer, self.runtime)
        _save(self.path(progress.step), state, self.runtime, {_PROGRESS: progress.model_dump()})
        self.runtime.on_main(lambda: self._keep_only(progress.step, progress.best_step))

    def _keep_only(self, *wanted: int) -> None:
        for step in self.steps():
            if step not in wanted:
                shutil.rmtree(self.path(step))

    def load(self, step: int, model: nn.Module, optimizer: KeyedOptimizer) -> Progress:
        """Restores model, optimizer and random state in place; between epochs the number of ranks may have changed."""
        path = self.path(step)
        optimizer.init_state()
        state = _state(model, optimizer, self.runtime)
        if not {f"rng.{name}" for name in state["rng"]} <= set(stored_shapes(path)):
            del state["rng"]  # another number of ranks: new ranks go on with their own seed
        load_checkpoint(state, path)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        progress = Progress.model_validate(read_json(path / _PROGRESS))
        optimizer.set_optimizer_step(progress.step)  # fused Adam's own count is in no state dict
        if "rng" in state:
            _set_rng(state["rng"], self.runtime)
        return progress


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
    temporary = target.with_name(f".{target.name}.tmp")

    def begin() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def publish() -> None:
        for name, content in beside.items():
            write_json(temporary / name, content)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)

    runtime.on_main(begin)
    dcp.save(state, checkpoint_id=temporary)
    runtime.on_main(publish)


def _state(model: nn.Module, optimizer: KeyedOptimizer, runtime: Runtime) -> dict[str, Any]:
    rng = {f"rank{runtime.rank}": torch.get_rng_state()}
    if runtime.device.type == "cuda":
        rng[f"rank{runtime.rank}_cuda"] = torch.cuda.get_rng_state(runtime.device)
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": rng}


def _set_rng(rng: dict[str, Tensor], runtime: Runtime) -> None:
    torch.set_rng_state(rng[f"rank{runtime.rank}"])
    if runtime.device.type == "cuda":
        torch.cuda.set_rng_state(rng[f"rank{runtime.rank}_cuda"], runtime.device)
