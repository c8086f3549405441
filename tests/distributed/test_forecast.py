"""What tables take on clusters that are not here, against bytes counted by hand and against TorchRec's planner itself."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sseds_rec as sr
from sseds_rec.config import load_config
from sseds_rec.data.schema import Schema
from sseds_rec.distributed.capacity import forecast, place_in_more, smallest_cluster
from sseds_rec.distributed.dry_plan import fits, place
from sseds_rec.distributed.hardware import MARGIN, Cluster
from sseds_rec.distributed.plan_file import load_plan
from sseds_rec.distributed.sharding import table_constraints
from sseds_rec.distributed.sharding_config import ShardingConfig
from sseds_rec.distributed.workload import Shape, Workload, tables_only
from sseds_rec.models.ctr import build_model, build_slim_model, plan_for
from sseds_rec.output import console
from tests.command import Command
from tests.search.problems import STATES, make_scores

Sseds = Callable[..., Command]

#: 1B + 400M + 100M + 10 x 10M + 26 x 100k rows.
BILLION = [10**9, 4 * 10**8, 10**8, *[10**7] * 10, *[10**5] * 26]
GIB = 2**30


def _adam(rows: list[int], dim: int, kind: str = "auto") -> Workload:
    made = tables_only([Shape(n, dim) for n in rows], "adam", "fp32", 64)
    return replace(made, sharding=ShardingConfig(type=kind))


@pytest.fixture(scope="module")
def billion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the billion-ID tables, 128 wide, and a plan that keeps a tenth of their parameters."""
    folder = tmp_path_factory.mktemp("billion")
    tables = [{"name": f"t{i}", "num_embeddings": n, "embedding_dim": 128} for i, n in enumerate(BILLION)]
    (folder / "tables.json").write_text(json.dumps(tables))
    scores = make_scores([[(j % 7 + 1) / (i + j + 1) for j in range(128)] for i in range(39)], BILLION)
    sr.allocate(scores, sr.Budget(parameters=0.1)).save(folder / "plan.json")
    return folder


@pytest.mark.parametrize(("cluster", "base"), [("2x8xH100-80GB", False), ("4x8xA100-80GB", True)])
def test_billion_ids(cluster: str, base: bool, billion: Path, sseds: Sseds, tmp_path: Path) -> None:
    figure = tmp_path / "memory.svg"
    done = sseds(
        "forecast",
        billion / "tables.json",
        "--plan",
        billion / "plan.json",
        "--cluster",
        cluster,
        "--figure",
        figure,
        "--json",
    )
    assert done.code == 0, done.err
    found = done.json
    assert (found["base"]["fits"], found["slim"]["fits"]) == (base, True)
    assert found["base"]["smallest_cluster"] == f"4x8x{cluster[4:]}" and found["slim"]["smallest_devices"] <= 8
    assert found["ratio"]["devices"] == 32 / found["slim"]["smallest_devices"]
    assert found["base"]["weight_bytes"] == sum(BILLION) * 128 * 4
    assert found["base"]["optimizer_bytes"] == 2 * found["base"]["weight_bytes"]
    assert found["ratio"]["table_bytes"] == pytest.approx(10, rel=1e-3)
    ranks, memory = Cluster.parse(cluster).world_size, Cluster.parse(cluster).device.hbm
    for model in ("base", "slim"):
        parts = found[model]["bytes_per_rank"]
        # No table is on two ranks: what all hold is every table once.
        assert ranks * parts["weights"]["mean"] == pytest.approx(found[model]["weight_bytes"], rel=1e-12)
        assert ranks * parts["optimizer"]["mean"] == pytest.approx(found[model]["optimizer_bytes"], rel=1e-12)
        assert found[model]["fits"] == (parts["memory"]["max"] <= memory) == (found[model]["over_bytes"] == 0)
        step = found[model]["step_ms"]
        assert step["total"] == pytest.approx(sum(time for name, time in step.items() if name != "total"))
        assert sum(found[model]["sharding_types"].values()) == found[model]["tables"]
    drawing = figure.read_text()
    assert drawing.count("<svg") == 1 and "fits" in drawing and "base on" in drawing and "slim on" in drawing


