"""Optimizers: fused into the embedding backward where FBGEMM can, torch's own everywhere else."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torchrec.optim
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from sseds_rec.distributed.sharding import Placement
from sseds_rec.distributed.tables import embedding_modules
from sseds_rec.errors import UserError

TableOptimizer = Literal["adam", "rowwise_adagrad", "adagrad", "sgd"]

_FUSED: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torchrec.optim.Adam,
    "rowwise_adagrad": torchrec.optim.RowWiseAdagrad,
    "adagrad": torchrec.optim.Adagrad,
    "sgd": torchrec.optim.SGD,
}
_DENSE: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
}


def placement_for(optimizer: TableOptimizer, placement: Placement, device: torch.device) -> Placement:
    """The sharding type under which an optimizer can train the tables.

    FBGEMM fuses Adam on CUDA only. On a CPU, Adam's tables are data-parallel: every rank holds them whole and each step
    touches every row, which suits tables that are small.

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
    if placement == "data_parallel" and optimizer not in _DENSE:
        raise UserError(
            f"sharding.type=data_parallel with train.table_optimizer={optimizer}: it exists fused only; use {', '.join(_DENSE)}"
        )
    return placement


def fuse_table_optimizer(
    model: nn.Module, optimizer: TableOptimizer, learning_rate: float, placement: Placement
) -> None:
    """Before sharding: has the tables updated inside their backward, unless they are data-parallel."""
    if placement == "data_parallel":
        return
    for module in embedding_modules(model).values():
        apply_optimizer_in_backward(_FUSED[optimizer], module.parameters(), {"lr": learning_rate})


def build_optimizer(
    model: DistributedModelParallel, table_optimizer: TableOptimizer, table_learning_rate: float, learning_rate: float
) -> CombinedOptimizer:
    """After sharding: Adam for the dense parameters, and for data-parallel tables the optimizer of their choice.

    Returns:
        One optimizer over all parameters; the fused part's `step` is a no-op, its update happens in backward.
    """
    parameters = dict(in_backward_optimizer_filter(model.named_parameters()))
    tables = {name: p for name, p in parameters.items() if ".embedding_bags." in name}
    dense = {name: p for name, p in parameters.items() if name not in tables}
    parts: list[KeyedOptimizer] = [_keyed(dense, torch.optim.Adam, lr=learning_rate)]
    if tables:
        parts.append(_keyed(tables, _DENSE[table_optimizer], lr=table_learning_rate))
    else:
        parts.append(model.fused_optimizer)
    return CombinedOptimizer(parts)


def _keyed(parameters: dict[str, Any], optimizer: type[torch.optim.Optimizer], **options: Any) -> KeyedOptimizerWrapper:
    return KeyedOptimizerWrapper(parameters, lambda params: optimizer(params, **options))
