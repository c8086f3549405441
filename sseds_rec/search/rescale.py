"""How far unseen rows would have each table's embeddings: a model that learned a table by heart is better with less of it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from sseds_rec.errors import UserError
from sseds_rec.search.losses import record_losses
from sseds_rec.search.rotation import Rotation
from sseds_rec.search.samples import Sample
from sseds_rec.search.scores import DimensionScores
from sseds_rec.search.steps import LossFn, batches_of, check_graph, device_of, mean_loss, sum_over_ranks
from sseds_rec.search.tap import Taps, tapped

#: Standard deviation that a scale is expected to have about 1, before anything is seen: few rows change it little.
_PRIOR = 0.5
#: No table is turned round, and none is more than doubled.
_MOST = 2.0
#: Newton steps at most, each of which takes the batches once more.
_STEPS = 8


def rescale(
    model: nn.Module,
    batches: Iterable[Any],
    scores: DimensionScores,
    num_batches: int | None = None,
    loss_fn: LossFn | None = None,
) -> DimensionScores:
    """Scales every rotated table about its mean as held-out rows would have it, and its scores with it.

    Gives every table an indicator α, e -> mass·μ + α (e - mass·μ), and sets it where the loss of these rows is lowest. To
    second order about α = 1 that is one Newton step for all tables together: with u_bi = (e_bi - mass·μ_i)·∂z_b/∂e_bi, the
    derivative of row b's logit in α_i,

        α = 1 - (Σ_b h_b u_b u_bᵀ + I/σ²)⁻¹ Σ_b ∂ℓ_b/∂α,

    with h = ∂²ℓ/∂z² and a normal prior of σ = ½ about 1. Where the model has overfitted a table, as one of ids with few
    rows each, α is below 1: unseen rows are better off with less of it. What its coordinates are worth to them shrinks by α²,
    and so do their scores; plans made of the scores carry the scale in their rotations, and slimming scales the tables.

    If the step changes a scale by more than 1, the model is so sure of itself on these rows that its loss is no parabola:
    then only ½ is gone in that direction, and the next step is worked out there, on the batches once more (of an iterator,
    on those that follow).

    Nothing is trained or changed. Besides what the model's own forward sends there is one all-reduce of F² + F + 1 numbers a
    step for F rotated tables, and one number a batch that says whether all ranks have one. If a rank cannot go on, all end.

    Example::

        scores = sr.score_dimensions(model, validation_batches, "ggn_rotated", num_batches=4)
        scores = sr.rescale(model, validation_batches, scores)  # rows that the model was not trained on

    Args:
        model: as `score_dimensions` had it.
        batches: rows that the model was not trained on; on several ranks each has its own.
        scores: in rotated bases; tables that are not rotated stay as they are.
        num_batches: how many to use; None for all.
        loss_fn: see `score_dimensions`.

    Returns:
        New scores, which sum to 1; `search["scales"]` names the scales of the tables.

    Raises:
        UserError: no table is rotated, the scores are of another model, no batch is given, the loss is not finite, or it has no
            logits that can be found.
    """
    if not (num_batches is None or num_batches > 0):
        raise UserError(f"num_batches={num_batches}: it is a number from 1 on, or None for all")
    if not scores.rotations:
        raise UserError(
            "no table is scored in a rotated basis, and only those have a scale; use criterion='ggn_rotated'"
        )
    device = device_of(model)
    names = list(scores.rotations)
    means = {name: rotation.mean.to(device) for name, rotation in scores.rotations.items()}
    alpha = torch.ones(len(names), dtype=torch.float64)
    prior = torch.eye(len(names), dtype=torch.float64) / _PRIOR**2
    with tapped(model) as taps:
        _check_tables(scores, taps)
        stream = iter(batches)
        for taken in range(_STEPS):
            sums = _sums(model, islice(stream, num_batches), taps, means, loss_fn)
            if sums is None:
                if not taken:
                    raise UserError("no batch to rescale with; give at least one")
                break  # the iterator is at its end
            slope, *curvature = sums.cpu()
            step = -torch.linalg.solve(torch.stack(curvature) + prior, slope + prior @ (alpha - 1))
            longest = float(step.abs().max())
            alpha = (alpha + (step if longest <= 1 else step * 0.5 / longest)).clamp(0, _MOST)
            if longest <= 1:
                break
            taps.edits |= {n: partial(_about_mean, means[n], a) for n, a in zip(names, alpha.tolist(), strict=True)}
            stream = stream if stream is batches else iter(batches)
    return _scaled(scores, dict(zip(names, alpha.tolist(), strict=True)))


def _check_tables(scores: DimensionScores, taps: Taps) -> None:
    for name, rotation in scores.rotations.items():
        if name not in taps.tables or taps.tables[name].dim != len(rotation.mean):
            raise UserError(f"table {name}: the model has none of this name and width; the scores are of another model")


def _about_mean(mean: Tensor, scale: float, output: Tensor, mass: Tensor | None) -> Tensor:
    """mass·μ + α (e - mass·μ) [B, D]."""
    assert mass is not None, "only bags are rotated"
    centre = mass[:, None] * mean
    return (centre + scale * (output.double() - centre)).to(output.dtype)


def _sums(
    model: nn.Module, batches: Iterable[Any], taps: Taps, means: dict[str, Tensor], loss_fn: LossFn | None
) -> Tensor | None:
    """`_slope_and_curvature` of the rows of all batches and ranks [F + 1, F]; None without a batch."""
    device = next(iter(means.values())).device
    total = torch.zeros(len(means) + 1, len(means), dtype=torch.float64, device=device)
    seen, failures = 0, list[Exception]()
    for batch in batches_of(batches, device, lambda: bool(failures)):
        try:
            total += _slope_and_curvature(model, batch, taps, means, loss_fn)
        except Exception as error:
            failures.append(error)  # the other ranks are told by the next look for a batch, and wait for the sums
        seen += 1
    sums = sum_over_ranks(torch.cat([total.flatten(), total.new_tensor([len(failures)])]))
    if failures:
        raise failures[0]
    if sums[-1]:
        raise UserError("another rank could not rescale with its batch; it says why")
    if not bool(sums.isfinite().all()):
        raise UserError(
            "the loss of a batch to rescale with is not finite; the model's weights or the batch hold NaN or infinity"
        )
    return sums[:-1].reshape(total.shape) if seen else None


def _slope_and_curvature(
    model: nn.Module, batch: Any, taps: Taps, means: dict[str, Tensor], loss_fn: LossFn | None
) -> Tensor:
    """Σ_b ∂ℓ_b/∂α [F] above Σ_b h_b u_b u_bᵀ [F, F] of this rank's rows."""

    def forward() -> tuple[Tensor, Any]:
        with torch.enable_grad(), record_losses() as recorded:
            return mean_loss(model, batch, loss_fn), recorded

    loss, recorded = taps.run(forward)
    check_graph(loss)
    rows, leaves = taps.rows(), taps.leaves()
    targets = recorded.targets(rows, loss)
    gradients = torch.autograd.grad(loss * rows, leaves, retain_graph=bool(targets), allow_unused=True)
    parts = [_derivatives(taps, gradients, means).sum(dim=0, keepdim=True)]
    curvature = parts[0].new_zeros(len(means), len(means))
    for index, target in enumerate(targets, start=1):
        gradients = torch.autograd.grad(target.logit, leaves, retain_graph=index < len(targets), allow_unused=True)
        derivatives = _derivatives(taps, gradients, means)
        curvature += (target.curvature * derivatives).T @ derivatives
    return torch.cat([*parts, curvature])