def test_a_tenth_of_a_billion_ids_fits_one_node(billion: Path) -> None:
    plan = sr.DimensionPlan.load(billion / "plan.json")
    shapes = [Shape(table.rows, table.stored_dim) for table in plan.tables.values()]
    assert fits(tables_only(shapes, "adam", "fp32", 2048), Cluster.parse("1x8xH100-80GB"))


def test_128_gpus_in_under_2_gib(billion: Path) -> None:
    code = """
import resource, runpy, sys, time
sys.argv = ["sseds", *sys.argv[1:]]
try:
    runpy.run_module("sseds_rec", run_name="__main__")
except SystemExit as ended:
    assert not ended.code
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, time.process_time())
"""
    arguments = ["forecast", billion / "tables.json", "--cluster", "16x8xH100-80GB", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    *_, line, used = done.stdout.splitlines()
    assert json.loads(line)["base"]["fits"]
    memory, seconds = map(float, used.split())
    assert memory < 2 * GIB
    assert seconds < 60


def test_row_wise_tables_by_hand() -> None:
    rows, dim, cluster = [6000, 1200, 60], 16, Cluster.parse("3x2xhbm=2MB")
    found = place(_adam(rows, dim, "row_wise"), cluster)
    assert found is not None and found.sharding_types == {"row_wise": 3}
    assert found.memory["weights"].tolist() == [sum(n // 6 for n in rows) * dim * 4] * 6
    assert found.memory["optimizer"].tolist() == [sum(n // 6 for n in rows) * dim * 8] * 6
    assert found.memory["margin"].tolist() == [cluster.device.hbm - int((1 - MARGIN) * cluster.device.hbm)] * 6
    # Of each rank and table 64 ids of 8 bytes, and the pooled rows of all six ranks; 20 copies of 3 x 64 ids of input.
    assert found.memory["lookups"].tolist() == [3 * (64 * 8 + 6 * 64 * dim * 4)] * 6
    assert (found.memory["dense"] - 20 * 3 * 64 * 8).tolist() == [1] * 6


def test_table_wise_tables_are_whole() -> None:
    found = place(_adam([500, 400, 300], 8, "table_wise"), Cluster.parse("1x3xhbm=1MB"))
    assert found is not None
    assert sorted(found.memory["weights"].tolist()) == [300 * 32, 400 * 32, 500 * 32]


@pytest.mark.parametrize("optimizer", list(STATES))
@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("fp16", 2), ("bf16", 2)])
def test_optimizer_states_are_those_of_fbgemm(optimizer: Any, precision: Any, size: int) -> None:
    wide, single = STATES[optimizer]
    rows, dim, batch = 1000, 24, 16
    made = tables_only([Shape(rows, dim)], optimizer, precision, batch)
    found = place(made, Cluster.parse("1x1xhbm=4MB"))
    assert found is not None
    assert found.memory["weights"].tolist() == [rows * dim * size]
    assert found.memory["optimizer"].tolist() == [rows * (dim * wide + single) * 4]
    assert found.memory["lookups"].tolist() == [batch * (8 + dim * size)]
    tight = int((found.used - found.memory["margin"]).max() / (1 - MARGIN))
    assert fits(made, Cluster.parse(f"1x1xhbm={tight + 2}B")) and not fits(made, Cluster.parse(f"1x1xhbm={tight - 2}B"))


def test_rowwise_states_of_column_wise_shards() -> None:
    made = tables_only([Shape(1000, 16)], "rowwise_adagrad", "fp32", 4)
    found = place(replace(made, sharding=ShardingConfig(type="column_wise")), Cluster.parse("1x4xhbm=4MB"))
    assert found is not None
    assert found.memory["weights"].tolist() == [1000 * 4 * 4] * 4
    assert found.memory["optimizer"].tolist() == [1000 * 4] * 4  # each shard has a number of its own for each row


tiny = st.tuples(
    st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 16).map(lambda n: 4 * n)), min_size=1, max_size=4),
    st.integers(1, 2),
    st.integers(1, 4),
    st.integers(50, 3000),
)


