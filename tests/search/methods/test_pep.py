"""PEP's soft threshold: of what is looked up and of the tables, against an explicitly thresholded embedding in plain autograd."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

from sseds_rec.search.elements import Elements
from sseds_rec.search.methods.pep import Granularity, PepConfig, SoftThreshold
from sseds_rec.training.optimizers import fuse_table_optimizer
from tests.ranks import run_ranks
from tests.search.placed import load, shard
from tests.search.zoo import DIM, KEYS, TABLES, Case, build

GRANULARITIES: list[Granularity] = ["global", "dimension", "field"]
SIZES = {"a": 6, "b": 9}
WIDTH = 4
IDS = {"f": [0, 3, 3, 5, 1], "g": [8, 0, 2, 2, 7]}


def _start(rows: int, columns: int) -> Tensor:
    """Values on both sides of thresholds near .5, in a fixed order."""
    values = torch.linspace(-1, 1, rows * columns)
    return values[torch.randperm(rows * columns, generator=torch.Generator().manual_seed(rows))].view(rows, columns)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_values_and_gradients_are_those_of_a_thresholded_table(granularity: Granularity) -> None:
    tables = [
        EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=WIDTH, feature_names=[feature])
        for (name, rows), feature in zip(SIZES.items(), IDS, strict=True)
    ]
    bags = EmbeddingBagCollection(tables=tables)
    gate = SoftThreshold({"f": "a", "g": "b"}, WIDTH, granularity, 0.0)
    with torch.no_grad():
        gate.s.add_(torch.linspace(-1.5, 0.5, gate.s.numel()).view(gate.s.shape))
        for name, rows in SIZES.items():
            bags.state_dict()[f"embedding_bags.{name}.weight"].copy_(_start(rows, WIDTH))
    ids = KeyedJaggedTensor(["f", "g"], torch.tensor(IDS["f"] + IDS["g"]), lengths=torch.ones(10, dtype=torch.int32))
    coefficients = torch.randn(5, 2 * WIDTH, generator=torch.Generator().manual_seed(1))
    found = gate(bags(ids))
    torch.sin(found.values() * coefficients).sum().backward()

    s = gate.s.detach().clone().requires_grad_()
    weights = [_start(rows, WIDTH).requires_grad_() for rows in SIZES.values()]
    looked_up = []
    for position, (weight, own) in enumerate(zip(weights, IDS.values(), strict=True)):
        threshold = 1 / (1 + torch.exp(-(s[position] if granularity == "field" else s[0])))
        threshold = threshold.expand(weight.shape)
        sparse = torch.where(weight > threshold, weight - threshold, torch.zeros(()))
        sparse = torch.where(weight < -threshold, weight + threshold, sparse)
        looked_up.append(F.embedding(torch.tensor(own), sparse))
    expected = torch.cat(looked_up, dim=1)
    torch.sin(expected * coefficients).sum().backward()

    assert 0.1 < float((expected == 0).float().mean()) < 0.9
    torch.testing.assert_close(found.values(), expected, rtol=0, atol=1e-6)
    assert gate.s.grad is not None and s.grad is not None
    torch.testing.assert_close(gate.s.grad, s.grad, rtol=1e-5, atol=1e-6)
    for name, weight in zip(SIZES, weights, strict=True):
        grad = bags.embedding_bags[name].weight.grad
        torch.testing.assert_close(grad, weight.grad, rtol=1e-5, atol=1e-6)


def _applied(rank: int, world_size: int, granularity: Granularity) -> Any:
    model = build(Case(), "meta")
    kinds = dict(zip(TABLES, ("row_wise", "column_wise", "data_parallel", "table_wise"), strict=True))
    fuse_table_optimizer(model, "adagrad", 0.1, "auto", ["t2"])
    sharded = shard(model, kinds)
    with torch.no_grad():
        load(sharded, {f"embedding.embedding_bags.{t}.weight": _start(n, DIM) for t, (n, _) in TABLES.items()})
    gate = SoftThreshold(KEYS, DIM, granularity, -1.0)
    with torch.no_grad():
        gate.s.add_(torch.linspace(-0.5, 1.5, gate.s.numel()).view(gate.s.shape))
    elements = Elements(sharded)
    left = gate.left(elements)
    gate.apply_to(elements)
    nonzeros = {name: one.nonzeros for name, one in elements.stored().items()}
    sums = elements.count(lambda part: (part.values.double().abs().sum() * 1e6).long())
    return left, nonzeros, sums, gate.s.detach().numpy()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_tables_are_counted_and_thresholded_in_their_shards(granularity: Granularity) -> None:
    answers = run_ranks(2, _applied, granularity)
    left, nonzeros, sums, s = answers[0]
    assert answers[1][:3] == (left, nonzeros, sums)
    for position, (name, (rows, _)) in enumerate(TABLES.items()):
        threshold = 1 / (1 + np.exp(-(s[position] if granularity == "field" else s[0])))
        over = np.maximum(np.abs(_start(rows, DIM).numpy()) - threshold, 0)
        assert nonzeros[name] == np.count_nonzero(over)
        assert sums[name] == pytest.approx(over.sum() * 1e6, rel=1e-5)
    assert left == sum(nonzeros.values()) and 0 < left < sum(rows * DIM for rows, _ in TABLES.values())


def test_weight_decay_alone_raises_thresholds_to_one_half() -> None:
    gate = SoftThreshold({"f": "a"}, WIDTH, "dimension", -15.0)
    optimizer = PepConfig(learning_rate=0.1).optimizer(gate.parameters())
    rising = []
    for _ in range(400):
        gate.s.grad = torch.zeros_like(gate.s)  # nothing is above the threshold
        optimizer.step()
        rising.append(float(gate.thresholds().detach().mean()))
    assert rising[0] < 1e-6 and rising[:140] == sorted(rising[:140])
    assert rising[-1] == pytest.approx(0.5, abs=0.05)