def _derivatives(taps: Taps, gradients: Any, means: dict[str, Tensor]) -> Tensor:
    """∂f_b/∂α_i of every row and rotated table: [B, F], float64; zeros of tables that this forward did not look up."""
    device = next(iter(means.values())).device
    found = dict.fromkeys(means, torch.zeros(taps.rows(), dtype=torch.float64, device=device))
    found |= {name: _derivative(sample, means[name]) for name, sample in taps.samples(gradients) if name in means}
    return torch.stack(list(found.values()), dim=1)


def _derivative(sample: Sample, mean: Tensor) -> Tensor:
    parts = [
        ((one.output.double() - one.mass()[:, None] * mean) * one.slope().double()).sum(dim=1) for one in sample.lookups
    ]
    return torch.stack(parts).sum(dim=0)


def _scaled(scores: DimensionScores, scales: dict[str, float]) -> DimensionScores:
    """The same scores of tables that are scaled: a coordinate's is in proportion to its variance."""
    assert scores.draws is not None, "rotated scores come from batches"
    draws = copy.copy(scores.draws)
    draws.rotations = {
        name: Rotation(rotation.forward * scales[name], rotation.inverse, rotation.mean)
        for name, rotation in scores.rotations.items()
    }
    return DimensionScores(draws.raw(), scores.tables, {**scores.search, "scales": scales}, draws)
