"""Metrics over all rows of all ranks against scikit-learn and counted pairs, and the pace of inference against a known one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor

from sseds_rec.data.batch import Batch
from sseds_rec.distributed.runtime import Runtime
from sseds_rec.errors import UserError
from sseds_rec.training.metrics import evaluate, grouped_auc
from tests.ranks import run_ranks

ROWS = 501
ONE = Runtime(0, 1, torch.device("cpu"))


class _Echo(nn.Module):
    """Predicts the dense input."""

    def forward(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        logits = batch.dense[:, 0]
        return logits.mean(), (logits.mean(), logits, batch.labels)


def _rows() -> tuple[Tensor, Tensor, list[list[int]]]:
    """Logits with many ties, labels, and the users: none or one a row, any int64, some with labels of one class only."""
    random = torch.Generator().manual_seed(0)
    logits = (torch.randn(ROWS, generator=random) * 4).round() / 2
    labels = (torch.rand(ROWS, generator=random) < logits.sigmoid()).float()
    known = [2**62, 2**62 + 1, -1, 0, *range(10**15, 10**15 + 60)]  # the first two are one number as floats
    drawn = (torch.rand(ROWS, generator=random) ** 2 * len(known)).long().tolist()
    return logits, labels, [[known[index]] if index % 10 != 5 else [] for index in drawn]


def _batch(logits: Tensor, labels: Tensor, users: list[list[int]] | None = None) -> Batch:
    users = [[1]] * len(labels) if users is None else users
    tags = [[7] * (row % 3) for row in range(len(labels))]  # a sequence field, so that the users begin anywhere
    bags = [*tags, *users]
    sparse = KeyedJaggedTensor.from_lengths_sync(
        ["tags", "user"],
        torch.tensor([id for bag in bags for id in bag], dtype=torch.int64),
        torch.tensor([len(bag) for bag in bags], dtype=torch.int32),
    )
    return Batch(dense=logits[:, None], sparse=sparse, labels=labels)


def _evaluate_on_rank(rank: int, world_size: int) -> dict[str, float]:
    logits, labels, users = _rows()
    first, last = (int(bound) for bound in np.linspace(0, ROWS, world_size + 1)[rank : rank + 2])
    cuts = [first, first + 10, first + 11, last]
    batches = [_batch(logits[a:b], labels[a:b], users[a:b]) for a, b in pairwise(cuts)]
    return evaluate(_Echo(), batches, Runtime(rank, world_size, torch.device("cpu")), "user").as_dict()


@pytest.mark.parametrize("world_size", [1, 2])
def test_metrics_are_exact_over_all_rows_of_all_ranks(world_size: int) -> None:
    logits, labels, users = _rows()
    y, p = labels.double().numpy(), logits.double().sigmoid().numpy()
    groups = {user: np.array([bag == list(user) for bag in users]) for user in {tuple(bag) for bag in users}}
    kept = [rows for rows in groups.values() if 0 < y[rows].mean() < 1]
    assert 10 < len(kept) < len(groups)  # some groups are of one class
    within = [roc_auc_score(y[rows], p[rows]) for rows in kept]
    for metrics in run_ranks(world_size, _evaluate_on_rank):
        assert metrics.pop("samples_per_second") > 0
        assert metrics == pytest.approx(
            {
                "samples": ROWS,
                "auc": roc_auc_score(y, p),
                "logloss": log_loss(y, p),
                "normalized_entropy": log_loss(y, p) / log_loss(y, np.full(ROWS, y.mean())),
                "calibration": p.mean() / y.mean(),
                "gauc": np.average(within, weights=[rows.sum() for rows in kept]),
            },
            abs=1e-9,
        )


_SCORED = st.tuples(st.integers(-2, 2), st.integers(0, 1), st.sampled_from([-(2**63), -1, 5]))


@settings(deadline=None, max_examples=60)
@given(st.lists(_SCORED, min_size=1, max_size=25))
def test_grouped_auc_counts_pairs(rows: list[tuple[int, int, int]]) -> None:
    weighted, weight = 0.0, 0
    for group in {group for _, _, group in rows}:
        positives = [score for score, label, of in rows if of == group and label]
        negatives = [score for score, label, of in rows if of == group and not label]
        if positives and negatives:
            pairs = [(p > n) + (p == n) / 2 for p in positives for n in negatives]
            weighted += np.mean(pairs) * (len(positives) + len(negatives))
            weight += len(positives) + len(negatives)
    scores, labels, groups = (torch.tensor(column) for column in zip(*rows, strict=True))
    found = grouped_auc(scores.double(), labels.float(), groups)
    assert found == (pytest.approx(weighted / weight, abs=1e-12) if weight else None)


def test_auc_tells_predictions_apart_that_are_one_as_probabilities() -> None:
    logits, labels = torch.tensor([50.0, 60.0, 70.0]), torch.tensor([0.0, 1.0, 1.0])
    assert evaluate(_Echo(), [_batch(logits, labels)], ONE).auc == 1.0


def test_no_group_field_no_gauc() -> None:
    metrics = evaluate(_Echo(), [_batch(torch.zeros(2), torch.tensor([0.0, 1.0]))], ONE)
    assert metrics.gauc is None and "gauc" not in metrics.as_dict()


def test_undefined_metrics_are_refused() -> None:
    mixed = torch.tensor([0.0, 1.0])
    with pytest.raises(UserError, match="all 4 labels of the split are 1: AUC is undefined"):
        evaluate(_Echo(), [_batch(torch.zeros(4), torch.ones(4))], ONE)
    with pytest.raises(UserError, match="predicts NaN"):
        evaluate(_Echo(), [_batch(torch.tensor([0.0, float("nan")]), mixed)], ONE)
    with pytest.raises(UserError, match="evaluation.group_field=user: no group has labels of both classes"):
        evaluate(_Echo(), [_batch(torch.zeros(2), mixed, users=[[1], [2]])], ONE, "user")


class _Slow(_Echo):
    """Needs 100 ms a batch, and ten times that for the first; knows how many it really slept."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def forward(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        begun = time.perf_counter()
        time.sleep(0.1 if self.seconds else 1)
        self.seconds.append(time.perf_counter() - begun)
        return super().forward(batch)


def _pace_on_rank(rank: int, world_size: int) -> tuple[float, float]:
    """The pace that was measured, and this rank's as the model knows it."""

    def slowly() -> Iterator[Batch]:
        for _ in range(3):
            time.sleep(0.3)
            yield _batch(torch.zeros(30), torch.arange(30) % 2.0)

    model = _Slow()
    measured = evaluate(model, slowly(), Runtime(rank, world_size, torch.device("cpu"))).samples_per_second
    return measured, 30 / sorted(model.seconds)[1]


@pytest.mark.parametrize("world_size", [1, 2])
def test_pace_is_that_of_the_model_on_all_ranks_without_loading_and_starting(world_size: int) -> None:
    answers = run_ranks(world_size, _pace_on_rank)
    known = sum(of_rank for _, of_rank in answers)
    for pace, _ in answers:  # half of it, or less, with loading, as a mean over the three, or of one rank of two
        assert 0.6 * known < pace <= known
