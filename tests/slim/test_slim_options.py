"""What can be asked of a slim model, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig

import sseds_rec as sr
from tests.search.zoo import Case, build, make_batch, plain_model
from tests.slim.moves import mask, plan_keeping
from tests.slim.shared import (
    CUTS,
    TABLES,
    Wrapped,
    assert_equal,
    make_features,
    pooled,
    projected,
    rotated,
    sequences,
)
from tests.slim.test_slim_modules import KEPT, NONE


@pytest.mark.parametrize("kept", CUTS)
@pytest.mark.parametrize("weighted", [False, True])
def test_raw_gives_rotated_tables_their_mass_as_last_column(kept: dict[str, list[int]], weighted: bool) -> None:
    model, features = pooled(weighted), make_features(weighted)
    plan = rotated(plan_keeping(model, kept), "first", "third")
    found = sr.slim(model, plan, raw=True)(features)
    original = model(features)
    keys = {"a@first": "first", "b": "first", "a@second": "second", "c": "third"}
    expected = [key for key, table in keys.items() if table != "second" or kept["second"]]
    assert found.keys() == expected
    for key in expected:
        table = keys[key]
        if table == "second":
            assert torch.equal(found[key], original[key][:, kept["second"]])
            continue
        rotation, bags = plan.rotations[table], features[key[0]].to_dense()
        weights = features[key[0]].to_dense_weights() if weighted else [torch.ones(len(own)) for own in bags]
        rows = model.embedding.embedding_bags[table].weight.double() - rotation.mean
        turned = torch.stack(
            [w.double() @ (rows[ids] @ rotation.forward) for ids, w in zip(bags, weights, strict=True)]
        )
        mass = torch.stack([w.double().sum() for w in weights])[:, None] * rotation.mean.norm()
        torch.testing.assert_close(found[key].double(), torch.cat([turned, mass], dim=1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kept", [KEPT, {**NONE, "t1": [2]}, NONE])
def test_rotated_tables_of_rows_that_repeat(kept: dict[str, list[int]]) -> None:
    """Variable batch sizes per feature, and inverse indices."""
    case = Case(repeats=True)
    model, batch = plain_model(case).eval(), make_batch(case)
    plan = rotated(plan_keeping(model, kept), "t0", "t2", "t3")
    expected = projected(model, plan, kept)(batch)[1]
    torch.testing.assert_close(sr.slim(model, plan)(batch)[1], expected, rtol=0, atol=1e-6)


def _bags(widths: dict[str, int], prefix: str = "") -> EmbeddingBagCollection:
    return EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(name=prefix + t, num_embeddings=9, embedding_dim=d, feature_names=list(TABLES[t]))
            for t, d in widths.items()
        ]
    )


def test_all_of_another_width_from_a_random_start() -> None:
    """Of an EmbeddingBagCollection of several widths, and of an EmbeddingCollection."""
    kept = {"first": [1, 2], "second": [0, 3, 5, 6, 7], "third": []}
    for model in (Wrapped(_bags({"first": 8, "second": 16, "third": 4})), sequences()):
        slim = sr.slim(model, plan_keeping(model, kept), init="random", aligned_dim=12)
        found = slim(make_features())
        assert list(found.keys()) == ["a@first", "b", "a@second", "c"]
        columns = [found[key] for key in list(found.keys())]
        columns = [own if isinstance(own, Tensor) else own.values() for own in columns]
        assert [own.shape[1] for own in columns] == [12] * 4
        assert not columns[3].any() and all(own.any() for own in columns[:3])
        sum(own.square().sum() for own in columns).backward()
        gradients = {name: p.grad for name, p in slim.named_parameters()}
        assert len(gradients) == 4 and all(own is not None and own.any() for own in gradients.values())
        for name, p in slim.named_parameters():
            if ".transforms." in name:  # the paper's start
                torch.testing.assert_close(p.T @ p, torch.eye(p.shape[1]))


def test_a_rotated_table_of_another_width_begins_without_its_mean() -> None:
    model, kept = pooled(), CUTS[0]
    plan = rotated(plan_keeping(model, kept), "first")
    slim = sr.slim(model, plan, init="random", aligned_dim=12)
    (transform,) = (p for name, p in slim.named_parameters() if name.endswith("transforms.first"))
    assert transform.shape == (12, 3) and not transform[:, 2].any()
    assert slim(make_features())["a@first"].shape == (4, 12)


def test_the_original_width_may_be_named() -> None:
    model = pooled()
    plan = plan_keeping(model, CUTS[0])
    assert_equal(sr.slim(model, plan, aligned_dim=8)(make_features()), sr.slim(model, plan)(make_features()))


class _Several(nn.Module):
    """Two collections whose tables have equal names, one of them at two paths, and a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.sequence = (
            pooled().embedding,
            _bags({"first": 8, "third": 4}),
            sequences().embedding,
        )
        self.tower = nn.ModuleDict({"again": self.left})

    def forward(self, features: Any) -> tuple[Any, ...]:
        return self.left(features), self.right(features), self.sequence(features), self.tower["again"](features)


