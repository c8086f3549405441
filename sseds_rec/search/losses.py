"""Finds the predictions of a model that only returns a loss, and the curvature of the loss in them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sseds_rec.errors import UserError

Loss = Callable[..., Tensor]

#: Functions of each prediction alone, whose own second derivative is the curvature.
ELEMENTWISE: tuple[Loss, ...] = (
    F.binary_cross_entropy_with_logits,
    F.binary_cross_entropy,
    F.mse_loss,
    F.huber_loss,
    F.smooth_l1_loss,
    F.poisson_nll_loss,
    F.soft_margin_loss,
)

#: Functions of [B, C] scores that belong together in each row.
COUPLED: tuple[Loss, ...] = (F.cross_entropy, F.nll_loss)

#: Above this many predictions a row, each of which costs a backward pass.
MAX_TARGETS = 64


@dataclass
class Target:
    """Something to differentiate: Σ over targets of h_b (∂z_b/∂·)² is the diagonal of the generalised Gauss-Newton matrix
    of the loss, summed over rows.

    Attributes:
        logit: Σ_b z_b, a scalar with its graph.
        curvature: h_b, float64 [B, 1].
    """

    logit: Tensor
    curvature: Tensor


@dataclass
class Call:
    """A call of a known loss function."""

    function: Loss
    arguments: dict[str, Any]
    output: Tensor

    @property
    def prediction(self) -> Tensor:
        found: Tensor = self.arguments["input"]
        return found

    def replay(self, prediction: Tensor, weight: Tensor, **changed: Any) -> Tensor:
        """The same call in float64 on another prediction, as the model's loss weighs what it returns."""
        arguments = {
            name: value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in (self.arguments | changed).items()
        }
        return (self.function(**(arguments | {"input": prediction})) * weight).sum()

    def weight(self, loss: Tensor | None) -> Tensor | None:
        """∂loss/∂output, in the shape of the output; None if the loss does not depend on it."""
        output = self.output
        if loss is None:
            return torch.full_like(output, 1 / output.numel(), dtype=torch.float64)
        if not output.requires_grad:  # shown only, under no_grad
            return None
        (found,) = torch.autograd.grad(loss, [output], retain_graph=True, allow_unused=True)
        return None if found is None else found.double()


@dataclass
class RecordedLosses:
    """The calls of loss functions during one forward.

    Attributes:
        calls: of known ones.
        others: names of unknown ones.
    """

    calls: list[Call] = field(default_factory=list)
    others: set[str] = field(default_factory=set)

    @torch.enable_grad()
    def targets(self, rows: int, loss: Tensor | None = None) -> list[Target]:
        """What to differentiate for the curvature of `rows` times the loss, which is a mean over rows.

        Args:
            rows: B.
            loss: what the model returned. Each recorded call then counts as much as the loss depends on it: weights of tasks
                and samples that the model applies afterwards are in, and losses computed only to be shown are not.
                Without it the loss is the sum of all calls, the mean of those that reduce nothing.

        Raises:
            UserError: no known loss function was called on the way to the loss, or one has other than K predictions a row.
        """
        weighted = [(call, call.weight(loss)) for call in self.calls if call.prediction.requires_grad]
        counted = [(call, weight) for call, weight in weighted if weight is not None]
        if not counted:
            known = ", ".join(function.__name__ for function in (*ELEMENTWISE, *COUPLED))
            called = f" (it calls {', '.join(sorted(self.others))})" if self.others else ""
            raise UserError(
                f"found no logits: the loss calls none of {known}{called}; "
                "use criterion='fisher' or 'snip', or compute the loss with one of these functions"
            )
        found: list[Target] = []
        for call, weight in counted:
            if bool(weight.any()):  # of a batch without rows that count there may be none
                found += (_coupled if call.function in COUPLED else _elementwise)(call, weight * rows, rows)
        return found


def _elementwise(call: Call, weight: Tensor, rows: int) -> list[Target]:
    """One target per prediction of a row [B, K], curved as the loss function's second derivative says."""
    logits = _by_row(call, rows)
    point = call.prediction.detach().double()
    changed = {}
    if call.function is F.binary_cross_entropy:
        # In a probability the second derivative depends on the label; its expectation 1/(p(1-p)), with which (∂p/∂z)² gives
        # the p(1-p) of the logit, is the one at label p.
        point = point.clamp(1e-12, 1 - 1e-12)
        changed["target"] = point.clone()
    point.requires_grad_()
    slope = _gradient(call.replay(point, weight, **changed), point)
    curvature = _gradient(slope.sum(), point).detach().reshape(logits.shape)
    return [Target(logits[:, k].sum(), curvature[:, k : k + 1]) for k in range(logits.shape[1])]


def _coupled(call: Call, weight: Tensor, rows: int) -> list[Target]:
    """One target per class: J^T s(diag(p) - pp^T) J = Σ_c s p_c (∇ log p_c)², with s the row's weight in the loss.

    It is exact, since ∇ log p_c = ∇z_c - Σ_k p_k ∇z_k.
    """
    logits = _by_row(call, rows)
    classes = logits.shape[1]
    if call.prediction.dim() != 2 or classes < 2:
        raise UserError(
            f"{call.function.__name__} got {tuple(call.prediction.shape)}: its curvature needs scores [B, C]; "
            "use criterion='fisher' or 'snip'"
        )
    log_p = F.log_softmax(logits, dim=1) if call.function is F.cross_entropy else logits
    p = log_p.detach().double().exp()
    even = torch.zeros_like(p).requires_grad_()
    slope = _gradient(call.replay(even, weight), even)
    if call.function is F.nll_loss:  # there the gradient in log p is -s at the label
        s = -slope.sum(dim=1, keepdim=True)
    else:  # s p_0 (1 - p_0) is the second derivative in the first score, and p is 1/C here
        s = _gradient(slope[:, 0].sum(), even)[:, :1] * classes**2 / (classes - 1)
    return [Target(log_p[:, c].sum(), s.detach() * p[:, c : c + 1]) for c in range(classes)]


def _gradient(of: Tensor, point: Tensor) -> Tensor:
    """In a point, with its own graph."""
    if not of.requires_grad:
        return torch.zeros_like(point)
    (found,) = torch.autograd.grad(of, point, create_graph=True, allow_unused=True, materialize_grads=True)
    return found


def _by_row(call: Call, rows: int) -> Tensor:
    """Predictions [B, K] with their graph."""
    z = call.prediction
    per_row, left = divmod(z.numel(), rows)
    if left or not per_row or (per_row > 1 and z.shape[0] != rows):
        raise UserError(
            f"{call.function.__name__} got predictions {tuple(z.shape)} for {rows} rows: not so many for each; "
            "use criterion='fisher' or 'snip'"
        )
    if per_row > MAX_TARGETS:
        raise UserError(
            f"{call.function.__name__} got {per_row} predictions a row, each of which would cost a backward pass; "
            f"{MAX_TARGETS} are the most: use criterion='fisher' or 'snip'"
        )
    return z.reshape(rows, per_row)


class record_losses(TorchFunctionMode):
    """While entered, keeps the arguments and the output of every known loss function; calls go through unchanged."""

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
        output = func(*args, **kwargs)
        if func in ELEMENTWISE or func in COUPLED:
            arguments = inspect.signature(func).bind(*args, **kwargs).arguments
            self.recorded.calls.append(Call(func, arguments, output))
        elif getattr(func, "__module__", "") == F.__name__ and "loss" in func.__name__:
            self.recorded.others.add(func.__name__)
        return output
