"""Leave-one-out against tables whose columns are zeroed by hand."""

from __future__ import annotations

import copy
import json
from functools import partial
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

import sseds_rec as sr
from sseds_rec.search.audit import Audit, audit_dimensions
from tests.ranks import run_ranks
from tests.search.reference import TABLES, ClickModel, make_batch, make_rows

ROWS = 90
PLAN = partial(sr.allocate, budget=sr.Budget(dims=0.5), multiple=1, exponent=0.0)
CUTS = {1: [[(0, 40), (40, 90)]], 2: [[(0, 25), (25, 40)], [(40, 77), (77, 90)]]}


def _model() -> ClickModel:
    torch.manual_seed(3)
    model = ClickModel().eval()
    with torch.no_grad():
        for bag in model.ebc.embedding_bags.values():
            bag.weight *= 5  # losses that differ beyond rounding
    return model


def _audit(rank: int, world_size: int, criterion: str = "ggn", columns: int = 1000) -> Audit:
    model, rows = _model(), make_rows(ROWS, seed=5)
    batches = [make_batch(rows, *cut) for cut in CUTS[world_size][rank]]
    scores = sr.score_dimensions(model, batches, criterion)
    return audit_dimensions(model, batches, scores, PLAN(scores), columns=columns)


def _loss(model: ClickModel) -> float:
    with torch.no_grad():
        return float(model(make_batch(make_rows(ROWS, seed=5), 0, ROWS))[0])


def test_damage_is_what_a_zeroed_column_costs() -> None:
    audit, model = _audit(0, 1), _model()
    assert audit.columns == [(name, c) for name, (_, width, _) in TABLES.items() for c in range(width)]
    assert audit.samples == ROWS and audit.loss == pytest.approx(_loss(model), abs=1e-6)
    damage = []
    for table, column in audit.columns:
        without = copy.deepcopy(model)
        with torch.no_grad():
            without.ebc.embedding_bags[table].weight[:, column] = 0
        damage.append(_loss(without) - _loss(model))
    torch.testing.assert_close(audit.damage, torch.tensor(damage).double(), rtol=0, atol=3e-7)
    assert float(audit.damage.abs().max()) > 1e-3
    correlation = spearmanr(audit.scores, damage).statistic
    assert audit.rank_correlation == pytest.approx(correlation, abs=1e-3)
    magnitude = spearmanr(audit.scores, audit.damage.abs()).statistic
    assert audit.rank_correlation_of_magnitude == pytest.approx(magnitude, abs=1e-9)
    best = sum(sorted(damage)[-int(audit.kept.sum()) :])
    own = sum(d for d, kept in zip(damage, audit.kept, strict=True) if kept)
    assert audit.regret == pytest.approx((best - own) / best, abs=1e-3)
    assert json.loads(json.dumps(audit.as_dict()))["columns"][0]["table"] == "t0"


def test_two_ranks_find_what_one_finds() -> None:
    one = _audit(0, 1)
    for found in run_ranks(2, _audit):
        torch.testing.assert_close(found.damage, one.damage, rtol=0, atol=1e-7)
        assert found.samples == ROWS


def test_a_sample_is_a_part_of_the_columns() -> None:
    every, some = _audit(0, 1), _audit(0, 1, columns=9)
    assert len(some.columns) == 9 and set(some.columns) < set(every.columns)
    places = [every.columns.index(column) for column in some.columns]
    torch.testing.assert_close(some.damage, every.damage[places])


def test_coordinates_of_a_rotated_table_are_left_out_one_at_a_time() -> None:
    rows = make_rows(ROWS, seed=5)
    model, batch = _model(), make_batch(rows, 0, ROWS)
    scores = sr.score_dimensions(model, [batch], "ggn_rotated")
    audit = audit_dimensions(model, [batch], scores, PLAN(scores), columns=1000)
    index = audit.columns.index(("t1", 2))
    rotation = scores.rotations["t1"]
    projected = copy.deepcopy(model)
    weight = projected.ebc.embedding_bags["t1"].weight
    others = [c for c in range(16) if c != 2]
    with torch.no_grad():
        centred = weight.double() - rotation.mean
        weight.copy_(centred @ rotation.forward[:, others] @ rotation.inverse[:, others].T + rotation.mean)
    assert float(audit.damage[index]) == pytest.approx(_loss(projected) - _loss(model), abs=3e-7)


def test_constant_scores_and_whole_plans_have_no_correlation_or_regret() -> None:
    def audit(scores: Tensor, kept: Tensor) -> Audit:
        damage = torch.tensor([1.0, 2.0, -1.0])
        return Audit([("t", c) for c in range(3)], scores, damage, torch.zeros(3), kept, 0.5, 10)

    flat: Any = audit(torch.ones(3), torch.tensor([True, True, True])).as_dict()
    assert flat["rank_correlation"] is None and flat["regret"] is None
    wrong = audit(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([False, False, True]))
    assert wrong.regret == pytest.approx((2.0 - -1.0) / 2.0)
    assert wrong.rank_correlation == pytest.approx(-0.5)


def test_no_batch_is_refused() -> None:
    model = _model()
    scores = sr.score_dimensions(model, [make_batch(make_rows(ROWS, seed=5), 0, ROWS)])
    with pytest.raises(sr.UserError, match="no batch to audit with"):
        audit_dimensions(model, [], scores, PLAN(scores))
