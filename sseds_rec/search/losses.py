"""Finds the logits of a model that only returns a loss, and the curvature of the loss in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sseds_rec.errors import UserError


def _bce_with_logits(z: Tensor, target: Tensor) -> Tensor:
    p = z.sigmoid()
    return p * (1 - p)


def _bce(p: Tensor, target: Tensor) -> Tensor:
    # In p the expected curvature is 1/(p(1-p)); times (∂p/∂z)² it is p(1-p), the same as in the logit.
    return 1 / (p * (1 - p)).clamp_min(1e-12)


def _mse(z: Tensor, target: Tensor) -> Tensor:
    return z.new_full(z.shape, 2.0)


#: Loss function -> its expected second derivative in the prediction, per sample.
_CURVATURE: dict[Callable[..., Tensor], Callable[[Tensor, Tensor], Tensor]] = {
    F.binary_cross_entropy_with_logits: _bce_with_logits,
    F.binary_cross_entropy: _bce,
    F.mse_loss: _mse,
}


@dataclass
class RecordedLosses:
    """The calls of a known loss function during one forward."""

    calls: list[tuple[Callable[..., Tensor], Tensor, Tensor, Tensor | None]] = field(default_factory=list)

    def logits_and_curvatures(self, rows: int) -> list[tuple[Tensor, Tensor]]:
        """(predictions with their graph, curvature [B, 1]) of each recorded call.

        Raises:
            UserError: no known loss function was called, or one has other than one prediction per row.
        """
        if not self.calls:
            known = ", ".join(f.__name__ for f in _CURVATURE)
            raise UserError(
                f"criterion 'ggn' found no logits: the loss calls none of {known}; use one of them or criterion='snip'"
            )
        found = []
        for function, prediction, target, weight in self.calls:
            if prediction.numel() != rows:
                raise UserError(
                    f"criterion 'ggn' needs one prediction per row, "
                    f"{function.__name__} got {tuple(prediction.shape)} for {rows} rows"
                )
            curvature = _CURVATURE[function](prediction.detach(), target)
            if weight is not None:
                curvature = curvature * weight.expand_as(prediction)
            found.append((prediction, curvature.reshape(rows, 1)))
        return found


class record_losses(TorchFunctionMode):
    """While entered, keeps the prediction and target of every known loss function; calls go through unchanged."""

    def __enter__(self) -> RecordedLosses:
        super().__enter__()
        self.recorded = RecordedLosses()
        return self.recorded

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _CURVATURE:
            named = dict(zip(("input", "target", "weight"), args, strict=False)) | kwargs
            if named.get("pos_weight") is not None:
                raise UserError(
                    "criterion 'ggn' does not take pos_weight; weigh samples with weight= or use criterion='snip'"
                )
            self.recorded.calls.append((func, named["input"], named["target"], named.get("weight")))
        return func(*args, **kwargs)
