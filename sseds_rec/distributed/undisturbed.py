"""Forward passes beside training: a model in the middle of it, pipelined or not, runs as if it were at rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.train_pipeline.postproc import PipelinedPostproc
from torchrec.distributed.train_pipeline.runtime_forwards import BaseForward, KJTAllToAllForward

from sseds_rec.distributed.tables import kernels_uncounted, lookup_modules, training_kernels
from sseds_rec.errors import UserError


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """In the block, forward passes in eval mode leave no trace in what trains the model.

    * Pipelines such as `TrainPipelineSparseDist` replace the forward of sharded modules by one that takes the next batch in
      flight. The modules' own forwards run here, and the batches in flight stay where they are.
    * What DDP wraps runs without it: DDP would prepare for a backward, broadcast buffers and, of a static graph, take the
      first gradients that pass for those of the first training step.
    * The kernels' step counters, and every module's train or eval mode, are as before.
    * Gradients can be taken, even if the caller is in `torch.no_grad` or `torch.inference_mode`.

    Raises:
        UserError: embeddings were prefetched for batches in flight, which another forward would take.
    """
    modules = [*model.modules(), *lookup_modules(model)]
    if any(getattr(kernel, "timesteps_prefetched", None) for kernel in training_kernels(model)):
        raise UserError(
            "the training pipeline has prefetched embeddings of batches in flight; "
            "let it run to its end, or prefetch nothing, before scoring"
        )
    modes = [(module, module.training) for module in modules]
    with ExitStack() as changed:
        changed.enter_context(torch.inference_mode(False))  # enables gradients, in no_grad as well
        for module in modules:
            _unpipeline(changed, module)
            if isinstance(module, DistributedDataParallel):
                _set(changed, module, "forward", module.module.__call__)
        model.eval()
        try:
            with kernels_uncounted(model):
                yield
        finally:
            for module, training in modes:
                module.training = training


def _unpipeline(changed: ExitStack, module: nn.Module) -> None:
    """Gives a module its own forward back."""
    if isinstance(vars(module).get("forward"), BaseForward):
        _unset(changed, module, "forward")
        _set(changed, module, "is_pipelined", False)
    if isinstance(module, PipelinedPostproc):
        _set(changed, module, "forward", module.postproc_module.__call__)
    if vars(module).get("_free_features_storage_early"):  # it would free the caller's batch
        _set(changed, module, "_free_features_storage_early", False)
    for input_dist in getattr(module, "_input_dists", []):
        exchange = getattr(input_dist, "_dist", None)
        if exchange is not None and isinstance(vars(exchange).get("forward"), KJTAllToAllForward):
            _unset(changed, exchange, "forward")


def _set(changed: ExitStack, owner: nn.Module, name: str, value: Any) -> None:
    _undo(changed, owner, name)
    vars(owner)[name] = value


def _unset(changed: ExitStack, owner: nn.Module, name: str) -> None:
    _undo(changed, owner, name)
    del vars(owner)[name]


def _undo(changed: ExitStack, owner: nn.Module, name: str) -> None:
    before = vars(owner)
    if name in before:
        changed.callback(before.__setitem__, name, before[name])
    else:
        changed.callback(before.pop, name, None)
