"""One forward pass of somebody's model after the other: batches from an iterable, a loss from whatever the model returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sseds_rec.errors import UserError

LossFn = Callable[[nn.Module, Any], Tensor]


def batches_of(
    batches: Iterable[Any], device: torch.device, enough: Callable[[], bool] = lambda: False
) -> Iterator[Any]:
    """The batches on a device (if they have `to`), as long as every rank has one and none has had enough."""
    stream = iter(batches)
    while True:
        batch: Any = None if enough() else next(stream, None)
        is_there = torch.tensor(int(batch is not None), device=device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(is_there, op=dist.ReduceOp.MIN)
        if not is_there:
            return
        yield batch.to(device) if hasattr(batch, "to") else batch


def sum_over_ranks(values: Tensor) -> Tensor:
    """All-reduces in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def mean_loss(model: nn.Module, batch: Any, loss_fn: LossFn | None) -> Tensor:
    """The mean loss over this rank's rows.

    Raises:
        UserError: the model returns something else.
    """
    result = loss_fn(model, batch) if loss_fn else model(batch)
    loss = result[0] if isinstance(result, Sequence) and result else result
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise UserError(
            "in eval mode the model must return its mean loss (a scalar), or a tuple that begins with it; give loss_fn otherwise"
        )
    return loss


def check_graph(loss: Tensor) -> None:
    """Refuses a loss that cannot be differentiated."""
    if not loss.requires_grad:
        raise UserError("the loss has no graph to the embeddings; return it as it is to be trained on, not detached")


def device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters lie."""
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
