"""Where tables go: every sharding type looks up as a plain module does, and single tables go where the config says."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardingEnv
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from sseds_rec.distributed.hardware import Cluster
from sseds_rec.distributed.plan_file import PlanFile, plan_file
from sseds_rec.distributed.runtime import ALONE, Runtime, runtime
from sseds_rec.distributed.sharders import group_by_width, kernel_width
from sseds_rec.distributed.sharding import plan_sharding, shard, sharders_for
from sseds_rec.distributed.sharding_config import ShardingConfig, TableSharding
from sseds_rec.distributed.tables import training_kernels
from sseds_rec.errors import UserError
from sseds_rec.training.optimizers import fuse_table_optimizer
from tests.ranks import run_ranks
from tests.search.placed import load

ROWS = {"user": 40, "ad": 30, "hour": 24}
DIMS = {"user": 16, "ad": 8, "hour": 32}
COUNT = 12  # rows of the batch, of all ranks together
CPU = torch.device("cpu")


class Bags(nn.Module):
    """Bags of three tables, summed."""

    def __init__(self, device: str) -> None:
        super().__init__()
        tables = [
            EmbeddingBagConfig(name=name, feature_names=[name], num_embeddings=ROWS[name], embedding_dim=DIMS[name])
            for name in ROWS
        ]
        self.bags = EmbeddingBagCollection(tables, device=torch.device(device))

    def forward(self, features: KeyedJaggedTensor) -> dict[str, Tensor]:
        out: dict[str, Tensor] = self.bags(features).to_dict()
        return out


class Sequences(nn.Module):
    """An embedding an id, of three tables of one width."""

    def __init__(self, device: str) -> None:
        super().__init__()
        tables = [
            EmbeddingConfig(name=name, feature_names=[name], num_embeddings=ROWS[name], embedding_dim=8)
            for name in ROWS
        ]
        self.sequences = EmbeddingCollection(tables, device=torch.device(device))

    def forward(self, features: KeyedJaggedTensor) -> dict[str, Tensor]:
        return {name: own.values() for name, own in self.sequences(features).items()}


def _features(rows: slice) -> KeyedJaggedTensor:
    random = torch.Generator().manual_seed(3)
    ids = [torch.randint(0, count, (COUNT,), generator=random)[rows] for count in ROWS.values()]
    return KeyedJaggedTensor(list(ROWS), torch.cat(ids), lengths=torch.ones(sum(map(len, ids)), dtype=torch.int32))


def _step(model: nn.Module, rows: slice) -> dict[str, Tensor]:
    """Outputs before and after one training step on the sum of squares, by feature."""
    before = model(_features(rows))
    sum(value.square().sum() for value in before.values()).backward()  # type: ignore[union-attr]
    return {name: value.detach() for name, value in before.items()}


def _sharded(rank: int, world_size: int, config: ShardingConfig, local: int) -> tuple[dict[str, Tensor], PlanFile]:
    """What a sharded model returns for this rank's rows after one step of SGD, and its plan."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", str(local))
        torch.manual_seed(0)
        plain, model = Bags("cpu"), Bags("meta")
        fuse_table_optimizer(model, "sgd", 0.1, config.type, config.data_parallel_tables)
        place = Runtime(rank, world_size, CPU)
        sharded = shard(model, config, place, COUNT // world_size)
        load(sharded, plain.state_dict())
        rows = slice(rank * COUNT // world_size, (rank + 1) * COUNT // world_size)
        dense = [
            p for n, p in sharded.named_parameters() if p.requires_grad and n not in sharded.fused_optimizer.params
        ]
        optimizer = torch.optim.SGD(dense, lr=0.1) if dense else None
        _step(sharded, rows)
        if optimizer:
            optimizer.step()
        return _step(sharded, rows), plan_file(sharded.plan, sharded, world_size, local)


def _expected(world_size: int) -> dict[str, Tensor]:
    """The same of an unsharded model: gradients of a rank's loss are averaged over ranks."""
    torch.manual_seed(0)
    plain = Bags("cpu")
    _step(plain, slice(None))
    with torch.no_grad():
        for weight in plain.parameters():
            weight -= 0.1 / world_size * weight.grad  # type: ignore[operator]
    return _step(plain, slice(None))


@pytest.mark.parametrize(
    ("kind", "ranks", "local"),
    [
        *[(kind, ranks, ranks) for kind in ("table_wise", "row_wise", "column_wise") for ranks in (1, 2)],
        *[(kind, 4, 2) for kind in ("table_row_wise", "table_column_wise", "grid_shard", "row_wise", "column_wise")],
    ],
)
def test_every_sharding_type_trains_as_a_plain_module_does(kind: str, ranks: int, local: int) -> None:
    config = ShardingConfig.model_validate({"type": kind, "tables": {"user": {"min_partition": 4}}})
    found = run_ranks(ranks, _sharded, config, local)
    assert {placed.sharding_type for _, plan in found for placed in plan.modules["bags"].values()} == {kind}
    _same(found, _expected(ranks))


def test_each_table_goes_where_the_config_says() -> None:
    tables = {"user": {"types": ["column_wise"], "min_partition": 8}, "hour": {"types": ["data_parallel"]}}
    found = run_ranks(2, _sharded, ShardingConfig.model_validate({"type": "row_wise", "tables": tables}), 2)
    placed = found[0][1].modules["bags"]
    assert {name: own.sharding_type for name, own in placed.items()} == {
        "user": "column_wise",
        "ad": "row_wise",
        "hour": "data_parallel",
    }
    assert [part.shard_sizes for part in placed["user"].shards] == [(40, 8), (40, 8)]
    assert (placed["hour"].compute_kernel, placed["hour"].shards) == ("dense", [])
    _same(found, _expected(2))


def _same(found: list[tuple[dict[str, Tensor], PlanFile]], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(torch.cat([ours[name] for ours, _ in found]), value, rtol=1e-5, atol=1e-6)


def _sequences(rank: int, world_size: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    plain, model = Sequences("cpu"), Sequences("meta")
    fuse_table_optimizer(model, "sgd", 0.1, "row_wise")
    sharded = shard(model, ShardingConfig(type="row_wise"), Runtime(rank, world_size, CPU), COUNT // world_size)
    load(sharded, plain.state_dict())
    return _step(sharded, slice(rank * COUNT // world_size, (rank + 1) * COUNT // world_size))


def test_embedding_collections_are_split_too() -> None:
    torch.manual_seed(0)
    expected = _step(Sequences("cpu"), slice(None))
    found = run_ranks(2, _sequences)
    for name, value in expected.items():
        torch.testing.assert_close(torch.cat([ours[name] for ours in found]), value)


class _Grouped(EmbeddingBagCollectionSharder):
    """Groups as `BagSharder` does on CUDA."""

    def shard(self, module: Any, params: Any, env: ShardingEnv, *args: Any, **options: Any) -> Any:
        group_by_width(module, params)
        return super().shard(module, params, env, *args, **options)


def _kernels(sharder: EmbeddingBagCollectionSharder) -> tuple[list[list[int]], dict[str, Tensor]]:
    torch.manual_seed(0)
    plain, model = Bags("cpu"), Bags("meta")
    fuse_table_optimizer(model, "rowwise_adagrad", 0.1, "table_wise")
    with runtime("cpu") as place:
        sharders: Any = [sharder]
        plan = plan_sharding(
            model, ShardingConfig(type="table_wise"), Cluster.parse("1x1xCPU-8GB").topology(), 4, sharders
        )
        sharded = DistributedModelParallel(model, device=place.device, plan=plan, sharders=sharders)
        load(sharded, plain.state_dict())
        _step(sharded, slice(None))
        widths = [sorted(width for _, width, *_ in kernel.embedding_specs) for kernel in training_kernels(sharded)]
        return sorted(widths), _step(sharded, slice(None))


def test_tables_share_a_kernel_only_if_the_same_compiled_one_fits_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DIMS, "ad", 36)
    monkeypatch.setitem(DIMS, "hour", 128)
    together, expected = _kernels(EmbeddingBagCollectionSharder())
    apart, found = _kernels(_Grouped())
    assert (together, apart) == ([[16, 36, 128]], [[16], [36], [128]])
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)
    monkeypatch.setitem(DIMS, "ad", 4)
    assert _kernels(_Grouped())[0] == [[4, 16], [128]]


def test_kernel_width_is_the_next_power_of_two_from_32_on() -> None:
    assert Counter(map(kernel_width, range(4, 260, 4))) == {32: 8, 64: 8, 128: 16, 256: 32}


def _plan(cluster: str, config: dict[str, Any], optimizer: str = "adagrad") -> EmbeddingModuleShardingPlan:
    """The plan of a cluster that is not here."""
    model, own = Bags("meta"), ShardingConfig.model_validate(config)
    fuse_table_optimizer(model, optimizer, 0.1, own.type, own.data_parallel_tables)  # type: ignore[arg-type]
    where = Cluster.parse(cluster).topology()
    plan = plan_sharding(model, own, where, 8, sharders_for(own, torch.device(where.compute_device))).plan["bags"]
    assert isinstance(plan, EmbeddingModuleShardingPlan)
    return plan


def test_kernels_of_host_memory_and_ssd_reach_the_plan() -> None:
    tables = {
        "user": {"kernels": ["fused_uvm_caching"], "cache_load_factor": 0.25},
        "ad": {"kernels": ["key_value"], "types": ["row_wise"], "key_value": {"ssd_storage_directory": "/ssd"}},
    }
    plan = _plan("1x2xA100-40GB", {"tables": tables}, "rowwise_adagrad")
    assert {name: own.compute_kernel for name, own in plan.items()} == {
        "user": "fused_uvm_caching",
        "ad": "key_value",
        "hour": "fused",
    }
    assert plan["user"].cache_params is not None and plan["user"].cache_params.load_factor == 0.25
    assert plan["ad"].key_value_params is not None and plan["ad"].key_value_params.ssd_storage_directory == "/ssd"


def test_a_table_too_large_for_the_gpus_goes_to_host_memory_if_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROWS, "user", 2_000_000_000)
    with pytest.raises(UserError, match="no plan fits 2 x cuda"):
        _plan("1x2xA100-40GB", {})
    kernels = {"user": {"kernels": ["fused", "fused_uvm"]}}
    plan = _plan("1x2xA100-40GB,ddr=512GB", {"tables": kernels})
    assert {name: own.compute_kernel for name, own in plan.items()} == {
        "user": "fused_uvm",
        "ad": "fused",
        "hour": "fused",
    }


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"types": ["data_parallel", "row_wise"]}, "data_parallel goes with no other type"),
        ({"types": ["data_parallel"], "kernels": ["fused_uvm"]}, "data_parallel goes with no other type and no kernel"),
        ({"cache_load_factor": 0.1}, "cache_load_factor is of the kernel fused_uvm_caching"),
        ({"key_value": {"ssd_storage_directory": "/ssd"}}, "key_value goes with the kernels key_value"),
        ({"kernels": ["key_value"], "key_value": {"directory": "/ssd"}}, "KeyValueParams has no directory"),
        ({"min_partition": 6}, "multiple of 4"),
        ({"types": []}, "at least 1 item"),
    ],
)
def test_contradictions_are_refused(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TableSharding.model_validate(table)


@pytest.mark.parametrize(
    ("config", "optimizer", "message"),
    [
        (
            {"tables": {"user": {"kernels": ["fused_uvm"]}}},
            "adagrad",
            r"tables.user.kernels=\['fused_uvm'\]: a CPU job",
        ),
        (
            {"type": "data_parallel", "tables": {"ad": {"types": ["row_wise"]}}},
            "adagrad",
            r"tables.ad.types=\['row_wise'\]: its optimizer here is not fused",
        ),
        (
            {"tables": {"ad": {"types": ["data_parallel"]}}},
            "rowwise_adagrad",
            "tables.ad: data_parallel with train.table",
        ),
    ],
)
def test_what_this_job_cannot_do_is_refused_by_table(config: dict[str, Any], optimizer: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        _plan("1x2xCPU-8GB", config, optimizer)


def test_an_unknown_table_is_refused_with_the_nearest() -> None:
    config = ShardingConfig.model_validate({"tables": {"usr": {"min_partition": 8}}})
    with pytest.raises(UserError, match=r"sharding.tables.usr: there is no such table; did you mean user\?"):
        config.check_tables(list(ROWS))


def test_bf16_is_not_sent_between_cpus() -> None:
    with pytest.raises(UserError, match="comm_precision=bf16"):
        sharders_for(ShardingConfig(comm_precision="bf16"), ALONE.device)
