"""Scores of embedding columns from forward-backward passes over a few batches (Section 3.2.2 of the paper)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sseds_rec.constants import STABLE
from sseds_rec.errors import UserError
from sseds_rec.search.allocate import allocate
from sseds_rec.search.budget import Budget
from sseds_rec.search.criteria import Criterion, criterion_named
from sseds_rec.search.draws import Draws
from sseds_rec.search.losses import RecordedLosses, record_losses
from sseds_rec.search.masks import keep_only
from sseds_rec.search.moments import Batch, Moments
from sseds_rec.search.plan import DimensionPlan
from sseds_rec.search.scores import DimensionScores
from sseds_rec.search.stability import expected_overlap
from sseds_rec.search.steps import LossFn, batches_of, check_graph, device_of, mean_loss
from sseds_rec.search.tap import Taps, tapped

TENTH = Budget(parameters=0.1)

#: num_batches="auto": scoring goes on until the plan is `STABLE`, which is looked at after so many batches and each doubling,
#: up to the second number.
AUTO_BATCHES = (8, 1024)


def score_dimensions(
    model: nn.Module,
    batches: Iterable[Any],
    criterion: str | Criterion = "snip",
    num_batches: int | Literal["auto"] | None = None,
    loss_fn: LossFn | None = None,
    *,
    rounds: int = 1,
    budget: Budget = TENTH,
    allocation: Callable[[DimensionScores, Budget], DimensionPlan] = allocate,
) -> DimensionScores:
    """Scores every column of every embedding table; the model, its optimizers and its gradients stay as they are.

    Works on a plain model and on one wrapped in `DistributedModelParallel`, unmodified, between two steps of a
    `TrainPipelineSparseDist` too. On several ranks every rank calls it with its own batches, whose sizes may differ; it ends
    when a rank has no more. All ranks get the same scores, those that one rank would get on all the rows; the
    only communication besides the model's own forward is one all-reduce a batch, of Σd float64 (2 Σd² + Σd, and the basis from
    rank 0, of "ggn_rotated"), and one number that says whether all ranks have a batch. If a rank cannot score, all end.

    Example::

        scores = sr.score_dimensions(dmp, validation_batches, criterion="ggn", num_batches=32)

    Args:
        model: what the training step calls. `model(batch)` returns the loss, a mean over the local batch, or a tuple that
            begins with it, as TorchRec's `DLRMTrain` does.
        batches: what the training step is fed.
        criterion: one of `sseds_rec.search.criteria`: "snip" is the paper's.
        num_batches: how many batches to use, in each round; None for all; "auto" for as many as it takes until plans
            from two draws of as many batches would have 90 % of their columns in common, 1,024 at most.
        loss_fn: `loss_fn(model, batch) -> loss`, where `model(batch)` does not return one, or returns several.
        rounds: above 1 the model is scored anew as often, each time with the columns set to zero (of "ggn_rotated", to
            their mean) that a plan from the scores before would drop. Plans go from everything to the budget in equal
            ratios, and what one dropped may return in the next (de Jorge et al., Progressive Skeletonization, ICLR 2021).
        budget, allocation: what will be made of the scores, for "auto" and for rounds: `functools.partial(sr.allocate,
            multiple=8)`, say.

    Returns:
        Table name -> float64 scores [D], summing to 1 over all tables (Eq. 11). With several embedding modules the name
        is prefixed with the module's path.

    Raises:
        UserError: unknown criterion, no batch, no searchable embedding module, a loss that is not finite, or a model whose
            logits the criterion needs and cannot find.
    """
    measure = criterion_named(criterion)
    if rounds < 1 or not (num_batches in (None, "auto") or (isinstance(num_batches, int) and num_batches > 0)):
        raise UserError(
            f"num_batches={num_batches!r}, rounds={rounds}: rounds is a number from 1 on, num_batches too, or 'auto' or None"
        )
    device = device_of(model)
    stream = iter(batches)

    def plan(drawn: DimensionScores) -> DimensionPlan:
        return allocation(drawn, budget.without_planner(list(drawn.tables.values())))

    with tapped(model) as taps:
        for current in range(1, rounds + 1):
            moments = Moments(measure.moments, {name: table.dim for name, table in taps.tables.items()}, device)

            def enough(moments: Moments = moments) -> bool:
                if num_batches != "auto" or not _due(moments.batches):
                    return False
                overlap = expected_overlap(_scores(measure, moments, taps, rounds), plan)
                return moments.batches >= AUTO_BATCHES[1] or overlap >= STABLE

            most = num_batches if isinstance(num_batches, int) else None
            for batch in batches_of(islice(stream, most), device, enough):
                _add(moments, partial(_measure, model, batch, taps, measure, moments, loss_fn))
            scores = _scores(measure, moments, taps, rounds)
            if current < rounds:
                _mask(taps, allocation(scores, budget.at(current / rounds, list(scores.tables.values()))))
                stream = stream if stream is batches else iter(batches)
    return scores


def _due(batches: int) -> bool:
    first, _ = AUTO_BATCHES
    return batches > 0 and batches % first == 0 and (batches // first) & (batches // first - 1) == 0


def _add(moments: Moments, measure: Callable[[], Batch]) -> None:
    """Adds a batch of all ranks; if one rank's cannot be scored, all end together."""
    failure: Exception | None = None
    try:
        batch = measure()
    except Exception as error:
        failure, batch = error, moments.begin_batch()
        batch.fail()
    moments.add(batch)
    if failure:
        raise failure
    if moments.failed:
        raise UserError("another rank could not score its batch; it says why")


