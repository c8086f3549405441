"""Curvature targets of every known loss against the dense Gauss-Newton matrix, row by row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sseds_rec as sr
from sseds_rec.search.losses import MAX_TARGETS, RecordedLosses, record_losses

ROWS, COLUMNS = 6, 4
_random = torch.Generator().manual_seed(0)


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_random, dtype=torch.float64)


MAP, EMBEDDINGS = _draw(COLUMNS, 3), _draw(ROWS, COLUMNS)
LABELS, IMPORTANCE, COUNTS = (_draw(ROWS) > 0).double(), _draw(ROWS).abs(), _draw(ROWS).abs().round()
MANY = (_draw(ROWS, 3) > 0).double()
CLASSES, CLASS_WEIGHTS = torch.tensor([0, 2, 1, 1, 0, 2]), torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
SOFT = F.softmax(_draw(ROWS, 3), dim=1)

bce, ce = F.binary_cross_entropy_with_logits, F.cross_entropy

#: What a model computes of its predictions z [B], and where it matters the same with a curvature that is the expected one.
OF_ONE: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor] | None]] = {
    "bce": (lambda z: bce(z, LABELS), None),
    "bce of [B, 1]": (lambda z: bce(z[:, None], LABELS[:, None]), None),
    "bce with sample weights": (lambda z: bce(z, LABELS, weight=IMPORTANCE), None),
    "bce with pos_weight": (lambda z: nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0))(z, LABELS), None),
    "bce summed": (lambda z: bce(z, LABELS, reduction="sum") / ROWS, None),
    "bce reduced by the model": (lambda z: (bce(z, LABELS, reduction="none") * IMPORTANCE).mean(), None),
    "bce of probabilities": (lambda z: F.binary_cross_entropy(torch.sigmoid(z), LABELS), lambda z: bce(z, LABELS)),
    "weighted bce of probabilities": (
        lambda z: nn.BCELoss(weight=IMPORTANCE)(torch.sigmoid(z), LABELS),
        lambda z: bce(z, LABELS, weight=IMPORTANCE),
    ),
    "mse": (lambda z: F.mse_loss(z, LABELS), None),
    "huber": (lambda z: F.huber_loss(z, LABELS, delta=0.6), None),
    "smooth l1": (lambda z: F.smooth_l1_loss(z, LABELS, beta=0.6), None),
    "poisson": (lambda z: F.poisson_nll_loss(z, COUNTS), None),
    "soft margin": (lambda z: F.soft_margin_loss(z, 2 * LABELS - 1), None),
    "two losses": (lambda z: bce(z, LABELS) + 0.2 * F.mse_loss(z, COUNTS), None),
    "shown only": (lambda z: bce(z, LABELS) + 0 * F.mse_loss(z, COUNTS), None),
}
OF_THREE: dict[str, Callable[[Tensor], Tensor]] = {
    "bce of three labels": lambda z: bce(z, MANY),
    "bce of three labels, weighted": lambda z: bce(z, MANY, pos_weight=CLASS_WEIGHTS),
    "mse of three": lambda z: F.mse_loss(z, MANY),
    "cross entropy": lambda z: ce(z, CLASSES),
    "cross entropy with class weights": lambda z: ce(z, CLASSES, weight=CLASS_WEIGHTS),
    "cross entropy that ignores a class": lambda z: ce(z, CLASSES, ignore_index=2),
    "cross entropy with smoothed labels": lambda z: ce(z, CLASSES, weight=CLASS_WEIGHTS, label_smoothing=0.2),
    "cross entropy of soft labels": lambda z: ce(z, SOFT),
    "cross entropy reduced by the model": lambda z: (ce(z, CLASSES, reduction="none") * IMPORTANCE).mean(),
    "nll": lambda z: F.nll_loss(F.log_softmax(z, dim=1), CLASSES),
    "nll with class weights": lambda z: nn.NLLLoss(weight=CLASS_WEIGHTS)(F.log_softmax(z, dim=1), CLASSES),
    "two tasks": lambda z: bce(z[:, 0], LABELS) + 0.3 * ce(z[:, 1:], CLASSES % 2),
}


def _predict(alpha: Tensor, outputs: int) -> Tensor:
    """z [B, outputs] of embeddings whose columns are multiplied by α [B, D]; squashed, so that ∂²z/∂α² is not zero."""
    return 2 * torch.tanh((EMBEDDINGS * alpha) @ MAP[:, :outputs])


def _found(loss_of: Callable[[Tensor], Tensor], outputs: int) -> Tensor:
    """Σ over targets of h_b (∂z_b/∂α_b)² [B, D]."""
    alpha = torch.ones(ROWS, COLUMNS, dtype=torch.float64, requires_grad=True)
    with record_losses() as recorded:
        z = _predict(alpha, outputs)
        loss = loss_of(z[:, 0] if outputs == 1 else z)
    total = torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    for target in recorded.targets(ROWS, loss):
        assert target.curvature.shape == (ROWS, 1) and target.curvature.dtype == torch.float64
        (slope,) = torch.autograd.grad(target.logit, alpha, retain_graph=True)
        total += target.curvature * slope**2
    return total


def _dense(loss_of: Callable[[Tensor], Tensor], outputs: int) -> Tensor:
    """Diagonal of Jᵀ H J of each row times the rows, with the whole Hessian H of the loss in z."""
    ones = torch.ones(ROWS, COLUMNS, dtype=torch.float64)
    z = _predict(ones, outputs)
    hessian = torch.autograd.functional.hessian(lambda z: loss_of(z[:, 0] if outputs == 1 else z), z)
    jacobian = torch.func.jacrev(lambda alpha: _predict(alpha, outputs))(ones)
    rows = [(jacobian[b, :, b] * (hessian[b, :, b] @ jacobian[b, :, b])).sum(dim=0) for b in range(ROWS)]
    return ROWS * torch.stack(rows)


@pytest.mark.parametrize("name", OF_ONE)
def test_losses_of_one_prediction_a_row(name: str) -> None:
    loss_of, expected = OF_ONE[name]
    torch.testing.assert_close(_found(loss_of, 1), _dense(expected or loss_of, 1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", OF_THREE)
def test_losses_of_three_predictions_a_row(name: str) -> None:
    torch.testing.assert_close(_found(OF_THREE[name], 3), _dense(OF_THREE[name], 3), rtol=1e-9, atol=1e-12)


def test_poisson_of_rates() -> None:
    """Of a rate r the second derivative is the label / r²."""
    rates = torch.full((ROWS,), 2.0, dtype=torch.float64, requires_grad=True)
    with record_losses() as recorded:
        loss = F.poisson_nll_loss(rates, COUNTS, log_input=False, eps=0)
    (target,) = recorded.targets(ROWS, loss)
    torch.testing.assert_close(target.curvature[:, 0], COUNTS / 4)


def test_predictions_in_less_precision_have_exact_curvatures() -> None:
    z = torch.linspace(-9, 9, ROWS).bfloat16().requires_grad_()
    with record_losses() as recorded:
        loss = bce(z, LABELS.bfloat16())
    (target,) = recorded.targets(ROWS, loss)
    p = torch.sigmoid(z.detach().double())
    torch.testing.assert_close(target.curvature[:, 0], p * (1 - p), rtol=1e-2, atol=0)


def _recorded(compute: Callable[[Tensor], Tensor], *shape: int) -> tuple[RecordedLosses, Tensor]:
    z = torch.zeros(*shape, requires_grad=True)
    with record_losses() as recorded:
        return recorded, compute(z)


def test_what_has_no_known_curvature_is_refused_with_what_to_use() -> None:
    recorded, loss = _recorded(lambda z: F.l1_loss(z, torch.ones(ROWS)), ROWS)
    with pytest.raises(
        sr.UserError, match="found no logits: .*cross_entropy, nll_loss \\(it calls l1_loss\\); use .*fisher"
    ):
        recorded.targets(ROWS, loss)
    recorded, loss = _recorded(lambda z: (z - F.mse_loss(z.detach(), z.detach())).sum(), ROWS)
    with pytest.raises(sr.UserError, match="found no logits"):
        recorded.targets(ROWS, loss)
    recorded, loss = _recorded(lambda z: bce(z, torch.ones(4)), 4)
    with pytest.raises(sr.UserError, match="got predictions \\(4,\\) for 6 rows: not so many for each"):
        recorded.targets(ROWS, loss)
    recorded, loss = _recorded(lambda z: F.mse_loss(z, torch.ones_like(z)), ROWS, MAX_TARGETS + 1)
    with pytest.raises(sr.UserError, match="mse_loss got 65 predictions a row, .* 64 are the most"):
        recorded.targets(ROWS, loss)
    recorded, loss = _recorded(lambda z: ce(z, torch.zeros(ROWS, 2).long()), ROWS, 3, 2)
    with pytest.raises(sr.UserError, match="its curvature needs scores \\[B, C\\]"):
        recorded.targets(ROWS, loss)
