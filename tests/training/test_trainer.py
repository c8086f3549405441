"""Pieces of training that the end-to-end tests cannot see."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor

from sseds_rec.data.batch import Batch
from sseds_rec.distributed.runtime import Runtime
from sseds_rec.errors import UserError
from sseds_rec.training.metrics import evaluate
from sseds_rec.training.trainer import average_batch_norm
from tests.ranks import run_ranks


class _Echo(nn.Module):
    """Predicts the dense input."""

    def forward(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        logits = batch.dense[:, 0]
        return logits.mean(), (logits.mean(), logits, batch.labels)


def _batch(logits: Tensor, labels: Tensor) -> Batch:
    return Batch(dense=logits[:, None], sparse=KeyedJaggedTensor.empty(), labels=labels)


def _rows() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    logits = (torch.randn(501, generator=random) * 4).round() / 2  # many ties
    return logits, (torch.rand(501, generator=random) < logits.sigmoid()).float()


def _evaluate_on_rank(rank: int, world_size: int) -> dict[str, float]:
    logits, labels = _rows()
    bounds = np.linspace(0, 501, world_size + 1).astype(int)
    mine = slice(int(bounds[rank]), int(bounds[rank + 1]))
    halves = zip(logits[mine].tensor_split(3), labels[mine].tensor_split(3), strict=True)
    return evaluate(
        _Echo(), [_batch(*half) for half in halves], Runtime(rank, world_size, torch.device("cpu"))
    ).as_dict()


@pytest.mark.parametrize("world_size", [1, 2])
def test_metrics_are_exact_over_all_rows_of_all_ranks(world_size: int) -> None:
    logits, labels = _rows()
    p = logits.double().sigmoid().numpy()
    for metrics in run_ranks(world_size, _evaluate_on_rank):
        assert metrics["samples"] == 501
        assert metrics["auc"] == pytest.approx(roc_auc_score(labels, p), abs=1e-6)
        assert metrics["logloss"] == pytest.approx(log_loss(labels, p), abs=1e-9)


def test_undefined_metrics_are_refused() -> None:
    one = Runtime(0, 1, torch.device("cpu"))
    with pytest.raises(UserError, match="all 4 labels of the split are 1: AUC is undefined"):
        evaluate(_Echo(), [_batch(torch.zeros(4), torch.ones(4))], one)
    with pytest.raises(UserError, match="predicts NaN"):
        evaluate(_Echo(), [_batch(torch.tensor([0.0, float("nan")]), torch.tensor([0.0, 1.0]))], one)


def _batch_norm_on_rank(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[1].running_mean.fill_(1.0 + rank)
    model[1].running_var.fill_(4.0 * (1 + rank))
    average_batch_norm(model, Runtime(rank, world_size, torch.device("cpu")))
    return model[1].running_mean, model[1].running_var


def test_running_statistics_are_averaged_over_ranks() -> None:
    for mean, var in run_ranks(2, _batch_norm_on_rank):
        assert mean.tolist() == [1.5, 1.5] and var.tolist() == [6.0, 6.0]