@settings(max_examples=20, deadline=None)
@given(tiny)
def test_a_plan_is_within_memory_and_found_by_either_way(
    drawn: tuple[list[tuple[int, int]], int, int, int],
) -> None:
    tables, nodes, devices, kib = drawn
    cluster = Cluster.parse(f"{nodes}x{devices}xhbm={kib}KiB")
    made = tables_only([Shape(*table) for table in tables], "adam", "fp32", 8)
    found = place(made, cluster)
    assert fits(made, cluster) == (found is not None)
    if found is None:
        more = place_in_more(made, cluster)
        assert more.used.max() > cluster.device.hbm
        assert more.memory["margin"].tolist() == [cluster.device.margin] * cluster.world_size
    else:
        assert found.used.max() <= cluster.device.hbm
        assert found.memory["weights"].sum() == sum(n * d * 4 for n, d in tables)
        assert found.memory["optimizer"].sum() == sum(n * d * 8 for n, d in tables)


def test_as_many_devices_with_just_enough_memory() -> None:
    made = _adam([10_000] * 6, 32)
    cluster = Cluster.parse("1x4xhbm=1MB")
    assert place(made, cluster) is None
    need = int(place_in_more(made, cluster).used.max() - cluster.device.margin)
    # A memory of which the margin is a part.
    assert fits(made, Cluster.parse(f"1x4xhbm={int(need / (1 - MARGIN)) + 2}B"))
    assert not fits(made, Cluster.parse(f"1x4xhbm={int(0.97 * need / (1 - MARGIN))}B"))


@pytest.mark.parametrize("megabytes", [2, 3, 5, 8, 13, 21, 60])
def test_smallest_cluster_by_trying_all(megabytes: int) -> None:
    made, like = _adam([10_000] * 6, 64), Cluster.parse(f"1x4xhbm={megabytes}MB")
    sizes = [replace(like, per_node=1), replace(like, per_node=2), *(replace(like, nodes=n) for n in range(1, 12))]
    assert smallest_cluster(made, like) == next((size for size in sizes if fits(made, size)), None)


def test_no_cluster_is_large_enough() -> None:
    assert smallest_cluster(_adam([10**9], 128), Cluster.parse("1x1xhbm=1GB")) is None


def test_what_fits_the_asked_cluster_has_a_smallest_one() -> None:
    """More than the 64 nodes that are tried otherwise."""
    made = tables_only([Shape(660_000, 64)], "adam", "fp32", 1)
    made, like = replace(made, sharding=ShardingConfig(type="row_wise")), Cluster.parse("68x1xhbm=8150KB")
    found = forecast(made, like)
    assert found.fits and smallest_cluster(made, like) is None
    assert found.smallest == next(size for n in range(60, 69) if fits(made, size := replace(like, nodes=n)))
    assert found.smallest.nodes == 66


