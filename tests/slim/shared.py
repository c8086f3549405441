"""Small collections of which one feature is in two tables, and what slim ones give compared with them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    KeyedJaggedTensor,
    KeyedTensor,
)

import sseds_rec as sr
from tests.slim.moves import mask
from tests.slim.rotations import draw_rotation, project

#: Two tables of feature a, of which one or none may be left, or both in other widths; one of two features.
TABLES = {"first": ["a", "b"], "second": ["a"], "third": ["c"]}
CUTS: list[dict[str, list[int]]] = [
    {"first": [1, 2], "second": [0, 1, 2, 4, 5], "third": [3]},
    {"first": [1, 2], "second": [], "third": [3]},
    {"first": [], "second": [0, 7], "third": []},
    {"first": [], "second": [], "third": [3]},
]


class Wrapped(nn.Module):
    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, features: Any) -> Any:
        return self.embedding(features)


def pooled(is_weighted: bool = False, device: str = "cpu", **options: Any) -> Wrapped:
    torch.manual_seed(0)
    configs = [
        EmbeddingBagConfig(name=t, num_embeddings=9, embedding_dim=8, feature_names=list(own), **options)
        for t, own in TABLES.items()
    ]
    return Wrapped(EmbeddingBagCollection(tables=configs, is_weighted=is_weighted, device=torch.device(device)))


def sequences(need_indices: bool = False, device: str = "cpu", **options: Any) -> Wrapped:
    torch.manual_seed(0)
    configs = [
        EmbeddingConfig(name=t, num_embeddings=9, embedding_dim=8, feature_names=list(own), **options)
        for t, own in TABLES.items()
    ]
    return Wrapped(EmbeddingCollection(tables=configs, need_indices=need_indices, device=torch.device(device)))


def make_features(weighted: bool = False) -> KeyedJaggedTensor:
    random = torch.Generator().manual_seed(3)
    lengths = torch.tensor([2, 0, 1, 3, 1, 1, 0, 2, 2, 1, 0, 1], dtype=torch.int32)
    values = torch.randint(0, 9, (int(lengths.sum()),), generator=random)
    weights = torch.rand(len(values), generator=random) if weighted else None
    return KeyedJaggedTensor(keys=list("abc"), values=values, lengths=lengths, weights=weights)


def make_share(rank: int, world_size: int) -> KeyedJaggedTensor:
    """A rank's rows of `make_features`: as many on each."""
    bags = [own.to_dense() for own in make_features().to_dict().values()]
    count = len(bags[0]) // world_size
    rows = [ids for own in bags for ids in own[rank * count : (rank + 1) * count]]
    lengths = torch.tensor([len(ids) for ids in rows], dtype=torch.int32)
    return KeyedJaggedTensor(keys=list("abc"), values=torch.cat(rows), lengths=lengths)


def assert_equal(found: Any, expected: Any, ids: bool = False, atol: float = 1e-6) -> None:
    """The same keys, in the same order, of the same widths, with equal values."""
    assert list(found.keys()) == list(expected.keys())
    if isinstance(expected, KeyedTensor):
        assert found.length_per_key() == expected.length_per_key()
        assert found.values().dtype == expected.values().dtype
        torch.testing.assert_close(found.values(), expected.values(), rtol=0, atol=atol)
        return
    for key, jagged in expected.items():
        torch.testing.assert_close(found[key].values(), jagged.values(), rtol=0, atol=atol)
        assert torch.equal(found[key].lengths(), jagged.lengths())
        assert torch.equal(found[key].offsets(), jagged.offsets())
        assert (found[key].weights_or_none() is not None) == ids
        assert not ids or torch.equal(found[key].weights(), jagged.weights())


def assert_raw(found: Any, original: Any, kept: dict[str, list[int]], ids: bool = False) -> None:
    """Columns of the kept keys, in the original order."""
    tables = {"a@first": "first", "b": "first", "a@second": "second", "c": "third"}
    keys = [key for key, table in tables.items() if kept[table]]
    assert list(found.keys()) == keys
    for key in keys:
        own = kept[tables[key]]
        if isinstance(original, KeyedTensor):
            assert torch.equal(found[key], original[key][:, own])
        else:
            assert torch.equal(found[key].values(), original[key].values()[:, own])
            assert torch.equal(found[key].lengths(), original[key].lengths())
            assert not ids or torch.equal(found[key].weights(), original[key].weights())


def rotated(plan: sr.DimensionPlan, *tables: str) -> sr.DimensionPlan:
    rotations = {
        name: draw_rotation(own.original_dim, seed).keep(own.kept)
        for seed, (name, own) in enumerate(plan.tables.items())
        if name in tables
    }
    return plan.model_copy(update={"rotations": rotations})


def projected(model: nn.Module, plan: sr.DimensionPlan, kept: dict[str, list[int]]) -> nn.Module:
    """The model with rotated tables projected and the others masked."""
    result = copy.deepcopy(model)
    mask(result, {name: list(range(8)) if name in plan.rotations else own for name, own in kept.items()})
    for name, rotation in plan.rotations.items():
        weight = result.embedding.embedding_bags[name].weight.data
        weight.copy_(project(weight, rotation))
    return result