def _measure(
    model: nn.Module, batch: Any, taps: Taps, criterion: Criterion, moments: Moments, loss_fn: LossFn | None
) -> Batch:
    """What one batch adds to the moments."""
    wanted = {moment.of for moment in criterion.moments}

    def forward() -> tuple[Tensor, RecordedLosses]:
        with torch.set_grad_enabled(wanted != {"output"}), record_losses() as recorded:
            return mean_loss(model, batch, loss_fn), recorded

    loss, recorded = taps.run(forward)
    rows = taps.rows()
    if wanted != {"output"}:
        check_graph(loss)
    found = moments.begin_batch()
    found.count(rows, loss)
    if "output" in wanted:
        for table, sample in taps.samples(None):
            found.see("output", table, sample)
    leaves = taps.leaves()
    if "loss" in wanted:
        # The loss is a mean over this rank's rows: times rows it is a sum, so that ranks and batches weigh by their rows.
        gradients = torch.autograd.grad(loss * rows, leaves, retain_graph="logit" in wanted, allow_unused=True)
        for table, sample in taps.samples(gradients):
            found.see("loss", table, sample)
    if "logit" in wanted:
        targets = recorded.targets(rows, loss)
        for index, target in enumerate(targets, start=1):
            gradients = torch.autograd.grad(target.logit, leaves, retain_graph=index < len(targets), allow_unused=True)
            for table, sample in taps.samples(gradients):
                found.see("logit", table, sample, target.curvature)
    return found


def _scores(criterion: Criterion, moments: Moments, taps: Taps, rounds: int) -> DimensionScores:
    if not moments.batches:
        raise UserError("no batch to score with; give at least one" + (" for every round" if rounds > 1 else ""))
    if not math.isfinite(moments.loss):
        raise UserError(
            f"the loss of a scoring batch is {moments.loss}; the model's weights or the batch hold NaN or infinity"
        )
    search = {
        "method": "sseds",
        "criterion": criterion.name,
        "batches": moments.batches,
        "samples": int(moments.rows),
    } | ({"rounds": rounds} if rounds > 1 else {})
    draws = Draws(criterion, moments)
    return DimensionScores(draws.raw(), taps.tables, search, draws)


def _mask(taps: Taps, plan: DimensionPlan) -> None:
    """Shows the model, from now on, only what the plan keeps."""
    taps.edits.clear()
    taps.edits |= {name: keep_only(plan, name) for name in plan.tables}
