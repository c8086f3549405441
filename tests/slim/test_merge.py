"""Slim models folded back to one width, and taken apart again, against what they returned before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection

import sseds_rec as sr
from tests.ranks import run_ranks
from tests.search import placed
from tests.search.zoo import TABLES, Case, build, make_batch, plain_model
from tests.slim.moves import plan_keeping
from tests.slim.rotations import draw_rotation

KEPT = {"t0": [0, 3, 6], "t1": list(range(8)), "t2": [1, 2, 5, 7], "t3": []}
WHOLE = {**KEPT, "t3": [4]}


def _plan(kept: dict[str, list[int]], rotated: bool = False) -> sr.DimensionPlan:
    plan = plan_keeping(build(Case(), "meta"), kept)
    if not rotated:
        return plan
    rotations = {name: draw_rotation(8, seed).keep(kept[name]) for seed, name in enumerate(kept) if name != "t2"}
    return sr.DimensionPlan(tables=plan.tables, budget={}, reached={}, rotations=rotations)


def _trained(model: nn.Module, batch: object) -> nn.Module:
    """Moves every weight, so that transform matrices are no longer what they began as."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(batch)[0].backward()
        optimizer.step()
    return model.eval()


CASES = [
    (Case(), KEPT, False),
    (Case(), KEPT, True),
    (Case(pooling="MEAN"), KEPT, True),
    (Case(weighted=True), KEPT, True),
    (Case("ec"), KEPT, False),
    (Case("fp"), WHOLE, False),
    (Case("mc"), WHOLE, False),
]


@pytest.mark.parametrize(("case", "kept", "rotated"), CASES, ids=str)
def test_a_merged_model_is_plain_and_returns_the_same(case: Case, kept: dict[str, list[int]], rotated: bool) -> None:
    torch.manual_seed(0)
    batch = make_batch(case)
    slim = _trained(sr.slim(plain_model(case).eval(), _plan(kept, rotated)), batch)
    merged = sr.merge(slim)
    torch.testing.assert_close(merged(batch)[1], slim(batch)[1], rtol=0, atol=1e-6)
    assert {type(m) for m in merged.modules()} == {type(m) for m in plain_model(case).modules()}
    assert {n: v.shape for n, v in merged.state_dict().items()} == {
        n: v.shape for n, v in plain_model(case).state_dict().items()
    }


@pytest.mark.parametrize("rotated", [False, True])
def test_a_merged_model_is_taken_apart_again(rotated: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    batch = make_batch(Case())
    slim = _trained(sr.slim(plain_model(Case()).eval(), _plan(KEPT, rotated)), batch)
    merged = sr.merge(slim)
    sr.unmerge_plan(slim, _plan(KEPT, rotated)).save(tmp_path / "plan.json")
    again = sr.slim(merged, sr.DimensionPlan.load(tmp_path / "plan.json"))
    torch.testing.assert_close(again(batch)[1], slim(batch)[1], rtol=0, atol=1e-5)
    for name, table in slim.embedding.collection.embedding_bags.items():
        found = again.embedding.collection.embedding_bags[name].weight
        torch.testing.assert_close(found[:, : len(KEPT[name])], table.weight[:, : len(KEPT[name])], rtol=0, atol=1e-5)
    # And offline, of a checkpoint of the merged model.
    dcp.save({"model": merged.state_dict()}, checkpoint_id=tmp_path / "merged")
    sr.slim_checkpoint(tmp_path / "merged", tmp_path / "again", sr.DimensionPlan.load(tmp_path / "plan.json"))
    state = {"model": {n: torch.empty_like(v) for n, v in again.state_dict().items() if ".widening." not in n}}
    dcp.load(state, checkpoint_id=tmp_path / "again")
    for name, value in state["model"].items():
        torch.testing.assert_close(value, again.state_dict()[name], rtol=0, atol=1e-6)


def test_other_widths_are_merged_to_the_one_they_are_aligned_to() -> None:
    torch.manual_seed(0)
    slim = sr.slim(plain_model(Case()).embedding, _plan(KEPT), init="random", aligned_dim=12)
    merged = sr.merge(slim)
    assert isinstance(merged, EmbeddingBagCollection)
    assert {config.embedding_dim for config in merged.embedding_bag_configs()} == {12}
    features, _ = make_batch(Case())
    torch.testing.assert_close(merged(features).values(), slim(features).values(), rtol=0, atol=1e-6)


def _live(rank: int, world_size: int, case: Case, rotated: bool) -> tuple[Tensor, Tensor]:
    """Logits of a slim model and of the merged one, both sharded."""
    types = dict(zip(TABLES, ["table_wise", "row_wise", "column_wise", "row_wise"], strict=True))
    kept = [name for name in TABLES if KEPT[name]]
    slim = placed.shard(sr.slim(build(case, "meta"), _plan(KEPT, rotated)), {name: types[name] for name in kept})
    torch.manual_seed(3)
    weights = {name: torch.randn(value.size()) * 0.5 for name, value in sorted(slim.state_dict().items())}
    for name, plan in _plan(KEPT).tables.items():
        if plan.kept:
            weights[next(n for n in weights if n.endswith(f".{name}.weight"))][:, len(plan.kept) :] = 0
    placed.load(slim, weights)
    targets = dict(zip(TABLES, ["row_wise", "column_wise", "table_wise", "row_wise"], strict=True))
    merged = sr.merge(slim, shard=lambda model: placed.shard(model, targets))
    batch = make_batch(case, rank * 20, rank * 20 + 20)
    return slim.eval()(batch)[1], merged.eval()(batch)[1]


@pytest.mark.parametrize(("case", "rotated"), [(Case(), False), (Case(), True), (Case("ec"), False)], ids=str)
def test_sharded_models_are_merged_from_shard_to_shard(case: Case, rotated: bool) -> None:
    for slim, merged in run_ranks(2, _live, case, rotated):
        torch.testing.assert_close(merged, slim, rtol=1e-6, atol=2e-6)


def test_what_cannot_be_merged_is_refused_by_name() -> None:
    model = plain_model(Case())
    with pytest.raises(sr.UserError, match="Click holds no collection that slim"):
        sr.merge(model)
    with pytest.raises(sr.UserError, match=r"embedding: it returns raw columns \(raw=True\)"):
        sr.merge(sr.slim(model, _plan(KEPT), raw=True))
    with pytest.raises(sr.UserError, match="embedding: FBGEMM stores no tables of aligned_dim=6"):
        sr.merge(sr.slim(model, _plan(KEPT), init="random", aligned_dim=6))
    with pytest.raises(sr.UserError, match="embedding: what processed or remapped the ids of the dropped table t3"):
        sr.merge(sr.slim(plain_model(Case("fp")), _plan(KEPT)))
    with pytest.raises(sr.UserError, match="embedding: tables of an EmbeddingCollection cannot be rotated"):
        sr.unmerge_plan(sr.slim(plain_model(Case("ec")), _plan(KEPT)), _plan(KEPT))
