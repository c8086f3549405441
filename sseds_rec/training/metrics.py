"""Exact metrics over all rows of a split and all ranks, and how fast they were predicted."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from sseds_rec.data.batch import Batch
from sseds_rec.distributed.runtime import Runtime
from sseds_rec.distributed.tables import kernels_uncounted
from sseds_rec.errors import UserError

#: Group of the rows that have no id: raw ids only, the files of prepared sets have an id for empty cells.
_NO_ID = -(2**63)


@dataclass(frozen=True)
class Metrics:
    """Quality over all rows, no average of batch values, and speed.

    Attributes:
        auc: probability that a positive row is predicted above a negative one; ties count half.
        logloss: nats per row.
        samples: rows.
        normalized_entropy: logloss over that of always predicting the rows' own click rate (He et al., ADKDD 2014); below 1
            is better than knowing the rate alone.
        calibration: mean prediction over mean label; above 1 predicts too many clicks.
        samples_per_second: rows of all ranks that go through the model, at the median batch's pace; loading is not counted.
        gauc: mean AUC within groups, weighted by their rows, without the groups of one class (Zhou et al., KDD 2018); None if
            no group field was asked for.
    """

    auc: float
    logloss: float
    samples: int
    normalized_entropy: float
    calibration: float
    samples_per_second: float
    gauc: float | None = None

    def as_dict(self) -> dict[str, float | int]:
        """All that was measured."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], runtime: Runtime, group_field: str | None = None) -> Metrics:
    """Predicts every row and computes the metrics over all ranks' rows.

    Args:
        model: Batch -> (loss, (loss, logits [B], labels [B])).
        batches: the same number of them on every rank.
        runtime: of this process.
        group_field: sparse field of at most one id a row, by which GAUC groups rows.

    Raises:
        UserError: the split (or, for GAUC, every group) holds one class only, so that AUC is undefined, or a prediction is
            not finite.
    """
    outputs: list[tuple[Tensor, Tensor]] = []
    groups: list[Tensor] = []
    passes: list[tuple[_Moment, _Moment]] = []
    was_training = model.training
    model.eval()
    try:
        with kernels_uncounted(model):
            for batch in batches:
                if group_field is not None:
                    groups.append(_only_ids(batch.sparse, group_field))
                batch = batch.to(runtime.device, non_blocking=True)
                begun = _Moment(runtime.device)
                outputs.append(model(batch)[1][1:])
                passes.append((begun, _Moment(runtime.device)))
    finally:
        model.train(was_training)
    logits, labels = (runtime.gather_rows(torch.cat(parts)).cpu().double() for parts in zip(*outputs, strict=True))
    ids = runtime.gather_rows(torch.cat(groups)).cpu() if groups else None
    paces = [len(rows) / begun.seconds_to(ended) for (rows, _), (begun, ended) in zip(outputs, passes, strict=True)]
    # The median: the first passes also build, compile and allocate what the others use.
    pace = runtime.world_size * float(runtime.mean(torch.tensor(paces, dtype=torch.float64).quantile(0.5)))

    # On one rank: each would sort all rows, with all cores.
    metrics = runtime.from_main(lambda: _measure(logits, labels, ids, pace))
    if group_field is not None and metrics.gauc is None:
        raise UserError(
            f"evaluation.group_field={group_field}: no group has labels of both classes, so GAUC is undefined; "
            "choose a field with fewer ids"
        )
    return metrics


def _measure(logits: Tensor, labels: Tensor, groups: Tensor | None, samples_per_second: float) -> Metrics:
    """The metrics of all rows: logits and labels float64 [rows], groups int64 [rows]."""
    if not bool(torch.isfinite(logits).all()):
        raise UserError("the model predicts NaN or infinity; lower train.learning_rate and train again")
    auc = grouped_auc(logits, labels, torch.zeros(len(labels), dtype=torch.int64))
    if auc is None:
        raise UserError(
            f"all {len(labels)} labels of the split are {int(labels[0])}: AUC is undefined; split the data again"
        )
    logloss = F.binary_cross_entropy_with_logits(logits, labels)
    click_rate = labels.mean()
    return Metrics(
        auc=auc,
        logloss=float(logloss),
        samples=len(labels),
        normalized_entropy=float(logloss / F.binary_cross_entropy(click_rate, click_rate)),
        calibration=float(logits.sigmoid().mean() / click_rate),
        samples_per_second=samples_per_second,
        gauc=None if groups is None else grouped_auc(logits, labels, groups),
    )


def grouped_auc(scores: Tensor, labels: Tensor, groups: Tensor) -> float | None:
    """Mean AUC within groups, weighted by their rows; groups whose labels are all the same do not count.

    By the rank sum of the positive rows (Mann and Whitney), where tied scores share their mean rank.

    Args:
        scores: float64 [rows].
        labels: [rows], 0 or 1.
        groups: int64 [rows], the group of each row.

    Returns:
        None if every group has one class only.
    """
    rows = pl.DataFrame({"group": groups.numpy(), "score": scores.numpy(), "positive": labels.numpy() > 0})
    rank, positive = pl.col("rank"), pl.col("positive")
    counted = (
        rows.with_columns(rank=pl.col("score").rank("average").over("group"))
        .group_by("group", maintain_order=True)  # the same order, the same last digit
        .agg(
            rows=pl.len().cast(pl.Float64), positives=positive.sum().cast(pl.Float64), ranks=rank.filter(positive).sum()
        )
        .filter((pl.col("positives") > 0) & (pl.col("positives") < pl.col("rows")))
    )
    weight, positives = counted["rows"], counted["positives"]
    auc = (counted["ranks"] - positives * (positives + 1) / 2) / (positives * (weight - positives))
    return float((auc * weight).sum() / weight.sum()) if len(counted) else None


def _only_ids(features: KeyedJaggedTensor, field: str) -> Tensor:
    """The id of each row of a field that has at most one, int64 [B]."""
    return features[field].to_padded_dense(1, padding_value=_NO_ID).squeeze(1)


class _Moment:
    """A moment in a device's work: on CUDA, one between two kernels, for which nobody waits until it is asked for."""

    def __init__(self, device: torch.device) -> None:
        self._time = time.perf_counter()
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self._event is not None:
            self._event.record()

    def seconds_to(self, later: _Moment) -> float:
        if self._event is None or later._event is None:
            return later._time - self._time
        later._event.synchronize()
        return float(self._event.elapsed_time(later._event)) / 1000
