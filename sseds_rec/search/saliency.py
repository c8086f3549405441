"""Scores of embedding columns from forward-backward passes over a few batches (Section 3.2.2 of the paper)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sseds_rec.distributed.tables import embedding_modules
from sseds_rec.errors import UserError
from sseds_rec.search.criteria import CRITERIA, Criterion
from sseds_rec.search.losses import record_losses
from sseds_rec.search.scores import DimensionScores
from sseds_rec.search.tap import Tap, plan_tables, qualified_tables, tapped

LossFn = Callable[[nn.Module, Any], Tensor]


def score_dimensions(
    model: nn.Module,
    batches: Iterable[Any],
    criterion: str = "snip",
    num_batches: int | None = None,
    loss_fn: LossFn | None = None,
) -> DimensionScores:
    """Scores every column of every embedding table; the model, its optimizers and its gradients stay as they are.

    Works on a plain model and on one wrapped in `DistributedModelParallel`, unmodified. On several ranks every rank calls
    it with its own batches, the same number of them on each; batch sizes may differ. All ranks get the same scores, those
    that one rank would get on all the rows; one all-reduce of Σd + 2 float64 is the only communication besides the
    model's own forward.

    Example::

        scores = sr.score_dimensions(dmp, validation_batches, criterion="ggn", num_batches=32)

    Args:
        model: what the training step calls. `model(batch)` returns the loss, a mean over the local batch, or a tuple that
            begins with it, as TorchRec's `DLRMTrain` does.
        batches: what the training step is fed.
        criterion: "snip" (the paper) or "ggn".
        num_batches: how many batches to use; None for all.
        loss_fn: `loss_fn(model, batch) -> loss`, where `model(batch)` does not return one.

    Returns:
        Table name -> float64 scores [D], summing to 1 over all tables (Eq. 11). With several embedding modules the name
        is prefixed with the module's path.

    Raises:
        UserError: unknown criterion, no batch, no searchable embedding module, a loss that is not finite, or a model whose
            logits the criterion needs and cannot find.
    """
    if criterion not in CRITERIA:
        raise UserError(f"unknown criterion {criterion!r}; choose one of {', '.join(CRITERIA)}")
    measure = CRITERIA[criterion]()
    modules = embedding_modules(model)
    names = qualified_tables(modules)
    tables = plan_tables(modules)
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    sums = {name: torch.zeros(tables[name].dim, dtype=torch.float64, device=device) for name in names.values()}
    # Beside the sums: the number of rows, and the loss, so that ranks with a bad batch or none fail together.
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    used = 0
    with tapped(model) as taps:
        for used, batch in enumerate(islice(batches, num_batches), start=1):  # noqa: B007
            batch = batch.to(device) if hasattr(batch, "to") else batch
            loss, statistics = _batch_statistics(model, batch, taps, measure, loss_fn)
            for (path, table), statistic in statistics:
                sums[names[path, table]] += statistic
            totals += torch.stack([torch.full_like(loss, _rows(taps)), loss])
    packed = _sum_over_ranks(torch.cat([*sums.values(), totals]))
    total, total_loss = packed[-2:].tolist()
    if total == 0:
        raise UserError("no batch to score with; give at least one")
    if not math.isfinite(total_loss):
        raise UserError(
            f"the loss of a scoring batch is {total_loss}; the model's weights or the batch hold NaN or infinity"
        )
    means = dict(zip(sums, torch.split(packed[:-2] / total, [len(s) for s in sums.values()]), strict=True))
    search = {"method": "sseds", "criterion": criterion, "batches": used, "samples": int(total)}
    return DimensionScores({name: measure.score(mean) for name, mean in means.items()}, tables, search)


def _batch_statistics(
    model: nn.Module, batch: Any, taps: list[Tap], criterion: Criterion, loss_fn: LossFn | None
) -> tuple[Tensor, Iterator[tuple[tuple[str, str], Tensor]]]:
    """The batch's loss, and ((module path, table), the criterion's statistic [D]) for each differentiated output."""
    for tap in taps:
        tap.outputs.clear()
    with torch.enable_grad(), record_losses() as recorded:
        result = loss_fn(model, batch) if loss_fn else model(batch)
    loss = result if isinstance(result, Tensor) else result[0]
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise UserError(
            "the model must return its mean loss (a scalar), or a tuple that begins with it; give loss_fn otherwise"
        )
    rows = _rows(taps)
    # The loss is a mean over this rank's rows: times rows it is a sum, so that ranks and batches weigh by their rows.
    of_loss = criterion.of == "loss"
    targets = [(loss * rows, None)] if of_loss else [(z.sum(), h) for z, h in recorded.logits_and_curvatures(rows)]
    return loss.detach().double().reshape(()), _statistics(targets, taps, criterion)


def _statistics(
    targets: list[tuple[Tensor, None]] | list[tuple[Tensor, Tensor]], taps: list[Tap], criterion: Criterion
) -> Iterator[tuple[tuple[str, str], Tensor]]:
    """The criterion's statistics from the gradients of each target in every tapped output."""
    leaves = [leaf for tap in taps for leaf, _ in tap.outputs]
    for target, curvature in targets:
        found = iter(torch.autograd.grad(target, leaves, retain_graph=True, allow_unused=True, materialize_grads=True))
        for tap in taps:
            gradients = list(islice(found, len(tap.outputs)))
            for table, contribution in (tap.contributions(gradients) if gradients else {}).items():
                yield (tap.path, table), criterion.statistic(contribution, curvature)


def _rows(taps: list[Tap]) -> int:
    """B of the batch just seen."""
    sizes = {leaf.shape[0] for tap in taps for leaf, _ in tap.outputs}
    if len(sizes) != 1:
        raise UserError(
            f"the embedding modules saw batches of different sizes ({sorted(sizes)}); they cannot be scored together"
        )
    return sizes.pop()


def _sum_over_ranks(values: Tensor) -> Tensor:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values
