"""Slim models and checkpoints against the full model with its dropped columns set to zero."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torchrec.optim
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.models.dlrm import DLRM, DLRMTrain

import sseds_rec as sr
from sseds_rec.distributed.sharding import BagSharder
from sseds_rec.slim.alignment import Alignment
from tests.ranks import run_ranks
from tests.search.reference import FEATURES, TABLES, ClickModel, make_batch, make_rows


def _plan(model: nn.Module, budget: float = 0.3, multiple: int = 4) -> sr.DimensionPlan:
    batch = make_batch(make_rows(60, seed=1), 0, 60)
    scores = sr.score_dimensions(model, [batch], "ggn")
    return sr.allocate(scores, sr.Budget(parameters=budget), multiple=multiple, exponent=0.0)


def _masked(model: nn.Module, plan: sr.DimensionPlan) -> nn.Module:
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for name, table in plan.tables.items():
            mask = torch.zeros(table.original_dim)
            mask[table.kept] = 1
            masked.ebc.embedding_bags[name].weight.mul_(mask)
    return masked


def test_alignment_is_a_product_per_field() -> None:
    torch.manual_seed(0)
    dims = {"a": 4, "b": 8, "c": 4, "d": 12}
    tables = {"a": "shared", "b": "b", "c": "shared", "d": "d"}
    alignment = Alignment(dims, 16, tables)
    embeddings = torch.randn(5, sum(dims.values()), requires_grad=True)
    expected = torch.stack(
        [
            part @ alignment.transforms[tables[name]].T
            for name, part in zip(dims, embeddings.split(list(dims.values()), dim=1), strict=True)
        ],
        dim=1,
    )
    aligned = alignment(embeddings)
    torch.testing.assert_close(aligned, expected)
    weights = torch.randn_like(aligned)
    inputs = [embeddings, *alignment.parameters()]
    ours = torch.autograd.grad((aligned * weights).sum(), inputs)
    torch.testing.assert_close(ours, torch.autograd.grad((expected * weights).sum(), inputs))
    assert {name: tuple(m.shape) for name, m in alignment.transforms.items()} == {
        "shared": (16, 4),
        "b": (16, 8),
        "d": (16, 12),
    }


@pytest.mark.parametrize("multiple", [1, 4])
def test_slim_with_select_equals_the_masked_model(multiple: int) -> None:
    torch.manual_seed(0)
    model = ClickModel().eval()
    plan = _plan(model, multiple=multiple)
    assert 0 in plan.dims().values() or multiple == 1
    slim = sr.slim(model, plan)
    batch = make_batch(make_rows(60, seed=2), 0, 60)
    torch.testing.assert_close(slim(batch)[1], _masked(model, plan)(batch)[1], rtol=0, atol=1e-6)
    stored = {name: p.shape[1] for name, p in slim.ebc.collection.embedding_bags.named_parameters()}
    assert stored == {f"{name}.weight": t.stored_dim for name, t in plan.tables.items() if t.kept}
    original = model.ebc(batch[0])
    assert (
        slim.ebc(batch[0]).keys() == original.keys()
        and slim.ebc(batch[0]).length_per_key() == original.length_per_key()
    )


def test_slim_trains_and_leaves_the_original_alone() -> None:
    torch.manual_seed(0)
    model = ClickModel()
    before = copy.deepcopy(model.state_dict())
    slim = sr.slim(model, _plan(model), init="random")
    optimizer = torch.optim.Adam(slim.parameters(), lr=0.05)
    batch = make_batch(make_rows(60, seed=2), 0, 60)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = slim(batch)[0]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_torchrecs_own_dlrm_runs_unchanged_on_slim_tables() -> None:
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
    from torchrec.datasets.utils import Batch

    torch.manual_seed(0)
    tables = [
        EmbeddingBagConfig(name=f"t_{f}", num_embeddings=30, embedding_dim=8, feature_names=[f]) for f in FEATURES
    ]
    dlrm = DLRMTrain(DLRM(EmbeddingBagCollection(tables=tables), 3, [16, 8], [16, 1]))
    features, labels = make_batch(make_rows(60, seed=2), 0, 60)
    features.values().remainder_(30)
    batch = Batch(dense_features=torch.randn(60, 3), sparse_features=features, labels=labels)
    scores = sr.score_dimensions(dlrm, [batch], "ggn")
    plan = sr.allocate(scores, sr.Budget(parameters=0.5))
    slim = sr.slim(dlrm, plan)
    masked = copy.deepcopy(dlrm)
    with torch.no_grad():
        for name, table in plan.tables.items():
            mask = torch.zeros(8)
            mask[table.kept] = 1
            masked.model.sparse_arch.embedding_bag_collection.embedding_bags[name].weight.mul_(mask)
    torch.testing.assert_close(slim(batch)[1][1], masked(batch)[1][1], rtol=0, atol=1e-6)


def _logits_of_slim_job(rank: int, world_size: int, plan_file: str, checkpoint: str) -> Tensor:
    slim = sr.slim(ClickModel(device="meta"), sr.DimensionPlan.load(plan_file))
    job = DistributedModelParallel(slim, device=torch.device("cpu"), sharders=[BagSharder()])
    state = {"model": job.state_dict()}
    dcp.load(state, checkpoint_id=checkpoint, planner=DefaultLoadPlanner(allow_partial_load=True))
    job.load_state_dict(state["model"])
    rows = make_rows(60, seed=2)
    job.eval()
    first = job(make_batch(rows, 30 * rank, 30 * rank + 30))[1]
    job.train()
    optimizer = torch.optim.SGD([p for name, p in job.named_parameters() if "embedding_bags" not in name], lr=0.1)
    for _ in range(2):
        job(make_batch(rows, 30 * rank, 30 * rank + 30))[0].backward()
        optimizer.step()
    return first


def test_a_sharded_job_starts_from_a_slim_checkpoint_as_the_masked_model(tmp_path: Path) -> None:
    weights = _weights()
    model = ClickModel().eval()
    model.load_state_dict(weights)
    plan = _plan(model)
    plan.save(tmp_path / "plan.json")
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "full")
    sr.slim_checkpoint(tmp_path / "full", tmp_path / "slim", plan)
    parts = run_ranks(2, _logits_of_slim_job, str(tmp_path / "plan.json"), str(tmp_path / "slim"))
    expected = _masked(model, plan)(make_batch(make_rows(60, seed=2), 0, 60))[1]
    torch.testing.assert_close(torch.cat(parts), expected, rtol=0, atol=1e-6)


def test_plans_of_other_models_are_refused() -> None:
    model = ClickModel()
    plan = _plan(model)
    fewer = plan.model_copy(update={"tables": {n: t for n, t in plan.tables.items() if n != "t1"}})
    with pytest.raises(sr.UserError, match="table t1 is in the model only"):
        sr.slim(model, fewer)
    other = plan.model_copy(
        update={"tables": {n: t.model_copy(update={"rows": t.rows + 1}) for n, t in plan.tables.items()}}
    )
    with pytest.raises(sr.UserError, match="table t0 has 50 rows x 8 columns, the plan says 51 x 8"):
        sr.slim(model, other)


def _save_sharded(rank: int, world_size: int, sharding_type: str, weights: dict[str, Tensor], folder: str) -> None:
    model = ClickModel(device="meta")
    apply_optimizer_in_backward(torchrec.optim.RowWiseAdagrad, model.ebc.parameters(), {"lr": 0.1})
    constraints = {name: ParameterConstraints(sharding_types=[sharding_type], min_partition=4) for name in TABLES}
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=world_size, compute_device="cpu"), constraints=constraints
    )
    plan = planner.collective_plan(model, [BagSharder()], dist.GroupMember.WORLD)
    sharded = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=[BagSharder()])
    for name, value in sharded.state_dict().items():
        for shard in value.local_shards() if hasattr(value, "local_shards") else []:
            (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
            shard.tensor.copy_(weights[name][row : row + rows, column : column + columns])
    state = {"model": sharded.state_dict(), "optimizer": sharded.fused_optimizer.state_dict()}
    dcp.save(state, checkpoint_id=folder)


def _weights() -> dict[str, Tensor]:
    torch.manual_seed(4)
    return {name: value.detach().clone() for name, value in ClickModel().state_dict().items()}


@pytest.mark.parametrize("sharding_type", ["table_wise", "row_wise", "column_wise"])
def test_slim_checkpoint_gathers_columns_of_any_sharding(tmp_path: Path, sharding_type: str) -> None:
    weights = _weights()
    model = ClickModel()
    model.load_state_dict(weights)
    plan = _plan(model, multiple=1)
    run_ranks(2, _save_sharded, sharding_type, weights, str(tmp_path / "full"))
    sr.slim_checkpoint(tmp_path / "full", tmp_path / "slim", plan)

    stored = dcp.FileSystemReader(tmp_path / "slim").read_metadata().state_dict_metadata
    tables = {name for name in stored if name.startswith("model.ebc.")}
    assert tables == {f"model.ebc.embedding_bags.{name}.weight" for name, t in plan.tables.items() if t.kept}
    for name, table in plan.tables.items():
        if not table.kept:
            continue
        gathered = {f"model.ebc.embedding_bags.{name}.weight": torch.empty(table.rows, table.stored_dim)}
        dcp.load(gathered, checkpoint_id=tmp_path / "slim")
        (content,) = gathered.values()
        full = weights[f"ebc.embedding_bags.{name}.weight"]
        assert torch.equal(content[:, : len(table.kept)], full[:, table.kept])
        assert not content[:, len(table.kept) :].any()
    over = {f"model.{name}": torch.empty_like(value) for name, value in weights.items() if name.startswith("over.")}
    dcp.load(over, checkpoint_id=tmp_path / "slim")
    full_over = {name: torch.empty_like(value) for name, value in over.items()}
    dcp.load(full_over, checkpoint_id=tmp_path / "full")
    assert all(torch.equal(over[name], full_over[name]) for name in over)


def test_adam_moments_lose_the_same_columns_and_other_state_is_copied(tmp_path: Path) -> None:
    model = ClickModel()
    plan = _plan(model)
    moments = {name: torch.rand_like(model.ebc.embedding_bags[name].weight) for name in TABLES}
    state = {
        "model": model.state_dict(),
        "optimizer": {
            "state": {
                f"ebc.embedding_bags.{n}.weight": {"exp_avg": m, "sum": torch.rand(m.shape[0])}
                for n, m in moments.items()
            }
        },
        "epoch": 3,
    }
    dcp.save(state, checkpoint_id=tmp_path / "full")
    sr.slim_checkpoint(tmp_path / "full", tmp_path / "slim", plan)
    for name, table in plan.tables.items():
        prefix = f"optimizer.state.ebc.embedding_bags.{name}.weight"
        stored = dcp.FileSystemReader(tmp_path / "slim").read_metadata().state_dict_metadata
        assert (f"{prefix}.exp_avg" in stored) == bool(table.kept) == (f"{prefix}.sum" in stored)
        if table.kept:
            entry = {
                f"{prefix}.exp_avg": torch.empty(table.rows, table.stored_dim),
                f"{prefix}.sum": torch.empty(table.rows),
            }
            dcp.load(entry, checkpoint_id=tmp_path / "slim")
            assert torch.equal(entry[f"{prefix}.exp_avg"], moments[name][:, table.kept])
            assert torch.equal(
                entry[f"{prefix}.sum"], state["optimizer"]["state"][f"ebc.embedding_bags.{name}.weight"]["sum"]
            )
    epoch = {"epoch": 0}
    dcp.load(epoch, checkpoint_id=tmp_path / "slim")
    assert epoch["epoch"] == 3


def test_slim_checkpoint_refuses_in_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    model = ClickModel()
    plan = _plan(model)
    with pytest.raises(sr.UserError, match="no checkpoint here"):
        sr.slim_checkpoint(tmp_path / "none", tmp_path / "slim", plan)
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "full")
    wider = {n: t.model_copy(update={"rows": t.rows + 1}) if n == "t1" else t for n, t in plan.tables.items()}
    with pytest.raises(sr.UserError, match=r"table t1: the checkpoint holds \[70, 16\], the plan expects \[71, 16\]"):
        sr.slim_checkpoint(tmp_path / "full", tmp_path / "slim", plan.model_copy(update={"tables": wider}))
    renamed = {f"x{n}": t for n, t in plan.tables.items()}
    with pytest.raises(sr.UserError, match="table xt0 of the plan is not in the checkpoint"):
        sr.slim_checkpoint(tmp_path / "full", tmp_path / "slim", plan.model_copy(update={"tables": renamed}))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes").touch()
    with pytest.raises(sr.UserError, match="there: exists already"):
        sr.slim_checkpoint(tmp_path / "full", tmp_path / "there", plan)
    next((tmp_path / "full").glob("*.distcp")).write_bytes(b"")
    with pytest.raises(sr.UserError, match="it has 0 bytes of at least .*the checkpoint is damaged"):
        sr.slim_checkpoint(tmp_path / "full", tmp_path / "slim", plan)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "there"]
