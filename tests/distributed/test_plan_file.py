"""Sharding plans on disk: what is read back is what was placed, and plans of other jobs or tables are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torchrec.distributed.types import ShardingPlan

from sseds_rec.distributed.hardware import Cluster
from sseds_rec.distributed.plan_file import load_plan, plan_file, save_plan
from sseds_rec.distributed.runtime import Runtime
from sseds_rec.distributed.sharding import plan_sharding, shard, sharders_for, table_constraints
from sseds_rec.distributed.sharding_config import ShardingConfig
from sseds_rec.errors import UserError
from sseds_rec.training.optimizers import fuse_table_optimizer
from tests.distributed.test_sharding import ROWS, Bags
from tests.ranks import run_ranks

CPU = torch.device("cpu")
MIXED = {"user": {"types": ["row_wise"]}, "ad": {"types": ["column_wise"]}, "hour": {"types": ["data_parallel"]}}


def _model() -> Bags:
    model = Bags("meta")
    fuse_table_optimizer(model, "adagrad", 0.1, "auto", ["hour"])
    return model


def _planned(cluster: str = "1x2xCPU-8GB") -> tuple[Bags, ShardingConfig, Any, ShardingPlan]:
    model, config = _model(), ShardingConfig.model_validate({"tables": MIXED})
    where = Cluster.parse(cluster).topology()
    device = torch.device(where.compute_device)
    return model, config, where, plan_sharding(model, config, where, 8, sharders_for(config, device))


@pytest.mark.parametrize("cluster", ["1x2xCPU-8GB", "2x2xA100-40GB"])
def test_a_plan_is_read_back_as_it_was(tmp_path: Path, cluster: str) -> None:
    model, config, where, plan = _planned(cluster)
    save_plan(tmp_path / "plan.json", plan_file(plan, model, where.world_size, where.local_world_size))
    again = load_plan(tmp_path / "plan.json", model, where, table_constraints(model, config, where))
    assert again._serialize() == plan._serialize()


def _place(rank: int, world_size: int, path: Path) -> tuple[dict[str, list[list[int]]], dict[str, Any]]:
    """Table -> offsets of what this rank holds, and the plan as a file has it."""
    config = ShardingConfig.model_validate({"tables": MIXED})
    sharded = shard(_model(), config, Runtime(rank, world_size, CPU), 8, str(path))
    held = {
        name.split(".")[-2]: [part.metadata.shard_offsets for part in value.local_shards()]
        for name, value in sharded.state_dict().items()
        if hasattr(value, "local_shards")
    }
    return held, plan_file(sharded.plan, sharded, world_size, world_size).model_dump()


def test_a_job_places_tables_as_the_file_says(tmp_path: Path) -> None:
    model, _, where, plan = _planned()
    path = tmp_path / "plan.json"
    save_plan(path, plan_file(plan, model, where.world_size, where.local_world_size))
    content = json.loads(path.read_text())
    ad = content["modules"]["bags"]["ad"]
    assert [part["rank"] for part in ad["shards"]] == ad["ranks"] == [0, 1]
    ad["ranks"] = [1, 0]
    for part in ad["shards"]:
        part["rank"] = 1 - part["rank"]
    path.write_text(json.dumps(content))
    found = run_ranks(2, _place, path)
    assert [held for held, _ in found] == [
        {"user": [[0, 0]], "ad": [[0, 4]]},
        {"user": [[20, 0]], "ad": [[0, 0]]},
    ]
    assert json.loads(json.dumps(found[0][1])) == content


def _edit(content: dict[str, Any], key: str, value: Any) -> None:
    *above, last = key.split(".")
    inside: Any = content
    for part in above:
        inside = inside[int(part) if part.isdigit() else part]
    if value is None:
        del inside[last]
    else:
        inside[last] = value


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("world_size", 4, "its plan is for 4 ranks, 2 a node; this job has 2, 2 a node"),
        ("modules.bags.user", None, "table user is in the model only"),
        ("modules.bags.ad.rows", 31, "table ad is 31 x 8 in the plan, and 30 x 8 in the model"),
        ("modules.other", {}, "module other is in the plan only"),
        ("modules.bags.user.shards.1.rank", 2, "table user: it is on a rank that 2 ranks do not have"),
        ("modules.bags.user.ranks", [0, 7], "table user: it is on a rank that 2 ranks do not have"),
        ("modules.bags.user.ranks", [1, 0], "table user: its ranks are not those of its shards"),
        ("modules.bags.user.shards.1.shard_offsets", [10, 0], "table user: shard 1 overlaps another"),
        ("modules.bags.user.shards.1.shard_offsets", [-1, 0], "shards.1.shard_offsets.0: Input should be greater"),
        ("modules.bags.user.shards.1.shard_sizes", [19, 16], "table user: its shards do not hold all of it"),
        ("modules.bags.user.shards.1.shard_sizes", [20, 8], "table user: a shard of row_wise has all 16 columns"),
        ("modules.bags.user.shards.1.shard_sizes", [20, 0], "shards.1.shard_sizes.1: Input should be greater"),
        ("modules.bags.user.shards", [], "table user: its ranks are not those of its shards"),
        ("modules.bags.user.sharding_type", "foo", "modules.bags.user.sharding_type: Input should be 'table_wise'"),
        ("modules.bags.user.sharding_type", "table_wise", "table user: table_wise is one shard, not 2"),
        ("modules.bags.user.sharding_type", "column_wise", "table user: a shard of column_wise has all 40 rows"),
        ("modules.bags.user.sharding_type", "data_parallel", "table user: data_parallel goes with no fused optimizer"),
        ("modules.bags.hour.sharding_type", "row_wise", "table hour: row_wise goes with a fused optimizer"),
        ("modules.bags.hour.ranks", [0, 2], "table hour: it is on a rank that 2 ranks do not have"),
        ("modules.bags.user.compute_kernel", "bar", "modules.bags.user.compute_kernel.*: Input should be"),
        (
            "modules.bags.user.compute_kernel",
            "fused_uvm_caching",
            "kernel fused_uvm_caching is none for row_wise on cpu",
        ),
        ("modules.bags.user.compute_kernel", "dense", "table user: kernel dense is none for row_wise"),
        ("modules.bags.user.sharding_type", None, "modules.bags.user.sharding_type: Field required"),
        ("version", 2, "version: Input should be 1"),
    ],
)
def test_plans_of_other_jobs_and_tables_are_refused(tmp_path: Path, key: str, value: Any, message: str) -> None:
    model, config, where, plan = _planned()
    path = tmp_path / "plan.json"
    save_plan(path, plan_file(plan, model, where.world_size, where.local_world_size))
    content = json.loads(path.read_text())
    _edit(content, key, value)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as raised:
        load_plan(path, model, where, table_constraints(model, config, where))
    assert str(raised.value).startswith(f"{path}: ") and "\n" not in str(raised.value)


def test_rows_are_split_as_torchrec_sends_ids(tmp_path: Path) -> None:
    model, config, where, plan = _planned()
    content = plan_file(plan, model, where.world_size, where.local_world_size).model_dump(mode="json")
    user, path = content["modules"]["bags"]["user"], tmp_path / "plan.json"
    first, second = user["shards"]
    for change, message in (
        (
            [{**first, "shard_sizes": [10, 16]}, {**second, "shard_offsets": [10, 0], "shard_sizes": [30, 16]}],
            "not 20 rows from row 0 on",
        ),
        ([{**first, "rank": 1}, {**second, "rank": 0}], "shard 0 of row_wise is not on rank 0 of 2"),
    ):
        user["shards"], user["ranks"] = change, [part["rank"] for part in change]
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            load_plan(path, model, where, table_constraints(model, config, where))


@pytest.mark.parametrize(
    ("kind", "cluster"),
    [
        ("row_wise", "1x3xCPU-8GB"),
        ("row_wise", "2x16xCPU-8GB"),
        ("table_row_wise", "2x3xCPU-8GB"),
        ("grid_shard", "2x2xCPU-8GB"),
        ("table_column_wise", "2x2xCPU-8GB"),
    ],
)
def test_every_plan_of_the_planner_is_taken(tmp_path: Path, kind: str, cluster: str) -> None:
    model, where = Bags("meta"), Cluster.parse(cluster).topology()
    fuse_table_optimizer(model, "adagrad", 0.1, "auto")
    config = ShardingConfig.model_validate({"type": kind, "tables": {name: {"min_partition": 4} for name in ROWS}})
    plan = plan_sharding(model, config, where, 8, sharders_for(config, CPU))
    save_plan(tmp_path / "plan.json", plan_file(plan, model, where.world_size, where.local_world_size))
    again = load_plan(tmp_path / "plan.json", model, where, table_constraints(model, config, where))
    assert again._serialize() == plan._serialize()
