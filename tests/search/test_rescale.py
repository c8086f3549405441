"""Scales of tables against autograd in an explicit α, on 1 and 2 processes, and what plans and slim models make of them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchrec.optim
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

import sseds_rec as sr
from sseds_rec.search.scores import DimensionScores
from tests.ranks import run_ranks
from tests.search import reference, zoo
from tests.search.placed import load, shard
from tests.search.test_saliency import _sharded, _training_state
from tests.search.zoo import KEYS, ROWS, TABLES, Case
from tests.slim.rotations import project

CASES = [Case(), Case(pooling="MEAN"), Case(weighted=True), Case(twice=True)]
WEIGHTED_MEANS = Case(
    pooling="MEAN", weighted=True
)  # which TorchRec pools in sharded models only, and row-wise wrongly
CUTS = {1: [[(0, 15), (15, 40)]], 2: [[(0, 9), (9, 16)], [(16, 35), (35, 40)]]}
"""Ranks -> per rank, the (first, last) row of each batch: sizes differ between ranks and batches."""


def _weights(case: Case) -> dict[str, Tensor]:
    """With tables large enough that their scales show."""
    found = zoo.weights_of(case)
    return {name: value * (10.0 if "embedding_bags" in name else 1.0) for name, value in found.items()}


def _tables(case: Case) -> dict[str, Tensor]:
    return {table: _weights(case)[f"embedding.embedding_bags.{table}.weight"].double() for table in TABLES}


def _logits(case: Case, tables: dict[str, Tensor]) -> Tensor:
    """Of all rows, in plain PyTorch, from the rows of the tables: an empty bag is 0."""
    ids, id_weights, _ = zoo.make_rows(case)
    weights = {name: value.double() for name, value in _weights(case).items()}
    columns = []
    for f, table in enumerate(KEYS.values()):
        offsets = torch.tensor([0, *np.cumsum([len(row[f]) for row in ids])[:-1]])
        flat, scale = (torch.tensor([x for row in rows for x in row[f]]) for rows in (ids, id_weights))
        if case.pooling == "MEAN":
            scale = scale / torch.tensor([len(row[f]) for row in ids for _ in row[f]])
        pooled = F.embedding_bag(flat, tables[table], offsets, mode="sum", per_sample_weights=scale.double())
        columns.append(pooled**2 if case.twice else pooled)
    hidden = torch.tanh(torch.cat(columns, dim=1) @ weights["over.0.weight"].T + weights["over.0.bias"])
    return (hidden @ weights["over.3.weight"].T + weights["over.3.bias"]).squeeze(1)


def _expected(case: Case, means: dict[str, Tensor]) -> dict[str, float]:
    """The Newton step in one α a table, v -> μ + α (v - μ) for all its rows."""
    tables, labels = _tables(case), zoo.make_rows(case)[2]

    def logits(alpha: Tensor) -> Tensor:
        own = zip(tables.items(), alpha, strict=True)
        return _logits(case, {name: means[name] + a * (table - means[name]) for (name, table), a in own})

    def loss(alpha: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits(alpha), labels, reduction="sum")

    one = torch.ones(len(tables), dtype=torch.float64)
    p = torch.sigmoid(logits(one)).numpy()
    u = torch.autograd.functional.jacobian(logits, one).numpy()
    slope = torch.autograd.functional.jacobian(loss, one).numpy()
    matrix = sum(p_b * (1 - p_b) * np.outer(u_b, u_b) for p_b, u_b in zip(p, u, strict=True)) + 4 * np.eye(len(tables))
    return dict(zip(tables, np.clip(1 - np.linalg.solve(matrix, slope), 0, 2).tolist(), strict=True))


Scaled = tuple[dict[str, float], dict[str, Tensor]]


def _rescaled(model: nn.Module, batches: list[Any]) -> Scaled:
    """Scales, and the means about which they are."""
    scores = sr.score_dimensions(model, batches, "ggn_rotated")
    means = {name: rotation.mean for name, rotation in scores.rotations.items()}
    return sr.rescale(model, batches, scores).search["scales"], means


def _assert_scales(found: Scaled, case: Case) -> None:
    scales, means = found
    expected = _expected(case, means)
    assert list(scales) == list(TABLES)
    assert max(expected.values()) - min(expected.values()) > 0.02  # there is something to find
    assert scales == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_plain_model_equals_explicit_alpha(case: Case) -> None:
    model = zoo.build(case)
    model.load_state_dict(_weights(case), strict=False)
    _assert_scales(_rescaled(model, [zoo.make_batch(case, *cut) for cut in CUTS[1][0]]), case)


def _rescaled_on_rank(rank: int, world_size: int, cases: list[Case], types: dict[str, str]) -> list[Scaled]:
    found = []
    for case in cases:
        model = shard(zoo.build(case, "meta"), types)
        load(model, _weights(case))
        found.append(_rescaled(model, [zoo.make_batch(case, *cut) for cut in CUTS[world_size][rank]]))
    return found


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", ["table_wise", "row_wise", "column_wise", "data_parallel"])
def test_sharded_models_with_uneven_batches_equal_explicit_alpha(world_size: int, kind: str) -> None:
    cases = CASES if kind == "row_wise" else [*CASES, WEIGHTED_MEANS]
    answers = run_ranks(world_size, _rescaled_on_rank, cases, dict.fromkeys(TABLES, kind))
    for answer in answers:
        for (scales, means), (first, _), case in zip(answer, answers[0], cases, strict=True):
            assert scales == first  # bit for bit: all ranks cut alike
            _assert_scales((scales, means), case)


def _click_batch(first: int = 0, last: int = 60) -> Any:
    return reference.make_batch(reference.make_rows(60, seed=5), first, last)


def _trace_left_on_rank(rank: int, world_size: int) -> tuple[bool, list[tuple[str, int]]]:
    """Whether all is as it was before, and what was all-reduced in four batches, of which the last rank has one more."""
    model = _sharded("row_wise", world_size, torchrec.optim.RowWiseAdagrad)
    dense = torch.optim.Adam([p for name, p in model.named_parameters() if "over." in name], lr=0.01)
    model.train()
    model(_click_batch(30 * rank, 30 * rank + 30))[0].backward()
    dense.step()
    batches = [_click_batch(first, first + 7) for first in (0, 10, 20, 30)]
    scores = sr.score_dimensions(model, batches, "ggn_rotated")
    before, rng = copy.deepcopy(_training_state(model, dense)), torch.get_rng_state()
    sent: list[tuple[str, int]] = []
    original = dist.all_reduce

    def recorded(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append((str(tensor.dtype), tensor.numel()))
        return original(tensor, *args, **kwargs)

    dist.all_reduce = recorded
    try:
        sr.rescale(model, batches + batches[:1] * rank, scores)
    finally:
        dist.all_reduce = original
    same = all(torch.equal(a, b) for a, b in zip(before, _training_state(model, dense), strict=True))
    return same and model.training and torch.equal(rng, torch.get_rng_state()), sent


def test_it_leaves_no_trace_and_sends_one_small_sum() -> None:
    for same, sent in run_ranks(2, _trace_left_on_rank):
        assert same
        assert sent == [("torch.int64", 1)] * 5 + [("torch.float64", 3 * 3 + 3 + 1)]


@pytest.mark.parametrize("case", [Case(), Case(pooling="MEAN"), Case(weighted=True)], ids=str)
def test_scores_plans_and_slim_models_are_scaled(case: Case) -> None:
    model, batches = zoo.build(case), [zoo.make_batch(case, *cut) for cut in CUTS[1][0]]
    model.load_state_dict(_weights(case), strict=False)
    before = sr.score_dimensions(model, batches, "ggn_rotated")
    after = sr.rescale(model, batches, before)
    scales = after.search["scales"]
    expected = {name: before[name] * scales[name] ** 2 for name in TABLES}
    total = sum(float(own.sum()) for own in expected.values())
    for name, own in expected.items():
        torch.testing.assert_close(after[name], own / total, rtol=1e-9, atol=1e-15)
    assert "scales" not in before.search and {k: after.search[k] for k in before.search} == before.search
    plan = sr.allocate(after, sr.Budget(dims=0.5))
    assert plan.search["scales"] == scales
    projected = {}
    for name, table in plan.tables.items():
        unscaled = before.rotations[name].keep(table.kept)
        assert torch.equal(plan.rotations[name].forward, unscaled.forward * scales[name])
        assert torch.equal(plan.rotations[name].inverse, unscaled.inverse)
        mean, whole = unscaled.mean, _tables(case)[name]
        projected[name] = mean + scales[name] * (project(whole, unscaled) - mean)
    found = sr.slim(model.eval(), plan)(zoo.make_batch(case, 0, ROWS))[1]
    torch.testing.assert_close(found, _logits(case, projected), rtol=0, atol=1e-5)
    assert float((found - _logits(case, _tables(case))).abs().max()) > 0.02


IDS, GROUPS, DIM = 150, 6, 4


class _Toy(nn.Module):
    """An id of which there are few rows each and which says nothing, and a group that decides the click."""

    def __init__(self) -> None:
        super().__init__()
        self.ebc = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=DIM, feature_names=[name])
                for name, rows in (("id", IDS), ("group", GROUPS))
            ]
        )
        self.over = nn.Linear(2 * DIM, 1)

    def forward(self, batch: tuple[KeyedJaggedTensor, Tensor]) -> Tensor:
        logits = self.over(self.ebc(batch[0]).values()).squeeze(1)
        return F.binary_cross_entropy_with_logits(logits, batch[1])


def _clicks(count: int, seed: int) -> tuple[KeyedJaggedTensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    group = torch.randint(0, GROUPS, (count,), generator=random)
    labels = torch.rand(count, generator=random) < torch.sigmoid(1.5 * (group - 2.5))
    values = torch.cat([torch.randint(0, IDS, (count,), generator=random), group])
    return KeyedJaggedTensor(keys=["id", "group"], values=values, lengths=torch.ones_like(values)), labels.float()


def _trained(steps: int) -> _Toy:
    torch.manual_seed(0)
    model, rows = _Toy(), _clicks(600, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        model(rows).backward()
        optimizer.step()
    return model


def _loss(model: _Toy, scores: DimensionScores) -> float:
    """Of the model slimmed to a plan that keeps all, on rows that neither training nor the scales have seen."""
    plan = sr.allocate(scores, sr.Budget(dims=1.0))
    with torch.no_grad():
        return float(sr.slim(copy.deepcopy(model), plan)(_clicks(4000, 3)))


@pytest.mark.parametrize(("steps", "gained"), [(40, 0.01), (150, 0.2)])
def test_what_was_learned_by_heart_is_scaled_down_and_unseen_rows_are_better_off(steps: int, gained: float) -> None:
    """After 150 steps the model is so sure that a whole Newton step would leave nothing of either table."""
    model, held_out = _trained(steps), _clicks(4000, 2)
    scores = sr.score_dimensions(model, [held_out], "ggn_rotated")
    after = sr.rescale(model, [held_out], scores)
    scales = after.search["scales"]
    assert scales["id"] < 0.4 and 0.35 < scales["group"] < 1.25
    assert after["id"].sum() < 0.2 * scores["id"].sum()
    before, loss = _loss(model, scores), _loss(model, after)
    assert before == pytest.approx(float(model(_clicks(4000, 3)).detach()), abs=1e-5)
    assert loss < before - gained


def test_true_tables_keep_their_scale() -> None:
    """The same model after few steps on many rows: the group is as true on unseen ones."""
    torch.manual_seed(0)
    model, rows, held_out = _Toy(), _clicks(20_000, 1), _clicks(20_000, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        model(rows).backward()
        optimizer.step()
    scores = sr.score_dimensions(model, [held_out], "ggn_rotated")
    assert sr.rescale(model, [held_out], scores).search["scales"]["group"] == pytest.approx(1, abs=0.1)


def test_a_table_without_effect_on_these_rows_stays_as_it_is() -> None:
    model = reference.ClickModel()
    scores = sr.score_dimensions(model, [_click_batch()], "ggn_rotated")
    ids, labels = reference.make_rows(60, seed=5)
    without_f0 = reference.make_batch(([[[], *bags[1:]] for bags in ids], labels), 0, 60)
    scales = sr.rescale(model, [without_f0], scores).search["scales"]
    assert scales["t0"] == 1.0 and all(np.isfinite(list(scales.values()))) and scales["t1"] != 1.0


def test_num_batches_takes_the_first_ones() -> None:
    model, batches = reference.ClickModel(), [_click_batch(0, 30), _click_batch(30, 60)]
    scores = sr.score_dimensions(model, batches, "ggn_rotated")
    one = sr.rescale(model, batches, scores, num_batches=1).search["scales"]
    assert one == sr.rescale(model, batches[:1], scores).search["scales"]
    assert one != sr.rescale(model, batches, scores).search["scales"]


def test_what_cannot_be_rescaled_is_refused_by_name() -> None:
    model, batch = reference.ClickModel(), _click_batch()
    scores = sr.score_dimensions(model, [batch], "ggn_rotated")

    def own_loss(m: Any, b: Any) -> Tensor:
        return F.softplus(m.over(torch.cat([m.ebc(b[0])[f] for f in reference.FEATURES], dim=1))).mean()

    with pytest.raises(sr.UserError, match=r"no table is scored in a rotated basis.*criterion='ggn_rotated'"):
        sr.rescale(model, [batch], sr.score_dimensions(model, [batch], "ggn"))
    with pytest.raises(sr.UserError, match="no batch to rescale with; give at least one"):
        sr.rescale(model, [], scores)
    with pytest.raises(sr.UserError, match="num_batches=0: it is a number from 1 on, or None"):
        sr.rescale(model, [batch], scores, num_batches=0)
    with pytest.raises(sr.UserError, match="found no logits: the loss calls none of binary_cross_entropy_with_logits"):
        sr.rescale(model, [batch], scores, loss_fn=own_loss)
    with pytest.raises(sr.UserError, match="the loss has no graph to the embeddings"):
        sr.rescale(model, [batch], scores, loss_fn=lambda m, b: m(b)[0].detach())
    with pytest.raises(sr.UserError, match="table t0: the model has none of this name and width"):
        sr.rescale(_Toy(), [_clicks(10, 0)], scores)
    with torch.no_grad():
        model.over[0].weight.fill_(float("nan"))
    with pytest.raises(sr.UserError, match="the loss of a batch to rescale with is not finite"):
        sr.rescale(model, [batch], scores)


def _one_fails(rank: int, world_size: int, fails: int) -> str:
    torch.manual_seed(3)
    model, batches = reference.ClickModel(), [_click_batch(0, 30), _click_batch(30, 50), _click_batch(50, 60)]
    scores = sr.score_dimensions(model, batches, "ggn_rotated")

    def loss_fn(m: nn.Module, batch: Any) -> Tensor:
        if rank == fails and len(batch[1]) == 20:
            raise ValueError(f"a bad label on rank {rank}")
        return m(batch)[0]

    try:
        sr.rescale(model, batches, scores, loss_fn=loss_fn)
    except (ValueError, sr.UserError) as error:
        return str(error)
    return "rescaled"


def test_a_rank_that_cannot_go_on_ends_all() -> None:
    says = "another rank could not rescale with its batch; it says why"
    assert run_ranks(2, _one_fails, 1) == [says, "a bad label on rank 1"]
    assert run_ranks(2, _one_fails, 7) == ["rescaled", "rescaled"]  # and the processes are in step