@pytest.mark.parametrize("width", [80, 60])
def test_no_number_is_cut_off(width: int, billion: Path, sseds: Sseds, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small parts have long numbers, and a device hundreds of times too small the shortest bar."""
    monkeypatch.setattr(console, "width", width)
    done = sseds("forecast", billion / "tables.json", "--plan", billion / "plan.json", "--cluster", "1x1xT4", "--json")
    assert done.code == 0, done.err
    start, end = done.out.index("\u250f"), done.out.index("\u2518")
    lines = done.out[start:end].splitlines()
    assert max(map(len, lines)) <= width and "\u2026" not in done.out
    cells = [[cell.split() for cell in line.split("\u2502")[2:4]] for line in lines if line.startswith("\u2502")]
    for model, column in (("base", 0), ("slim", 1)):
        words = [word for row in cells for word in row[column]]
        fullest = done.json[model]["bytes_per_rank"]["memory"]["max"]
        assert words.count(f"{fullest / GIB:,.1f}") == 3  # min, mean, max of one rank
        assert words.count("0.01") == 3 and f"{done.json[model]['over_bytes'] / GIB:,.2f}" in words
    assert "\n      \u25b2 the device has 14.56 GiB" in done.out


def test_all_memory_of_a_cpu_is_for_tables(tmp_path: Path, sseds: Sseds) -> None:
    (tmp_path / "tables.json").write_text(json.dumps([{"name": "a", "num_embeddings": 100, "embedding_dim": 8}]))
    figures = {}
    for cluster in ("1x2xCPU-24MB", "1x2xhbm=24MB"):
        figure = tmp_path / "memory.svg"
        done = sseds("forecast", tmp_path / "tables.json", "--cluster", cluster, "--figure", figure)
        assert done.code == 0 and "2 ranks of 22.89 MiB" in done.out, done.err
        figures[cluster] = (done.out.count("margin"), "allocator" in figure.read_text())
        assert "MiB of a rank" in figure.read_text()
    assert figures == {"1x2xCPU-24MB": (0, False), "1x2xhbm=24MB": (2, True)}


@pytest.mark.parametrize("cluster", ["1x2xCPU-1GB", "2x2xT4"])
def test_the_model_of_a_config(cluster: str, config: Path, finished_run: Path, sseds: Sseds, tmp_path: Path) -> None:
    """On a CPU Adam's tables are on every rank, with a gradient and two moments; on CUDA they are split."""
    plan = finished_run / "search/plan.json"
    options = ["--plan", plan, "--cluster", cluster, "--save-plans", tmp_path, "--json"]
    done = sseds("forecast", config, "train.batch_size=1024", *options)
    assert done.code == 0, done.err
    settings, ranks = load_config(config), Cluster.parse(cluster).world_size
    schema = Schema.load(settings.data.path)
    own = plan_for(settings.model, schema, sr.DimensionPlan.load(plan))
    models = {
        "base": build_model(settings.model, schema),
        "slim": build_slim_model(settings.model, schema, own, "select"),
    }
    for name, model in models.items():
        found = done.json[name]
        sizes = {key: p.numel() for key, p in model.named_parameters()}
        tables = sum(size for key, size in sizes.items() if ".embedding_bags." in key)
        over = sum(sizes.values()) - tables
        buffers = sum(b.numel() * b.element_size() for b in model.buffers())
        features = len(schema.sparse_fields) if name == "base" else found["tables"]
        ids = 20 * features * 1024 // ranks * 8
        replicated = tables * 12 if "CPU" in cluster else 0
        assert found["batch_size_per_rank"] == 1024 // ranks
        assert found["bytes_per_rank"]["dense"]["max"] == over * 16 + buffers + ids + replicated
        assert found["bytes_per_rank"]["weights"]["mean"] * ranks == tables * 4 * (ranks if "CPU" in cluster else 1)
        assert found["weight_bytes"] == tables * 4
        # The job can be told to place its tables so.
        where = Cluster.parse(cluster).topology()
        kind = ShardingConfig(type="data_parallel" if "CPU" in cluster else "auto")
        saved = load_plan(tmp_path / f"{name}_sharding_plan.json", model, where, table_constraints(model, kind, where))
        assert {own.sharding_type for own in saved.plan["embeddings"].values()} == set(found["sharding_types"])


def test_a_prepared_set_needs_a_width(prepared: Path, sseds: Sseds) -> None:
    done = sseds("forecast", prepared, "--cluster", "1x1xT4", "--embedding-dim", 32, "--optimizer", "sgd", "--json")
    rows = sum(field.cardinality or 0 for field in Schema.load(prepared).sparse_fields)
    assert done.code == 0, done.err
    assert (done.json["base"]["weight_bytes"], done.json["base"]["optimizer_bytes"]) == (rows * 32 * 4, 0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["CONFIG", "--cluster", "1x8xH10"], "no device named 'H10', did you mean H100-80GB?"),
        (
            ["CONFIG", "--cluster", "1x8xH100", "--batch-size", "64"],
            "--batch-size is for lists of tables; set train.batch_size",
        ),
        (["CONFIG", "--cluster", "1x8xH100", "--precision", "fp16"], "--precision is for lists of tables"),
        (["CONFIG", "--cluster", "1x8xH100", "--plan", "PLAN"], "the plan is of another data set"),
        (
            ["CONFIG", "--cluster", "1x8xH100", "--figure", "memory.jpg"],
            "--figure memory.jpg: the name ends in none of .svg",
        ),
        (["CONFIG", "--cluster", "1x8xH100", "--figure", "nowhere/memory.svg"], "there is no folder nowhere"),
        (
            ["CONFIG", "--cluster", "1x8xH100", "--save-plans", "nowhere"],
            "--save-plans nowhere: there is no such folder",
        ),
        (
            ["CONFIG", "sharding.tables.usr.types=[row_wise]", "--cluster", "1x8xH100"],
            "sharding.tables.usr: there is no such table; did you mean",
        ),
        (
            ["CONFIG", "sharding.base_plan=p.json", "--cluster", "1x8xH100"],
            "sharding.base_plan: a forecast makes its own",
        ),
        (
            ["CONFIG", "sharding.slim_plan=p.json", "--cluster", "1x8xH100"],
            "sharding.slim_plan: a forecast makes its own",
        ),
        (["CONFIG", "--cluster", "1x3xH100"], "train.batch_size=256 does not divide by the 3 ranks of 1x3xH100-80GB"),
        (["SET", "--cluster", "1x8xH100", "--embedding-dim", "8196"], "less than or equal to 8192"),
        (["SET", "--cluster", "1x8xH100"], "has no embedding_dim; give --embedding-dim"),
        (["SET", "--cluster", "1x8xH100", "--embedding-dim", "8", "--plan", "PLAN"], "is of other tables"),
        (["SET", "train.epochs=1", "--cluster", "1x8xH100"], "train.epochs=1: values are changed in a config"),
        (["PLAN", "--cluster", "1x8xH100"], "is neither a list of tables nor the schema.json of a prepared set"),
        (["nowhere.json", "--cluster", "1x8xH100"], "nowhere.json: no such file"),
        (["nowhere.yaml", "--cluster", "1x8xH100"], "nowhere.yaml: no such config file"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], says: str, config: Path, prepared: Path, billion: Path, sseds: Sseds
) -> None:
    places = {"CONFIG": config, "SET": prepared, "PLAN": billion / "plan.json"}
    done = sseds("forecast", *(places.get(argument, argument) for argument in arguments))
    assert done.code == 2 and says in done.err and len(done.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("tables", "says"),
    [
        ([], "there is no table in it"),
        ([{"name": "a"}], "0.num_embeddings: Field required"),
        ([{"name": "a", "num_embeddings": 0}], "0.num_embeddings: Input should be greater than or equal to 1"),
        ([{"name": "a", "num_embeddings": 10**30}], "0.num_embeddings: Input should be less than or equal to"),
        ([{"name": "a", "num_embeddings": 5, "embedding_dim": 2**31}], "0.embedding_dim: Input should be less than"),
        ([{"name": "a", "num_embeddings": 5, "embedding_dim": 4}] * 2, "there are two tables named a"),
    ],
)
def test_bad_lists_of_tables(tables: list[dict[str, Any]], says: str, tmp_path: Path, sseds: Sseds) -> None:
    (tmp_path / "tables.json").write_text(json.dumps(tables))
    done = sseds("forecast", tmp_path / "tables.json", "--cluster", "1x1xT4")
    assert done.code == 2 and says in done.err and len(done.err.strip().splitlines()) == 1


