"""Optimizers: fused into the embedding backward where FBGEMM can, torch's own everywhere else."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
import torchrec.optim
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from sseds_rec.distributed.sharding_config import Placement
from sseds_rec.distributed.tables import embedding_modules
from sseds_rec.errors import UserError
from sseds_rec.training.config import TableOptimizer, TrainConfig

_FUSED: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torchrec.optim.Adam,
    "rowwise_adagrad": torchrec.optim.RowWiseAdagrad,
    "adagrad": torchrec.optim.Adagrad,
    "sgd": torchrec.optim.SGD,
}
#: For data-parallel tables, with FBGEMM's ε: a table's placement does not change how it is trained.
_DATA_PARALLEL: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adam": (torch.optim.Adam, {"eps": 1e-8}),
    "adagrad": (torch.optim.Adagrad, {"eps": 1e-8}),
    "sgd": (torch.optim.SGD, {}),
}


def placement_for(optimizer: TableOptimizer, placement: Placement, device: torch.device) -> Placement:
    """The sharding type under which an optimizer can train the tables.

    FBGEMM fuses Adam on CUDA only, where it updates the rows of the batch. On a CPU, Adam's tables are data-parallel: every
    rank holds them whole, and each step all-reduces their gradients and reads and writes all rows and both moments. That is
    the paper's Adam, which moves rows that are not in the batch as well, and suits tables that are small.

    Of the others only rowwise_adagrad depends on the placement: a column-wise shard keeps a mean square of its own columns.

    Raises:
        UserError: the two settings exclude each other.
    """
    if optimizer == "adam" and device.type == "cpu":
        if placement not in ("auto", "data_parallel"):
            raise UserError(
                f"sharding.type={placement} with train.table_optimizer=adam: FBGEMM has no fused Adam on CPU; "
                "use rowwise_adagrad, adagrad or sgd, or sharding.type=data_parallel"
            )
        return "data_parallel"
    if placement == "data_parallel" and optimizer not in _DATA_PARALLEL:
        raise UserError(
            f"sharding.type=data_parallel with train.table_optimizer={optimizer}: it exists fused only; "
            f"use {', '.join(_DATA_PARALLEL)}"
        )
    return placement


def fuse_table_optimizer(
    model: nn.Module,
    optimizer: TableOptimizer,
    learning_rate: float,
    placement: Placement,
    data_parallel: Collection[str] = (),
) -> None:
    """Before sharding: has the tables updated inside their backward, unless they are data-parallel.

    Args:
        model: not yet sharded.
        optimizer: of the tables.
        learning_rate: of the tables.
        placement: sharding type of all tables.
        data_parallel: tables of which it is another.

    Raises:
        UserError: the optimizer exists fused only, and some table is data-parallel.
    """
    if placement == "data_parallel":
        return
    if data_parallel and optimizer not in _DATA_PARALLEL:
        raise UserError(
            f"sharding.tables.{min(data_parallel)}: data_parallel with train.table_optimizer={optimizer}: it exists fused only; "
            f"use {', '.join(_DATA_PARALLEL)}"
        )
    for module in embedding_modules(model).values():
        fused = [weight for name, weight in module.named_parameters() if name.split(".")[-2] not in data_parallel]
        apply_optimizer_in_backward(_FUSED[optimizer], fused, {"lr": learning_rate})


def build_optimizer(
    model: DistributedModelParallel,
    config: TrainConfig,
    gate: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
) -> CombinedOptimizer:
    """After sharding: the optimizer of the dense parameters and, for data-parallel tables, of those.

    Args:
        model: sharded, its tables fused with `config.table_optimizer` unless they are data-parallel.
        config: names both optimizers, their learning rates and options.
        gate: makes a third one, of the parameters of a search between tables and model (`CtrModel.gate`); they are not clipped.

    Returns:
        One optimizer over all parameters, the dense ones first. The fused part's `step` is a no-op: its update happens in
        backward.
    """
    parameters = dict(in_backward_optimizer_filter(model.named_parameters()))
    tables = {name: p for name, p in parameters.items() if ".embedding_bags." in name}
    apart = {name: p for name, p in parameters.items() if gate and name.startswith("gate.")}
    others = {name: p for name, p in parameters.items() if name not in {**tables, **apart}}
    kind, options = getattr(torch.optim, config.optimizer), config.optimizer_options
    dense: KeyedOptimizer = _keyed(others, kind, config.learning_rate, options)
    if config.clip_norm is not None:
        # DDP has averaged the gradients by now, so that every rank finds the same norm.
        dense = GradientClippingOptimizer(dense, GradientClipping.NORM, config.clip_norm)
    own = [KeyedOptimizerWrapper(apart, gate)] if gate else []
    if not tables:
        return CombinedOptimizer([dense, *own, model.fused_optimizer])
    kind, options = _DATA_PARALLEL[config.table_optimizer]
    return CombinedOptimizer([dense, *own, _keyed(tables, kind, config.table_rate, options)])


class RateSchedule:
    """Warm-up and reduction of all learning rates.

    They are a function of what `Progress` holds anyway, so that, unlike in TorchRec's `WarmupOptimizer`, there is no state
    to save and a resumed run cannot differ.

    Args:
        optimizer: its groups' present rates are those at scale 1.
        config: `warmup_steps` and `reduce_factor`.
    """

    def __init__(self, optimizer: KeyedOptimizer, config: TrainConfig) -> None:
        self._config = config
        self._groups: list[tuple[Any, float]] = [(group, group["lr"]) for group in optimizer.param_groups]

    def set(self, step: int, reductions: int) -> None:
        """Sets the rates for step number `step`, from 0, when they have been reduced `reductions` times.

        Call it before the step's `zero_grad`, in which the fused optimizers hand their rate to their kernels.
        """
        warm = min(1.0, (step + 1) / max(self._config.warmup_steps, 1))
        scale = warm * self._config.reduce_factor**reductions
        for group, rate in self._groups:
            group["lr"] = scale * rate


def _keyed(
    parameters: dict[str, Any], kind: Callable[..., torch.optim.Optimizer], rate: float, options: dict[str, Any]
) -> KeyedOptimizerWrapper:
    """An optimizer of torch, one kernel for all of a step's arithmetic where it has one."""
    if "fused" in inspect.signature(kind).parameters and not {"fused", "foreach", "differentiable"} & options.keys():
        options = {**options, "fused": True}
    return KeyedOptimizerWrapper(parameters, lambda params: kind(params, lr=rate, **options))
