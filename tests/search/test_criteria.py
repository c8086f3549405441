"""Every criterion, on one, two and four ranks with uneven batches, against its formula in the gradients of an explicit α."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sseds_rec as sr
from tests.ranks import run_ranks
from tests.search.placed import load, shard
from tests.search.zoo import FEATURES, KEYS, TABLES, Case, build, explicit, make_batch, make_rows, weights_of

#: Two steps of 22 and 18 rows: of each rank, what it gets of them.
CUTS = {
    1: [[(0, 22), (22, 40)]],
    2: [[(0, 13), (22, 25)], [(13, 22), (25, 40)]],
    4: [[(0, 3), (22, 30)], [(3, 10), (30, 31)], [(10, 11), (31, 36)], [(11, 22), (36, 40)]],
}
STEPS = [slice(0, 22), slice(22, 40)]
Scores = dict[str, Tensor]


def _by_table() -> dict[str, Scores]:
    """Criterion -> table -> what its definition says of the rows, from c_b = ∂ℓ_b/∂α_b, d_b = ∂z_b/∂α_b, h_b and e_b."""
    found = explicit(Case())
    p = torch.sigmoid(found["z"][""])
    h = (p * (1 - p))[:, None]
    scores: dict[str, Scores] = {}
    for table in TABLES:
        c, d, e = found["loss"][table], found["logit"][table], found["output"][table]
        ggn = (h * d**2).mean(0)
        covariance = torch.cov(e.T, correction=0)
        energies = torch.linalg.eigvalsh(covariance).flip(0).clamp_min(0)
        left = [float(energies[j:].sum() / energies.sum()) for j in range(len(energies))]
        ranked = sorted(range(len(energies)), key=lambda column: -float(covariance[column, column]))
        own = {
            "snip": c.mean(0).abs(),
            "snip_batch_abs": sum(c[step].sum(0).abs() for step in STEPS) / len(c),
            "taylor_abs": c.abs().mean(0),
            "fisher": (c**2).mean(0),
            "ggn": ggn,
            "taylor2": (ggn / 2 - c.mean(0)).clamp_min(0),
            "magnitude": (e**2).mean(0).sqrt(),
            "pca_energy": torch.tensor([left[ranked.index(column)] for column in range(len(energies))]),
        }
        for name, values in own.items():
            scores.setdefault(name, {})[table] = values.double()
    return scores


def _by_feature() -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, Tensor]:
    """Pooled embeddings e [B, D] and ∂z/∂e of each feature, ids of each row and feature, and h [B]; float64."""
    weights = {name: value.double() for name, value in weights_of(Case()).items()}
    ids, _, _ = make_rows(Case())
    e = {
        feature: torch.stack(
            [weights[f"embedding.embedding_bags.{table}.weight"][row[FEATURES.index(feature)]].sum(0) for row in ids]
        ).requires_grad_()
        for feature, table in KEYS.items()
    }
    hidden = torch.tanh(torch.cat(list(e.values()), dim=1) @ weights["over.0.weight"].T + weights["over.0.bias"])
    z = (hidden @ weights["over.3.weight"].T + weights["over.3.bias"]).squeeze(1)
    slopes = torch.autograd.grad(z.sum(), list(e.values()))
    p = torch.sigmoid(z.detach())
    lengths = torch.tensor([[len(bag) for bag in row] for row in ids]).double()
    return {f: v.detach() for f, v in e.items()}, dict(zip(e, slopes, strict=True)), lengths, p * (1 - p)


def _mean_replace() -> Scores:
    e, slopes, _, h = _by_feature()
    scores = {}
    for table, (_, features) in TABLES.items():
        mean = torch.cat([e[f] for f in features]).mean(0)
        without = torch.stack([(e[f] - mean) * slopes[f] for f in features]).sum(0)
        scores[table] = (h[:, None] * without**2).mean(0)
    return scores


def _rotated() -> Scores:
    """Eigenvalues of G C, which are the squared singular values of G^½ C^½."""
    e, slopes, lengths, h = _by_feature()
    scores = {}
    for table, (_, features) in TABLES.items():
        own, slope = torch.cat([e[f] for f in features]), torch.cat([slopes[f] for f in features])
        mass = torch.cat([lengths[:, FEATURES.index(f)] for f in features])
        mean = (mass @ own) / (mass @ mass)
        centred = own - mass[:, None] * mean
        covariance = centred.T @ centred / len(own)
        curvature = (slope.T * h.repeat(len(features))) @ slope / len(h)
        scores[table] = torch.linalg.eigvals(curvature @ covariance).real.sort(descending=True).values
    return scores


def _normalized(scores: Scores) -> Scores:
    total = sum(float(values.sum()) for values in scores.values())
    return {table: values / total for table, values in scores.items()}


#: Criterion -> how far from its formula, as a share of a table's largest score. The rotated one adds 1e-4 to its eigenvalues.
TOLERANCES = {
    "snip": 1e-6,
    "snip_batch_abs": 1e-6,
    "taylor_abs": 1e-6,
    "fisher": 1e-6,
    "ggn": 1e-6,
    "taylor2": 1e-6,
    "mean_replace": 1e-6,
    "magnitude": 1e-6,
    "pca_energy": 1e-6,
    "ggn_rotated": 1e-3,
}


def _scores_on_rank(rank: int, world_size: int) -> dict[str, Scores]:
    types = ["table_wise", "row_wise", "column_wise", "data_parallel"]
    model = shard(build(Case(), "meta"), dict(zip(TABLES, types, strict=True)))
    load(model, weights_of(Case()))
    batches = [make_batch(Case(), *cut) for cut in CUTS[world_size][rank]]
    return {name: dict(sr.score_dimensions(model, batches, name)) for name in TOLERANCES}


@pytest.fixture(scope="module")
def on_one_rank() -> dict[str, Scores]:
    (scores,) = run_ranks(1, _scores_on_rank)
    return scores


def _assert_close(scores: Scores, expected: Scores, tolerance: float, what: str) -> None:
    for table in TABLES:
        largest = float(expected[table].abs().max())
        error = float((scores[table] - expected[table]).abs().max()) / largest
        assert error < tolerance, f"{what}, {table}: off by {error}"


@pytest.mark.parametrize("criterion", TOLERANCES)
def test_criteria_are_their_formulas_in_an_explicit_alpha(on_one_rank: dict[str, Scores], criterion: str) -> None:
    expected = (_by_table() | {"mean_replace": _mean_replace(), "ggn_rotated": _rotated()})[criterion]
    _assert_close(on_one_rank[criterion], _normalized(expected), TOLERANCES[criterion], criterion)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_with_uneven_batches_score_as_one_with_all_rows(on_one_rank: dict[str, Scores], world_size: int) -> None:
    for answer in run_ranks(world_size, _scores_on_rank):
        for criterion, scores in answer.items():
            _assert_close(scores, on_one_rank[criterion], 1e-6, criterion)
