"""What live models have besides: an order of keys of their own, learning rates of a schedule, collections anywhere."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.models.dlrm import DLRM

import sseds_rec as sr
from tests.ranks import run_ranks
from tests.search import placed
from tests.search.zoo import TABLES, Case, build, make_batch, plain_model, weights_of
from tests.slim.moves import mask, plan_keeping

KEPT = {"t0": [0, 3, 6], "t1": list(range(8)), "t2": [1, 2, 5, 7], "t3": []}


def _in_the_order_of_its_plan(rank: int, world_size: int) -> tuple[list[str], list[str], Tensor, Tensor]:
    types = dict(zip(TABLES, ["table_wise", "row_wise", "table_wise", "row_wise"], strict=True))
    full = placed.shard(build(Case(), "meta"), types)
    placed.load(full, weights_of(Case()))
    plan = plan_keeping(build(Case(), "meta"), KEPT)
    slim = sr.slim(full, plan)
    features, _ = make_batch(Case(), rank * 20, rank * 20 + 20)
    original, found = full.module.embedding(features).wait(), slim.module.embedding(features)
    masked = plain_model(Case())
    mask(masked, KEPT)
    expected = masked.embedding(features).to_dict()
    return original.keys(), found.keys(), found.values(), torch.cat([expected[key] for key in original.keys()], dim=1)  # noqa: SIM118


def test_a_sharded_originals_order_of_keys_is_kept() -> None:
    for original, found, values, expected in run_ranks(2, _in_the_order_of_its_plan):
        assert found == original != sorted(original)
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-6)


class _Nested(nn.Module):
    """Two collections with a table of one name, of which one's path ends as the other's does."""

    def __init__(self, inner_first: bool) -> None:
        super().__init__()
        for name in ("tower", "ebc") if inner_first else ("ebc", "tower"):
            table = EmbeddingBagConfig(
                name="t", num_embeddings=12, embedding_dim=8 if name == "ebc" else 4, feature_names=["f0"]
            )
            own = EmbeddingBagCollection(tables=[table])
            self.add_module(name, own if name == "ebc" else nn.ModuleDict({"ebc": own}))


def test_a_path_that_ends_as_another_is_another(tmp_path: Path) -> None:
    kept = {"ebc.t": [1, 2, 4, 6], "tower.ebc.t": [0, 1, 2, 3]}
    for inner_first in (True, False):
        model = _Nested(inner_first)
        folder = tmp_path / str(inner_first)
        dcp.save({"model": model.state_dict()}, checkpoint_id=folder)
        sr.slim_checkpoint(folder, tmp_path / f"{inner_first}-slim", plan_keeping(model, kept))
        found = {f"model.{path}.embedding_bags.t.weight": torch.empty(12, 4) for path in ("ebc", "tower.ebc")}
        dcp.load(found, checkpoint_id=tmp_path / f"{inner_first}-slim")
        weight = model.ebc.embedding_bags["t"].weight
        assert torch.equal(found["model.ebc.embedding_bags.t.weight"], weight[:, [1, 2, 4, 6]])


def _at_the_root(rank: int, world_size: int, kept: dict[str, list[int]]) -> tuple[Tensor, Tensor]:
    """What a collection that is the whole model returns, slimmed live, and merged again."""
    full = placed.shard(build(Case(), "meta").embedding, dict.fromkeys(TABLES, "table_wise"))
    weights = {name.removeprefix("embedding."): value for name, value in weights_of(Case()).items()}
    placed.load(full, {name: value for name, value in weights.items() if not name.startswith("over.")})
    slim = sr.slim(full, plan_keeping(build(Case(), "meta").embedding, kept))
    merged = sr.merge(slim, shard=lambda model: placed.shard(model, dict.fromkeys(TABLES, "row_wise")))
    features, _ = make_batch(Case(), rank * 20, rank * 20 + 20)
    found, again = slim(features), merged(features).wait()
    return found.values(), torch.cat([again[key] for key in found.keys()], dim=1)  # noqa: SIM118


def test_a_collection_can_be_the_whole_model_and_lose_all_its_tables() -> None:
    for kept in (KEPT, {name: [] for name in KEPT}):
        for slim, merged in run_ranks(2, _at_the_root, kept):
            torch.testing.assert_close(merged, slim, rtol=0, atol=1e-6)
            assert bool(slim.any()) == (kept is KEPT)


def _learning_rates(rank: int, world_size: int) -> list[float]:
    model = build(Case(), "meta")
    tables = [p for name, p in model.named_parameters() if ".embedding_bags." in name]
    apply_optimizer_in_backward(torch.optim.Adagrad, tables, {"lr": 0.5})
    full = placed.shard(model, dict.fromkeys(TABLES, "table_wise"))
    for group in full.fused_optimizer.param_groups:
        group["lr"] = 0.01
    full.fused_optimizer.step()
    slim = sr.slim(full, plan_keeping(build(Case(), "meta"), KEPT))
    return [group["lr"] for group in slim.fused_optimizer.param_groups]


def test_the_learning_rate_is_what_a_schedule_has_left() -> None:
    found = run_ranks(2, _learning_rates)
    assert any(found) and all(abs(rate - 0.01) < 1e-8 for own in found for rate in own)


def test_a_model_can_be_built_around_a_slim_collection() -> None:
    collection = plain_model(Case()).embedding
    slim = sr.slim(collection, plan_keeping(collection, KEPT))
    features, _ = make_batch(Case())
    dense = torch.randn(features.stride(), 3)
    torch.manual_seed(0)
    built = DLRM(slim, 3, [4, 8], [4, 1])
    masked = plain_model(Case())
    mask(masked, KEPT)
    torch.manual_seed(0)
    expected = DLRM(masked.embedding, 3, [4, 8], [4, 1])
    torch.testing.assert_close(built(dense, features), expected(dense, features), rtol=0, atol=1e-6)
    raw = sr.slim(collection, plan_keeping(collection, KEPT), raw=True)
    assert {config.name: config.embedding_dim for config in raw.embedding_bag_configs()} == {"t0": 3, "t1": 8, "t2": 4}