def test_several_collections_with_equal_names_and_one_at_two_paths() -> None:
    model = _Several()
    kept = {f"left.{t}": own for t, own in CUTS[0].items()} | {f"sequence.{t}": own for t, own in CUTS[2].items()}
    plan = plan_keeping(model, kept | {"right.first": [], "right.third": []})
    slim, masked = sr.slim(model, plan), copy.deepcopy(model)
    for path, own in {"left": CUTS[0], "sequence": CUTS[2], "right": {name: [] for name in TABLES}}.items():
        mask(masked.get_submodule(path), own)
    for found, expected in zip(slim(make_features()), masked(make_features()), strict=True):
        assert_equal(found, expected)
    assert slim.tower["again"] is slim.left
    state = slim.state_dict()
    assert state["tower.again.embedding_bags.first.weight"] is not None
    assert {name for name in state if "transforms" not in name} == {
        name
        for name in model.state_dict()
        if not name.startswith("right.")
        and "sequence.embeddings.first" not in name
        and "sequence.embeddings.third" not in name
    }
    sr.slim(model, plan, init="random").load_state_dict(state)


def test_frozen_tables_stay_frozen() -> None:
    model = pooled()
    model.embedding.embedding_bags["first"].weight.requires_grad_(False)
    slim = sr.slim(model, plan_keeping(model, CUTS[0]))
    found = {name.split(".")[-2]: p.requires_grad for name, p in slim.named_parameters() if name.endswith(".weight")}
    assert found == {"first": False, "second": True, "third": True}


def test_options_that_exclude_each_other_are_refused() -> None:
    model = pooled()
    plan = plan_keeping(model, CUTS[0])
    with pytest.raises(
        sr.UserError, match=r"^raw=True returns the kept columns, aligned_dim=8 aligns them; choose one$"
    ):
        sr.slim(model, plan, raw=True, aligned_dim=8, init="random")
    with pytest.raises(
        sr.UserError, match=r"^table first: init='select' puts .* in 8, not aligned_dim=12; choose init="
    ):
        sr.slim(model, plan, aligned_dim=12)
    with pytest.raises(sr.UserError, match=r"^aligned_dim=0: "):
        sr.slim(model, plan, init="random", aligned_dim=0)
    with pytest.raises(sr.UserError, match=r"^init='ticket': "):
        sr.slim(model, plan, init="ticket")  # type: ignore[arg-type]
    with pytest.raises(sr.UserError, match="^shard= is for a model that is sharded; shard what slim"):
        sr.slim(model, plan, shard=lambda tree: tree)


def test_plans_of_other_models_are_refused() -> None:
    model = pooled()
    plan = plan_keeping(model, CUTS[0])

    def other(**change: Any) -> sr.DimensionPlan:
        tables = {name: own.model_copy(update=change) if name == "second" else own for name, own in plan.tables.items()}
        return plan.model_copy(update={"tables": tables})

    with pytest.raises(
        sr.UserError, match="^table second has 9 rows x 8 columns, the plan says 10 x 8; the plan is of"
    ):
        sr.slim(model, other(rows=10))
    with pytest.raises(
        sr.UserError, match="^table second has 9 rows x 8 columns, the plan says 9 x 16; the plan is of"
    ):
        sr.slim(model, other(original_dim=16))
    fewer = {name: own for name, own in plan.tables.items() if name != "third"}
    for place, tables in {"model": fewer, "plan": {**plan.tables, "more": plan.tables["first"]}}.items():
        with pytest.raises(sr.UserError, match=f"^table (third|more) is in the {place} only; the plan is of another"):
            sr.slim(model, plan.model_copy(update={"tables": tables}))
    with pytest.raises(sr.UserError, match="holds no EmbeddingBagCollection: there is nothing to be slimmed"):
        sr.slim(nn.Linear(2, 2), plan)


@pytest.mark.parametrize("kind", ["ec", "fp", "mc", "mcec"])
def test_rotated_plans_of_other_modules_are_refused_by_name(kind: str) -> None:
    model = build(Case(kind))
    with pytest.raises(
        sr.UserError, match="^embedding: the plan rotates table t1, which is possible in a plain Embedding"
    ):
        sr.slim(model, rotated(plan_keeping(model, KEPT), "t1"))


def test_quantized_modules_are_refused_by_name() -> None:
    from torchrec.inference.modules import quantize_embeddings

    model = pooled()
    plan = plan_keeping(model, CUTS[0])
    served = quantize_embeddings(copy.deepcopy(model), torch.qint8, inplace=False)
    with pytest.raises(
        sr.UserError,
        match="^embedding: EmbeddingBagCollection cannot be slimmed: it is quantized, for",
    ):
        sr.slim(served, plan)
