"""What goes wrong in somebody's batch or model: one clear line on every rank, and no score bent by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sseds_rec as sr
from sseds_rec.search.audit import audit_dimensions
from sseds_rec.search.samples import sum_products, sum_rows
from tests.ranks import run_ranks
from tests.search.reference import FEATURES, ClickModel, make_batch, make_rows

ROWS = 60


@pytest.fixture
def model() -> ClickModel:
    torch.manual_seed(3)
    return ClickModel().eval()


def _batch(first: int = 0, last: int = ROWS) -> Any:
    return make_batch(make_rows(ROWS, seed=5), first, last)


def _logits(model: Any, batch: Any) -> Tensor:
    pooled = model.ebc(batch[0])
    return model.over(torch.cat([pooled[f] for f in FEATURES], dim=1)).squeeze(1)


def test_sums_are_as_exact_under_autocast() -> None:
    values, weights = torch.randn(700, 8), torch.rand(700, 1)
    expected = (values.double() * weights.double()).sum(0), values.double().T @ values.double()
    with torch.autocast("cpu", torch.bfloat16):
        found = sum_rows(values, weights), sum_products(values, values)
    for own, reference in zip(found, expected, strict=True):
        assert own.dtype == torch.float64
        torch.testing.assert_close(own, reference, rtol=1e-5, atol=1e-5)


def test_a_loss_that_is_only_shown_does_not_count(model: ClickModel) -> None:
    def with_metric(m: nn.Module, batch: Any) -> Tensor:
        logits = _logits(m, batch)
        with torch.no_grad():
            F.binary_cross_entropy_with_logits(3 * logits, batch[1])
        return F.binary_cross_entropy_with_logits(logits, batch[1])

    expected = sr.score_dimensions(model, [_batch()], "ggn")
    found = sr.score_dimensions(model, [_batch()], "ggn", loss_fn=with_metric)
    torch.testing.assert_close(dict(found), dict(expected))


def _weighted(m: nn.Module, batch: Any) -> Tensor:
    features, labels, weights = batch
    return (
        F.binary_cross_entropy_with_logits(_logits(m, (features, labels)), labels, reduction="none") * weights
    ).mean()


@pytest.mark.parametrize("criterion", ["snip", "ggn", "ggn_rotated"])
def test_a_batch_of_which_nothing_counts_adds_nothing(model: ClickModel, criterion: str) -> None:
    first, second = _batch(0, 30), _batch(30, 60)
    alone = sr.score_dimensions(model, [(*first, torch.ones(30))], criterion, loss_fn=_weighted)
    batches = [(*first, torch.ones(30)), (*second, torch.zeros(30))]
    found = sr.score_dimensions(model, batches, criterion, loss_fn=_weighted)
    if criterion != "ggn_rotated":  # whose C is of all embeddings
        torch.testing.assert_close(dict(found), dict(alone))
    # A redraw may have the second batch only; it keeps nothing.
    assert 0 < sr.expected_overlap(found, lambda drawn: sr.allocate(drawn, sr.Budget(dims=0.5))) < 1
    assert sr.standard_errors(found) is not None


def _one_fails(rank: int, world_size: int, fails: int) -> str:
    torch.manual_seed(3)

    def loss_fn(m: nn.Module, batch: Any) -> Tensor:
        loss = m(batch)[0]
        if rank == fails and len(batch[1]) == 20:
            raise ValueError(f"a bad label on rank {rank}")
        return loss

    try:
        sr.score_dimensions(ClickModel(), [_batch(0, 30), _batch(30, 50), _batch(50, 60)], loss_fn=loss_fn)
    except (ValueError, sr.UserError) as error:
        return str(error)
    return "scored"


def test_a_rank_that_cannot_score_its_batch_ends_all() -> None:
    assert run_ranks(2, _one_fails, 1) == [
        "another rank could not score its batch; it says why",
        "a bad label on rank 1",
    ]
    assert run_ranks(2, _one_fails, 7) == ["scored", "scored"]  # and the processes are in step


@pytest.mark.parametrize("returned", [None, {"loss": 1.0}, 0.5, (), torch.ones(3)])
def test_what_is_no_loss_is_refused(model: ClickModel, returned: Any) -> None:
    with pytest.raises(sr.UserError, match="must return its mean loss"):
        sr.score_dimensions(model, [_batch()], loss_fn=lambda m, b: (m(b), returned)[1])


def test_a_detached_loss_is_refused(model: ClickModel) -> None:
    with pytest.raises(sr.UserError, match="the loss has no graph to the embeddings"):
        sr.score_dimensions(model, [_batch()], loss_fn=lambda m, b: m(b)[0].detach())


@pytest.mark.parametrize("number", ["Auto", 2.0, 0, -1])
def test_num_batches_is_a_number_or_auto(model: ClickModel, number: Any) -> None:
    with pytest.raises(sr.UserError, match="num_batches too, or 'auto' or None"):
        sr.score_dimensions(model, [_batch()], num_batches=number)


def test_audits_of_nothing_or_of_another_model_are_refused(model: ClickModel) -> None:
    scores = sr.score_dimensions(model, [_batch()])
    plan = sr.allocate(scores, sr.Budget(dims=0.5))
    with pytest.raises(sr.UserError, match="columns=0: at least one"):
        audit_dimensions(model, [_batch()], scores, plan, columns=0)
    other = plan.model_copy(update={"tables": {"t0": plan.tables["t0"]}})
    with pytest.raises(sr.UserError, match="table t1 is in the scores only"):
        audit_dimensions(model, [_batch()], scores, other)
