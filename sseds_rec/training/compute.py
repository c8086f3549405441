"""How the dense part of a model computes: precision and compilation."""

from __future__ import annotations

import os
import shutil

import torch

from sseds_rec.errors import UserError
from sseds_rec.models.ctr import CtrModel
from sseds_rec.training.config import TrainConfig


def prepare_dense(model: CtrModel, config: TrainConfig, device: torch.device) -> None:
    """Applies `train.precision` and `train.compile` to the model over the embeddings, which themselves stay float32.

    Args:
        model: not yet sharded.
        config: the `train` section.
        device: on which it will run.

    Raises:
        UserError: TF32 is asked for on a CPU, which has none, or compilation without a C++ compiler.
    """
    if config.precision == "tf32" and device.type == "cpu":
        raise UserError("train.precision=tf32: a CPU has no TF32; use float32 or bf16")
    torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")
    if config.precision == "bf16":
        model.over.forward = torch.autocast(device.type, torch.bfloat16)(model.over.forward)
    if config.compile:
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            raise UserError(
                f"train.compile=true: torch.compile needs a C++ compiler, and {compiler} is not found; install it, name another "
                "in CXX, or set train.compile=false"
            )
        model.over.compile()
