"""Exact metrics over all rows of a split and all ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.functional.classification import binary_auroc

from sseds_rec.data.loader import Batch
from sseds_rec.distributed.runtime import Runtime
from sseds_rec.distributed.tables import kernels_uncounted
from sseds_rec.errors import UserError


@dataclass(frozen=True)
class Metrics:
    """auc and logloss (nats per row) over `samples` rows; no average of batch values."""

    auc: float
    logloss: float
    samples: int

    def as_dict(self) -> dict[str, float | int]:
        return asdict(self)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], runtime: Runtime) -> Metrics:
    """Predicts every row and computes AUC and logloss over all ranks' rows.

    Args:
        model: Batch -> (loss, (loss, logits [B], labels [B])).
        batches: the same number of them on every rank.
        runtime: of this process.

    Raises:
        UserError: the split holds one class only, so that AUC is undefined, or a prediction is not finite.
    """
    was_training = model.training
    model.eval()
    try:
        with kernels_uncounted(model):
            outputs = [model(batch.to(runtime.device, non_blocking=True))[1][1:] for batch in batches]
    finally:
        model.train(was_training)
    logits = runtime.gather_rows(torch.cat([logits for logits, _ in outputs])).cpu().double()
    labels = runtime.gather_rows(torch.cat([labels for _, labels in outputs])).cpu()
    if not bool(torch.isfinite(logits).all()):
        raise UserError("the model predicts NaN or infinity; lower train.learning_rate and train again")
    if labels.min() == labels.max():
        raise UserError(
            f"all {len(labels)} labels of the split are {int(labels[0])}: AUC is undefined; split the data again"
        )
    auc = binary_auroc(logits.sigmoid(), labels.long(), thresholds=None, validate_args=False)
    logloss = F.binary_cross_entropy_with_logits(logits, labels.double())
    return Metrics(float(auc), float(logloss), len(labels))
