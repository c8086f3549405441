"""What lies on a rank beside sharded tables, in bytes: for the planner, which knows tables only."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sseds_rec.distributed.sharding_config import ShardingConfig
from sseds_rec.distributed.tables import embedding_modules
from sseds_rec.footprint import STATE_BYTES, STATES
from sseds_rec.training.config import TrainConfig


def replicated_bytes(model: nn.Module, train: TrainConfig, sharding: ShardingConfig) -> int:
    """What every rank holds: dense weights, gradients and states; gradients and states of data-parallel tables; buffers.

    The weights of data-parallel tables are not in it: the planner counts them. Nor are activations.

    Args:
        model: not yet sharded, tables on the meta device.
        train: names the optimizers.
        sharding: says which tables are data-parallel.
    """
    tables = {
        id(weight): name.split(".")[-2]
        for module in embedding_modules(model).values()
        for name, weight in module.named_parameters()
    }
    dense = sum(_size(parameter) for parameter in model.parameters() if id(parameter) not in tables)
    copies = [
        parameter.numel()
        for parameter in model.parameters()
        if (name := tables.get(id(parameter))) is not None
        and (sharding.type == "data_parallel" or name in sharding.data_parallel_tables)
    ]
    buffers = sum(_size(buffer) for buffer in model.buffers() if not buffer.is_meta)
    return (
        round(dense * (2 + _states(train)))
        + STATE_BYTES * sum(copies) * (1 + STATES[train.table_optimizer][0])
        + buffers
    )


def divided_bytes(model: nn.Module) -> int:
    """What all ranks hold together, in equal parts: the maps of raw ids to rows."""
    return sum(_size(buffer) for buffer in model.buffers() if buffer.is_meta)


def _size(values: Tensor) -> int:
    return values.numel() * values.element_size()


def _states(train: TrainConfig) -> float:
    """Numbers that the dense optimizer keeps for each parameter, counted after a step of its own."""
    parameter = nn.Parameter(torch.zeros(64, 64))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = getattr(torch.optim, train.optimizer)([parameter], **train.optimizer_options)
    optimizer.step()
    states = optimizer.state[parameter].values()
    return sum(value.numel() for value in states if isinstance(value, Tensor) and value.numel() > 1) / parameter.numel()
