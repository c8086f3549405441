"""Iterative rounds against a plain model whose outputs are masked by hand."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sseds_rec as sr
from tests.search.reference import FEATURES, TABLES, ClickModel, make_batch, make_rows

BUDGET = sr.Budget(dims=0.5)
PLAN = partial(sr.allocate, multiple=1, exponent=0.0)
TABLE_OF = {feature: table for table, (_, _, features) in TABLES.items() for feature in features}


@pytest.fixture
def model() -> ClickModel:
    torch.manual_seed(4)
    model = ClickModel().eval()
    with torch.no_grad():
        for bag in model.ebc.embedding_bags.values():
            bag.weight *= 5  # so that masks change the gradients
    return model


def _batches() -> list[Any]:
    rows = make_rows(90, seed=5)
    return [make_batch(rows, first, first + 30) for first in (0, 30, 60)]


def _masked_snip(model: ClickModel, batches: list[Any], kept: dict[str, list[int]]) -> dict[str, Tensor]:
    """|Σ_b e · ∂L/∂(masked e)| of each table, not normalised."""
    sums = {table: torch.zeros(columns) for table, (_, columns, _) in TABLES.items()}
    for features, labels in batches:
        pooled = model.ebc(features).to_dict()
        leaves = {}
        for feature in FEATURES:
            mask = torch.zeros(pooled[feature].shape[1])
            mask[kept[TABLE_OF[feature]]] = 1
            leaves[feature] = (pooled[feature].detach() * mask).requires_grad_()
        logits = model.over(torch.cat([leaves[f] for f in FEATURES], dim=1)).squeeze(1)
        loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
        for feature, slope in zip(FEATURES, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            sums[TABLE_OF[feature]] += (pooled[feature].detach() * slope).sum(0)
    return {table: total.abs() for table, total in sums.items()}


def test_every_round_scores_the_model_as_the_plan_before_leaves_it(model: ClickModel) -> None:
    batches = _batches()
    expected = sr.score_dimensions(model, batches)
    returned = False
    for progress in (0.25, 0.5, 0.75):
        plan = PLAN(expected, BUDGET.at(progress, list(expected.tables.values())))
        masked = _masked_snip(model, batches, {name: table.kept for name, table in plan.tables.items()})
        total = sum(float(values.sum()) for values in masked.values())
        scores = {name: (values / total).double() for name, values in masked.items()}
        expected = type(expected)(scores, expected.tables, {})
        after = PLAN(expected, BUDGET.at(progress + 0.25, list(expected.tables.values())))
        returned |= any(set(after.tables[name].kept) - set(plan.tables[name].kept) for name in TABLES)
    before = [parameter.clone() for parameter in model.parameters()]
    found = sr.score_dimensions(model, batches, rounds=4, budget=BUDGET, allocation=PLAN)
    assert found.search["rounds"] == 4
    for name in TABLES:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-7)
    assert returned  # a column that one round's plan drops is kept by the next
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_budgets_on_the_way_fall_in_equal_ratios() -> None:
    tables = list(sr.score_dimensions(ClickModel(), _batches()).tables.values())
    limits = [BUDGET.at(progress, tables).limit(tables) for progress in (0, 0.25, 0.5, 0.75, 1)]
    assert limits[0] == 32 and limits[-1] == 16  # of 32 columns a half
    assert limits == sorted(limits, reverse=True)
    assert limits == pytest.approx([32 * 0.5 ** (n / 4) for n in range(5)], abs=0.5)


def test_rounds_read_on_in_an_iterator_and_begin_a_list_anew(model: ClickModel) -> None:
    options: dict[str, Any] = {"rounds": 2, "budget": BUDGET, "allocation": PLAN}
    anew = sr.score_dimensions(model, _batches()[:1], num_batches=1, **options)
    on = sr.score_dimensions(model, iter(_batches()[:1] * 2), num_batches=1, **options)
    torch.testing.assert_close(dict(anew), dict(on), rtol=0, atol=0)
    with pytest.raises(sr.UserError, match="no batch to score with; give at least one for every round"):
        sr.score_dimensions(model, iter(_batches()[:1]), num_batches=1, **options)
    with pytest.raises(sr.UserError, match="rounds=0: rounds is a number from 1 on"):
        sr.score_dimensions(model, _batches(), rounds=0)