def test_raw_ids_and_tables_in_host_memory(tmp_path: Path, sseds: Sseds) -> None:
    """A billion raw ids have a map of three int64 a row, split over the ranks; a table in host memory takes none of a GPU's."""
    rows = {"user": 10**9, "ad": 4 * 10**8}
    fields = [
        {"name": name, "kind": "categorical", "transform": kind, "cardinality": n}
        for (name, n), kind in zip(rows.items(), ("raw", "hash"), strict=True)
    ]
    splits = {name: {"rows": 10**6, "positives": 1, "files": []} for name in ("train", "validation", "test")}
    schema = {"version": 1, "label": "y", "seed": 0, "source": {}, "fields": fields, "splits": splits}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    (tmp_path / "raw.yaml").write_text(
        f"name: raw\ndata: {{path: {tmp_path}}}\nmodel: {{embedding_dim: 32}}\n"
        "train: {table_optimizer: rowwise_adagrad, batch_size: 4096}\nsharding: {tables: {ad: {kernels: [fused_uvm]}}}\n"
    )
    found = {}
    for cluster in ("1x8xA100-80GB", "2x8xA100-80GB"):
        done = sseds("forecast", tmp_path / "raw.yaml", "--cluster", cluster, "--json")
        assert done.code == 0, done.err
        found[cluster] = done.json["base"]
        assert done.json["base"]["kernels"] == {"fused": 1, "fused_uvm": 1}
        assert done.json["base"]["sharding_types"]["row_wise"] >= 1
    eight, sixteen = (own["bytes_per_rank"] for own in found.values())
    assert eight["weights"]["max"] == rows["user"] // 8 * 32 * 4
    assert eight["ddr"]["mean"] * 8 == pytest.approx(rows["ad"] * (32 + 1) * 4)
    saved = eight["dense"]["max"] - sixteen["dense"]["max"]
    assert saved == pytest.approx(rows["user"] * 24 / 16, rel=1e-3)
