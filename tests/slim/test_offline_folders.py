"""Checkpoint folders as trainings of any placement save them, converted offline, against plain indexing of what torch reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints

import sseds_rec as sr
from sseds_rec.distributed.managed import managed_collection
from sseds_rec.distributed.sharding import BagSharder
from sseds_rec.training.config import TrainConfig
from sseds_rec.training.optimizers import build_optimizer, fuse_table_optimizer
from tests.ranks import run_ranks
from tests.slim.checkpoints import TABLES, assert_same, entries, gathered, plan_of, weights
from tests.slim.rotations import draw_rotation

SLIM = {name: (rows, -(-len(kept) // 4) * 4, kept) for name, (rows, _, kept) in TABLES.items() if kept}
MIXED = {"a": "row_wise", "b": "table_wise", "c": "column_wise", "d": "column_wise", "e": "row_wise"}


class _Bags(nn.Module):
    """Ids -> a loss whose gradient differs in every row and column."""

    def __init__(self, tables: dict[str, tuple[int, int, list[int]]]) -> None:
        super().__init__()
        configs = [
            EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=d, feature_names=[name])
            for name, (rows, d, _) in tables.items()
        ]
        self.ebc = EmbeddingBagCollection(tables=configs, device=torch.device("meta"))
        self.over = nn.Linear(3, 2)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        found = self.ebc(features).to_dict()
        pooled = torch.cat([found[name] for name in sorted(found)], dim=1)  # sharded, they come in another order
        return (pooled * torch.linspace(0.1, 2, pooled.shape[1])).square().sum() + self.over.weight.square().sum()


def _job(
    world_size: int, placement: str, optimizer: str, tables: dict[str, tuple[int, int, list[int]]] = TABLES
) -> tuple[DistributedModelParallel, Any]:
    """A sharded model and its optimizer, as `sseds train` builds them."""
    torch.manual_seed(0)
    model = _Bags(tables)
    fuse_table_optimizer(model, optimizer, 0.1, placement)  # type: ignore[arg-type]
    kinds = MIXED if placement == "mixed" else dict.fromkeys(tables, placement)
    constraints = {name: ParameterConstraints(sharding_types=[kinds[name]], min_partition=4) for name in tables}
    topology = Topology(world_size=world_size, compute_device="cpu")
    planner = EmbeddingShardingPlanner(topology=topology, constraints=constraints)
    plan = planner.collective_plan(model, [BagSharder()], dist.GroupMember.WORLD)
    sharded = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=[BagSharder()])
    config = TrainConfig(table_optimizer=optimizer, table_learning_rate=0.1)  # type: ignore[arg-type]
    return sharded, build_optimizer(sharded, config)


def _step(model: DistributedModelParallel, optimizer: Any, rank: int, world_size: int) -> None:
    """One step on a batch of 8 that all ranks share."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.stack([torch.randint(0, rows, (8,), generator=draw) for rows, _, _ in TABLES.values()])
    own = ids[:, rank * 8 // world_size : (rank + 1) * 8 // world_size]
    lengths = torch.ones(own.numel(), dtype=torch.int32)
    optimizer.zero_grad()
    model(KeyedJaggedTensor(keys=list(TABLES), values=own.reshape(-1), lengths=lengths)).backward()
    optimizer.step()


def _save(rank: int, world_size: int, placement: str, optimizer: str, folder: str) -> None:
    model, stepper = _job(world_size, placement, optimizer)
    own = weights()
    for name, value in model.state_dict().items():
        if ".embedding_bags." in name:
            table = own[name.split(".")[-2]]
            if not hasattr(value, "local_shards"):
                value.copy_(table)
                continue
            for shard in value.local_shards():
                (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
                shard.tensor.copy_(table[row : row + rows, column : column + columns])
    _step(model, stepper, rank, world_size)
    dcp.save({"model": model.state_dict(), "optimizer": stepper.state_dict()}, checkpoint_id=folder)


def _expected(full: dict[str, Any]) -> dict[str, Any]:
    """What must become of the entries, but for row-wise state of column-wise shards."""
    expected = {}
    for name, value in full.items():
        table = next((t for t in TABLES if f".embedding_bags.{t}.weight" in name), None)
        rows, d, kept = TABLES[table] if table else (0, 0, [0])
        if kept:
            cut = isinstance(value, Tensor) and value.shape == (rows, d)
            expected[name] = gathered(value, kept) if cut else value
    return expected


@pytest.mark.parametrize(
    ("world_size", "placement", "optimizer"),
    [
        (1, "table_wise", "rowwise_adagrad"),
        (1, "data_parallel", "adagrad"),
        (2, "row_wise", "adagrad"),
        (2, "column_wise", "adagrad"),
        (2, "data_parallel", "adam"),
        (4, "row_wise", "rowwise_adagrad"),
        (4, "mixed", "adagrad"),
    ],
)
def test_every_placement_and_optimizer(tmp_path: Path, world_size: int, placement: str, optimizer: str) -> None:
    run_ranks(world_size, _save, placement, optimizer, str(tmp_path / "full"))
    full = entries(tmp_path / "full")
    state = {"rowwise_adagrad": 1, "adagrad": 2, "adam": 2}[optimizer]  # dimensions of the tables' own
    own = [value for name, value in full.items() if "optimizer.state.ebc" in name and isinstance(value, Tensor)]
    assert sum(value.ndim == state for value in own) >= len(TABLES) and any(value.any() for value in own)
    sr.slim_checkpoint(tmp_path / "full", tmp_path / "slim", plan_of())
    assert_same(entries(tmp_path / "slim"), _expected(full))


def _column_shards(folder: Path) -> int:
    entry = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata["model.ebc.embedding_bags.d.weight"]
    assert isinstance(entry, TensorStorageMetadata)
    return len({chunk.offsets[1] for chunk in entry.chunks})


@pytest.mark.parametrize("rotated", [False, True])
def test_row_wise_adagrad_of_column_shards_becomes_that_of_whole_tables(tmp_path: Path, rotated: bool) -> None:
    run_ranks(2, _save, "column_wise", "rowwise_adagrad", str(tmp_path / "columns"))
    run_ranks(2, _save, "table_wise", "rowwise_adagrad", str(tmp_path / "tables"))
    assert _column_shards(tmp_path / "columns") > 1 == _column_shards(tmp_path / "tables")
    turns = {name: draw_rotation(d, 1).keep(kept) for name, (_, d, kept) in TABLES.items()}
    plan = plan_of(rotations=turns if rotated else None)
    for kind in ("columns", "tables"):
        sr.slim_checkpoint(tmp_path / kind, tmp_path / f"slim_{kind}", plan)
    columns, tables = entries(tmp_path / "slim_columns"), entries(tmp_path / "slim_tables")
    states = [name for name in tables if name.endswith(".momentum1")]
    assert len(states) == len(SLIM)
    for name in states:
        assert columns[name].shape == tables[name].shape and tables[name].any()
        torch.testing.assert_close(columns[name], tables[name], rtol=1e-6, atol=0)


def _go_on(rank: int, world_size: int, placement: str, folder: str) -> dict[str, Any]:
    """A slim job of any placement that starts from a slim checkpoint, and what it holds then, by name, in its own shards."""
    model, _ = _job(world_size, placement, "rowwise_adagrad", SLIM)
    state = {"model": model.state_dict(), "optimizer": model.fused_optimizer.state_dict()["state"]}
    names = {"optimizer": {"state": state["optimizer"]}, "model": state["model"]}
    dcp.load(names, checkpoint_id=folder)
    found = {}
    for name, value in {**names["model"], **_flat(names["optimizer"]["state"])}.items():
        for shard in value.local_shards() if hasattr(value, "local_shards") else []:
            found[name, tuple(shard.metadata.shard_offsets)] = shard.tensor.clone()
    return found


def _flat(states: dict[str, Any]) -> dict[str, Any]:
    return {f"{weight}.{name}": value for weight, own in states.items() for name, value in own.items()}


@pytest.mark.parametrize("placement", ["table_wise", "row_wise"])
def test_a_slim_job_of_another_placement_takes_weights_and_state(tmp_path: Path, placement: str) -> None:
    run_ranks(2, _save, "column_wise", "rowwise_adagrad", str(tmp_path / "full"))
    sr.slim_checkpoint(tmp_path / "full", tmp_path / "slim", plan_of())
    slim = entries(tmp_path / "slim")
    found = {
        key: value for part in run_ranks(2, _go_on, placement, str(tmp_path / "slim")) for key, value in part.items()
    }
    assert {name for name, _ in found if "momentum1" in name} == {
        f"ebc.embedding_bags.{name}.weight.{name}.momentum1" for name in SLIM
    }
    for (name, (first, *_)), value in found.items():
        whole = slim[f"optimizer.state.{name}" if "momentum1" in name else f"model.{name}"]
        assert torch.equal(value, whole[first : first + len(value)])


def test_collections_of_the_same_table_names_and_sequences(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    bags = EmbeddingBagCollection(
        tables=[EmbeddingBagConfig(name="t", num_embeddings=9, embedding_dim=8, feature_names=["x"])]
    )
    sequence = EmbeddingCollection(
        tables=[EmbeddingConfig(name="t", num_embeddings=9, embedding_dim=8, feature_names=["y"])]
    )
    model = nn.ModuleDict({"first": bags, "second": sequence, "third": nn.ModuleDict({"second": nn.Linear(8, 9)})})
    sums = torch.rand(9, 8, generator=draw)
    state = {"model": model.state_dict(), "optimizer": {"state": {"second.embeddings.t.weight": {"sum": sums}}}}
    dcp.save(state, checkpoint_id=tmp_path / "full")
    kept = {"first.t": [0, 5, 6, 7], "second.t": [1, 2]}
    sr.slim_checkpoint(tmp_path / "full", tmp_path / "slim", plan_of({n: (9, 8, k) for n, k in kept.items()}))
    full, slim = entries(tmp_path / "full"), entries(tmp_path / "slim")
    expected = {name: gathered(full[name], kept["second.t"]) for name in full if "second.embeddings" in name}
    assert len(expected) == 2
    first = "model.first.embedding_bags.t.weight"
    assert_same(slim, {**full, **expected, first: gathered(full[first], kept["first.t"])})
    sr.slim_checkpoint(tmp_path / "full", tmp_path / "gone", plan_of({"first.t": (9, 8, []), "second.t": (9, 8, [3])}))
    assert entries(tmp_path / "gone").keys() == full.keys() - {first}


def test_maps_of_raw_ids_are_carried_over_and_go_with_their_table(tmp_path: Path) -> None:
    configs = [
        EmbeddingBagConfig(name=name, num_embeddings=16, embedding_dim=8, feature_names=[name]) for name in ("u", "v")
    ]
    managed = managed_collection(configs, is_weighted=False).to_empty(device="cpu")
    draw = torch.Generator().manual_seed(0)
    state = {
        name: torch.randint(0, 1 << 40, value.shape, generator=draw).to(value.dtype)
        for name, value in managed.state_dict().items()
    }
    dcp.save({"model": {f"managed.{name}": value for name, value in state.items()}}, checkpoint_id=tmp_path / "full")
    full = entries(tmp_path / "full")
    tables = {"managed.u": (16, 8, [1, 7]), "managed.v": (16, 8, [])}
    sr.slim_checkpoint(tmp_path / "full", tmp_path / "slim", plan_of(tables))
    weight = "model.managed._embedding_module.embedding_bags.u.weight"
    expected = {name: value for name, value in full.items() if ".v." not in name}
    assert sum("_managed_collision_modules.u." in name for name in expected) > 2 and len(expected) < len(full)
    assert_same(entries(tmp_path / "slim"), {**expected, weight: gathered(full[weight], [1, 7])})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rotated", [False, True])
def test_other_numbers(tmp_path: Path, dtype: torch.dtype, rotated: bool) -> None:
    own = weights(dtype=dtype)
    dcp.save({f"m.embedding_bags.{name}.weight": value for name, value in own.items()}, checkpoint_id=tmp_path / "full")
    turns = {"c": draw_rotation(16, 2).keep(TABLES["c"][2])} if rotated else {}
    sr.slim_checkpoint(tmp_path / "full", tmp_path / "slim", plan_of(rotations=turns))
    slim = entries(tmp_path / "slim")
    for name, (_, _, kept) in TABLES.items():
        if kept and name not in turns:
            assert torch.equal(slim[f"m.embedding_bags.{name}.weight"], gathered(own[name], kept))
    for name, turn in turns.items():
        expected = ((own[name].double() - turn.mean) @ turn.forward).to(dtype)
        found = slim[f"m.embedding_bags.{name}.weight"]
        assert found.dtype == dtype and not found[:, expected.shape[1] :].any()
        torch.testing.assert_close(found[:, : expected.shape[1]], expected)


def test_tables_that_do_not_lie_row_by_row_are_refused(tmp_path: Path) -> None:
    state = {"m.embedding_bags.c.weight": torch.randn(16, 64).T, "n": torch.randn(6, 4).T}
    dcp.save(state, checkpoint_id=tmp_path / "full")
    plan = plan_of({"c": TABLES["c"]})
    with pytest.raises(
        sr.UserError, match=r"distcp: m.embedding_bags.c.weight is not stored row by row; save a contig"
    ):
        sr.slim_checkpoint(tmp_path / "full", tmp_path / "slim", plan)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    dcp.save({**state, "m.embedding_bags.c.weight": weights()["c"]}, checkpoint_id=tmp_path / "again")
    sr.slim_checkpoint(tmp_path / "again", tmp_path / "slim", plan)  # what is copied may lie as it likes
    assert torch.equal(entries(tmp_path / "slim")["n"], state["n"])
