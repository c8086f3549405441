"""Fields of raw 64-bit ids: what the model looks up, scores, saves and slims, against a map and tables read from its state."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torchrec import KeyedJaggedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel

import sseds_rec as sr
from sseds_rec.data.batch import Batch
from sseds_rec.data.schema import Field, Schema, Split
from sseds_rec.distributed.managed import ADMISSION_STEPS, spread_ids
from sseds_rec.distributed.runtime import Runtime
from sseds_rec.distributed.sharding import ShardingConfig, shard
from sseds_rec.distributed.tables import embedding_modules
from sseds_rec.models import CtrModel, ModelConfig, build_model, build_slim_model, plan_for
from sseds_rec.models.ticket import load_ticket
from sseds_rec.search.scores import DimensionScores
from sseds_rec.search.tap import plan_tables
from sseds_rec.training.checkpoint import load_weights, save_weights
from sseds_rec.training.config import TrainConfig
from sseds_rec.training.optimizers import build_optimizer, fuse_table_optimizer
from tests.command import Command
from tests.models.plain import explicit_scores, plain_deepfm
from tests.ranks import run_ranks

ROWS = {"hour": 24, "device": 16, "tags": 32}  # more devices than rows, fewer tags
PATHS = {"hour": "embeddings", "device": "managed", "tags": "managed"}
COUNT, D, STEPS = 64, 8, 2 * ADMISSION_STEPS + 3
MODEL = ModelConfig(embedding_dim=D, hidden=[16, 8])
FREE = torch.iinfo(torch.int64).max


def _schema(weighted: bool = False, rows: int = ROWS["device"]) -> Schema:
    weights = "tag_weights" if weighted else None
    fields = [
        Field(name="hour", kind="categorical", transform="vocabulary", cardinality=ROWS["hour"], min_count=1),
        Field(name="device", kind="categorical", transform="raw", cardinality=rows),
        Field(name="tags", kind="sequence", transform="raw", cardinality=ROWS["tags"], weights=weights),
    ]
    splits = {name: Split(rows=0, positives=0, files=[]) for name in ("train", "validation", "test")}
    return Schema(label="click", fields=fields, seed=0, source={}, splits=splits)  # type: ignore[arg-type]


Bags = dict[str, list[tuple[list[int], list[float]]]]


def _bags(weighted: bool) -> Bags:
    """Field -> per row its ids and what each is multiplied by: a device or none, up to three tags."""
    random = torch.Generator().manual_seed(1)
    known = {
        name: torch.randint(-(2**63), 2**63 - 1, (n,), generator=random) for name, n in (("device", 60), ("tags", 20))
    }
    bags: Bags = {name: [] for name in ROWS}
    for _ in range(COUNT):
        bags["hour"].append(([int(torch.randint(0, 24, (), generator=random))], [1.0]))
        for name, ids in known.items():
            length = int(torch.randint(0, 4, (), generator=random))
            length = min(length, 1) if name == "device" else length
            often = (torch.rand(length, generator=random) ** 2 * len(ids)).long()
            drawn = torch.randn(length, generator=random).tolist() if weighted else [1 / max(length, 1)] * length
            bags[name].append((ids[often].tolist(), drawn if name == "tags" else [1.0] * length))
    return bags


def _labels() -> Tensor:
    return (torch.rand(COUNT, generator=torch.Generator().manual_seed(3)) > 0.5).float()


def _batch(bags: Bags, rank: int, world_size: int, weighted: bool = False) -> Batch:
    rows = slice(rank * COUNT // world_size, (rank + 1) * COUNT // world_size)
    own = [bag for field in bags.values() for bag in field[rows]]
    sparse = KeyedJaggedTensor(
        keys=list(bags),
        values=torch.tensor([i for ids, _ in own for i in ids]),
        weights=torch.tensor([w for _, weights in own for w in weights]) if weighted else None,
        lengths=torch.tensor([len(ids) for ids, _ in own], dtype=torch.int32),
    )
    labels = _labels()[rows]
    return Batch(dense=torch.empty(len(labels), 0), sparse=sparse, labels=labels)


def _shard(model: CtrModel, rank: int, world_size: int, optimizer: str) -> DistributedModelParallel:
    fuse_table_optimizer(model, optimizer, 0.1, "auto")  # type: ignore[arg-type]
    return shard(model, ShardingConfig(), Runtime(rank, world_size, torch.device("cpu")), COUNT)


def _train(model: DistributedModelParallel, batch: Batch, steps: int, optimizer: str) -> None:
    model.train()
    stepper = build_optimizer(
        model,
        TrainConfig(table_optimizer=optimizer, table_learning_rate=0.1, learning_rate=0.01),  # type: ignore[arg-type]
    )
    for _ in range(steps):
        stepper.zero_grad()
        model(batch)[0].backward()
        stepper.step()


def _state(model: DistributedModelParallel) -> dict[str, Tensor]:
    """This rank's part of every tensor of the model."""
    own = {n: v.local_shards() if hasattr(v, "local_shards") else v for n, v in model.state_dict().items()}
    return {n: v if isinstance(v, Tensor) else v[0].tensor for n, v in own.items() if isinstance(v, Tensor) or v}


def _logits(model: DistributedModelParallel, batch: Batch) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(batch)[1][1]


def _trained_on_rank(rank: int, world_size: int, optimizer: str, weighted: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    batch = _batch(_bags(weighted), rank, world_size, weighted)
    model = _shard(build_model(MODEL, _schema(weighted)), rank, world_size, optimizer)
    _train(model, batch, STEPS, optimizer)
    before = {name: value.clone() for name, value in _state(model).items()}
    scores = {name: dict(sr.score_dimensions(model, [batch], name)) for name in ("snip", "ggn")}
    logits = _logits(model, batch)
    untouched = all(torch.equal(before[name], value) for name, value in _state(model).items())
    _train(model, batch, ADMISSION_STEPS, optimizer)  # and training goes on
    return {"state": before, "scores": scores, "logits": logits, "untouched": untouched}


def _whole_tables(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Table -> all its rows [n, D]: row-wise ones are in pieces, the others on one rank."""
    tables = {}
    for name, path in PATHS.items():
        inner = "embeddings" if path == "embeddings" else "managed._embedding_module"
        key = f"{inner}.embedding_bags.{name}.weight"
        tables[name] = torch.cat([state[key] for state in states if key in state])
    return tables


def _maps(states: list[dict[str, Tensor]]) -> dict[str, list[dict[int, int]]]:
    """Table -> per rank, spread id -> row."""
    maps = {}
    for name in ("device", "tags"):
        prefix = f"managed._managed_collision_collection._managed_collision_modules.{name}._mch_"
        pairs = [(s[f"{prefix}sorted_raw_ids"].tolist(), s[f"{prefix}remapped_ids_mapping"].tolist()) for s in states]
        maps[name] = [{i: row for i, row in zip(*pair, strict=True) if i != FREE} for pair in pairs]
    return maps


def _pooled(bags: Bags, tables: dict[str, Tensor], maps: dict[str, list[dict[int, int]]]) -> dict[str, Tensor]:
    """Field -> Σ weight · row [COUNT, D], bag by bag; ids that have no row share the last one of their rank."""

    def row(name: str, raw: int) -> int:
        if name not in maps:
            return raw
        spread, parts = int(spread_ids(torch.tensor(raw))), maps[name]
        rank = spread // (2**62 // len(parts))
        return parts[rank].get(spread, (rank + 1) * ROWS[name] // len(parts) - 1)

    return {
        name: torch.stack(
            [
                (table[[row(name, i) for i in ids]] * torch.tensor(weights, dtype=table.dtype)[:, None]).sum(0)
                for ids, weights in bags[name]
            ]
        )
        for name, table in tables.items()
    }


def _over(states: list[dict[str, Tensor]]) -> Any:
    over = build_model(MODEL, _schema()).over
    over.load_state_dict({n.removeprefix("over."): v for n, v in states[0].items() if n.startswith("over.")})
    return over


def test_ids_are_spread_as_by_splitmix64() -> None:
    def reference(value: int) -> int:
        z = value % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return (z ^ (z >> 31)) % 2**62

    ids = torch.cat([torch.arange(-5000, 5000), torch.tensor([2**63 - 1, -(2**63), 2**62, -(2**62)])])
    spread = spread_ids(ids)
    assert spread.tolist() == [reference(i) for i in ids.tolist()]
    assert len(set(spread.tolist())) == len(ids)
    assert 4700 < int((spread < 2**61).sum()) < 5300


@pytest.mark.parametrize(
    ("world_size", "optimizer", "weighted"),
    [(1, "rowwise_adagrad", False), (2, "rowwise_adagrad", False), (2, "adagrad", True), (1, "sgd", True)],
)
def test_lookups_and_scores_are_those_of_the_map_and_leave_it_alone(
    world_size: int, optimizer: str, weighted: bool
) -> None:
    answers = run_ranks(world_size, _trained_on_rank, optimizer, weighted)
    states, bags = [answer["state"] for answer in answers], _bags(weighted)
    tables, maps = _whole_tables(states), _maps(states)
    assert {name: len(table) for name, table in tables.items()} == ROWS
    seen = {name: {i for ids, _ in bags[name] for i in ids} for name in maps}
    held = {name: {i for part in parts for i in part} for name, parts in maps.items()}
    assert held["tags"] == {int(spread_ids(torch.tensor(i))) for i in seen["tags"]}
    assert 10 < len(held["device"]) < ROWS["device"] < len(seen["device"])  # the last row of each rank is nobody's
    for parts in maps.values():
        rows = [row for part in parts for row in part.values()]
        assert len(set(rows)) == len(rows)
    assert all(answer["untouched"] for answer in answers)

    over, dense = _over(states), torch.empty(COUNT, 0)
    expected = plain_deepfm(over, dense, _pooled(bags, tables, maps))
    torch.testing.assert_close(torch.cat([a["logits"] for a in answers]), expected, rtol=1e-4, atol=1e-5)

    alpha = {name: torch.ones(D, dtype=torch.float64, requires_grad=True) for name in ROWS}
    fields = _pooled(bags, {name: table.double() * alpha[name] for name, table in tables.items()}, maps)
    logits = plain_deepfm(over.double(), dense.double(), fields)
    for criterion in ("snip", "ggn"):
        expected_scores = explicit_scores(logits, _labels().double(), alpha, criterion)
        for answer in answers:
            for name, path in PATHS.items():
                scores = answer["scores"][criterion][f"{path}.{name}"]
                torch.testing.assert_close(scores, expected_scores[name], rtol=1e-4, atol=1e-8)


def _evicted_on_rank(rank: int, world_size: int) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and Adagrad's sums of `device`'s rows when other ids have just taken them over, and before."""
    torch.manual_seed(0)
    model = _shard(build_model(MODEL, _schema()), rank, world_size, "adagrad")
    bags = {"hour": [([0], [1.0])] * COUNT, "tags": [([], [])] * COUNT}

    def devices(first: int, times: int) -> Batch:
        bags["device"] = [([first + i % 15], [1.0]) for i in range(COUNT)][:times] + [([], [])] * (COUNT - times)
        ordered: Any = {name: bags[name] for name in ROWS}
        return _batch(ordered, rank, world_size)

    def rows() -> list[Tensor]:
        state = model.fused_optimizer.state_dict()["state"]["managed._embedding_module.embedding_bags.device.weight"]
        sums = next(value for name, value in state.items() if "momentum1" in name or "exp" in name or "sum" in name)
        weight = _state(model)["managed._embedding_module.embedding_bags.device.weight"]
        return [weight.clone(), sums.local_shards()[0].tensor.clone()]

    _train(model, devices(0, 15), 2 * ADMISSION_STEPS, "adagrad")
    others = devices(100, COUNT)  # four times as often in a batch
    _train(model, others, ADMISSION_STEPS - 1, "adagrad")
    before = rows()
    model(others)
    return before, rows()


def test_a_row_given_to_a_new_id_starts_afresh() -> None:
    before, after = run_ranks(1, _evicted_on_rank)[0]
    ours, last = slice(0, 15), 15
    assert bool((before[0][ours].abs().mean(dim=1) > 0.1).all()) and bool((before[1][ours] > 0).any(dim=1).all())
    changed = (before[0] != after[0]).any(dim=1)
    assert bool(changed[ours].all()) and not bool(changed[last])
    assert bool((after[0][changed].abs() < 0.1).all()) and not bool(after[1][changed].any())
    assert torch.equal(after[1][last], before[1][last]) and bool((before[1][last] > 0).any())


def _save_on_rank(rank: int, world_size: int, folder: str) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    batch = _batch(_bags(False), rank, world_size)
    model = _shard(build_model(MODEL, _schema()), rank, world_size, "rowwise_adagrad")
    _train(model, batch, STEPS, "rowwise_adagrad")
    save_weights(Path(folder), model, Runtime(rank, world_size, torch.device("cpu")))
    return _logits(model, batch), dict(sr.score_dimensions(model, [batch], "ggn")), _state(model)


def _load_on_rank(rank: int, world_size: int, folder: str) -> Tensor:
    torch.manual_seed(1)
    model = _shard(build_model(MODEL, _schema()), rank, world_size, "rowwise_adagrad")
    load_weights(Path(folder), model)
    return _logits(model, _batch(_bags(False), rank, world_size))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_checkpoint_holds_the_map_for_as_many_ranks(tmp_path: Path, world_size: int) -> None:
    saved = run_ranks(world_size, _save_on_rank, str(tmp_path / "full"))
    loaded = run_ranks(world_size, _load_on_rank, str(tmp_path / "full"))
    assert all(torch.equal(logits, before[0]) for logits, before in zip(loaded, saved, strict=True))
    other = 3 - world_size
    with pytest.raises(
        AssertionError, match=f"in {world_size} parts, one a rank, .* start as many processes, not {other}"
    ):
        run_ranks(other, _load_on_rank, str(tmp_path / "full"))


def _slim_on_rank(rank: int, world_size: int, folder: str) -> tuple[Tensor, Tensor]:
    plan = plan_for(MODEL, _schema(), sr.DimensionPlan.load(f"{folder}/plan.json"))
    batch = _batch(_bags(False), rank, world_size)
    slim = build_slim_model(MODEL, _schema(), plan, "select")
    model = _shard(slim, rank, world_size, "rowwise_adagrad")
    load_ticket(Path(f"{folder}/slim"), model, plan)
    start = _logits(model, batch)
    _train(model, batch, STEPS, "rowwise_adagrad")
    return start, _logits(model, batch)


@pytest.mark.parametrize(("world_size", "dropped"), [(1, "none"), (2, "none"), (1, "device"), (1, "both")])
def test_the_slim_model_keeps_the_map_and_equals_the_masked_one(tmp_path: Path, world_size: int, dropped: str) -> None:
    saved = run_ranks(world_size, _save_on_rank, str(tmp_path / "full"))
    states, bags = [answer[2] for answer in saved], _bags(False)
    facts = plan_tables(embedding_modules(build_model(MODEL, _schema())))
    plan = sr.allocate(DimensionScores(saved[0][1], facts, {}), sr.Budget(dims=0.7), min_dim=4)
    gone = {"none": [], "device": ["managed.device"], "both": ["managed.device", "managed.tags"]}[dropped]
    for name in gone:
        plan.tables[name] = plan.tables[name].model_copy(update={"kept": [], "embedding_dim": 0, "stored_dim": 0})
    plan.save(tmp_path / "plan.json")
    own = plan_for(MODEL, _schema(), plan)
    assert list(own.tables) == list(ROWS)
    sr.slim_checkpoint(tmp_path / "full", tmp_path / "slim", own)
    stored = FileSystemReader(tmp_path / "slim").read_metadata().state_dict_metadata
    assert any(".device." in name for name in stored) == ("managed.device" not in gone)
    sr.slim_checkpoint(tmp_path / "full", tmp_path / "slim2", plan)  # by the names of the scores it is the same
    assert FileSystemReader(tmp_path / "slim2").read_metadata().state_dict_metadata.keys() == stored.keys()

    answers = run_ranks(world_size, _slim_on_rank, str(tmp_path))
    masks = {name: torch.zeros(D) for name in ROWS}
    for name, table in own.tables.items():
        masks[name][table.kept] = 1
    tables = {name: table * masks[name] for name, table in _whole_tables(states).items()}
    expected = plain_deepfm(_over(states), torch.empty(COUNT, 0), _pooled(bags, tables, _maps(states)))
    torch.testing.assert_close(torch.cat([a[0] for a in answers]), expected, rtol=1e-4, atol=1e-5)
    before, after = (
        float(F.binary_cross_entropy_with_logits(torch.cat([a[i] for a in answers]), _labels())) for i in (0, 1)
    )
    assert after < before


def _random_start_on_rank(rank: int, world_size: int, folder: str) -> tuple[dict[str, Tensor], Tensor]:
    plan = plan_for(MODEL, _schema(), sr.DimensionPlan.load(f"{folder}/plan.json"))
    torch.manual_seed(5 + rank)
    model = _shard(build_slim_model(MODEL, _schema(), plan, "select"), rank, world_size, "rowwise_adagrad")
    load_ticket(Path(f"{folder}/slim"), model, plan, tables="random")
    return _state(model), _logits(model, _batch(_bags(False), rank, world_size))


@pytest.mark.parametrize("world_size", [1, 2])
def test_random_tables_of_a_slim_model_keep_the_map(tmp_path: Path, world_size: int) -> None:
    saved = run_ranks(world_size, _save_on_rank, str(tmp_path / "full"))
    states, bags = [answer[2] for answer in saved], _bags(False)
    facts = plan_tables(embedding_modules(build_model(MODEL, _schema())))
    plan = sr.allocate(DimensionScores(saved[0][1], facts, {}), sr.Budget(dims=0.7), multiple=1, min_dim=1)
    plan.save(tmp_path / "plan.json")
    own = plan_for(MODEL, _schema(), plan)
    sr.slim_checkpoint(tmp_path / "full", tmp_path / "slim", own)

    answers = run_ranks(world_size, _random_start_on_rank, str(tmp_path))
    for before, (after, _) in zip(states, answers, strict=True):
        maps = {name for name in before if name.startswith("managed.") and ".embedding_bags." not in name}
        assert len(maps) > 4 and all(torch.equal(before[name], after[name]) for name in maps)
    drawn = _whole_tables([after for after, _ in answers])
    tables = {name: torch.zeros(rows, D) for name, rows in ROWS.items()}
    for name, table in own.tables.items():
        assert drawn[name].shape == (table.rows, table.stored_dim) and not drawn[name][:, table.embedding_dim :].any()
        tables[name][:, table.kept] = drawn[name][:, : table.embedding_dim]
    values = torch.cat([table[table != 0] for table in tables.values()])
    assert len(values) == sum(table.rows * table.embedding_dim for table in own.tables.values())
    assert abs(float(values.std()) - 0.01) < 0.002 and abs(float(values.mean())) < 0.002
    expected = plain_deepfm(_over(states), torch.empty(COUNT, 0), _pooled(bags, tables, _maps(states)))
    torch.testing.assert_close(torch.cat([logits for _, logits in answers]), expected, rtol=1e-4, atol=1e-5)


def _refused_on_rank(rank: int, world_size: int, placement: str, rows: int) -> str:
    model = build_model(MODEL, _schema(rows=rows))
    fuse_table_optimizer(model, "adagrad", 0.1, placement)  # type: ignore[arg-type]
    config = ShardingConfig(type=placement)  # type: ignore[arg-type]
    with pytest.raises(sr.UserError) as refused:
        shard(model, config, Runtime(rank, world_size, torch.device("cpu")), COUNT)
    return str(refused.value)


def test_what_cannot_be_is_refused_by_name() -> None:
    said = run_ranks(2, _refused_on_rank, "data_parallel", 16)
    assert all("table device" in line and "set train.table_optimizer=rowwise_adagrad" in line for line in said)
    said = run_ranks(2, _refused_on_rank, "auto", 17)
    assert all("table device: its 17 rows for raw ids do not divide by 2 ranks" in line for line in said)


def test_sets_of_raw_fields_only_need_no_other_collection() -> None:
    schema = _schema()
    only = schema.model_copy(update={"fields": schema.fields[1:]})
    model = build_model(MODEL, only)
    assert model.embeddings is None and model.raw == ["device", "tags"]


CONFIG = """
name: raw
device: cpu
data: {path: DATA}
model: {embedding_dim: 8, hidden: [16, 8]}
train: {epochs: 2, batch_size: 100, learning_rate: 0.01, table_optimizer: rowwise_adagrad, table_learning_rate: 0.1}
search: {budget: {parameters: 0.6}, min_dim: 4}
"""


def write_raw_set(folder: Path) -> None:
    """4,000 rows in which `device` and the weights of `tags` decide the click, `hour` does not."""
    random = np.random.default_rng(0)
    count, devices, tags = 4000, random.integers(-(2**63), 2**63 - 1, 30), random.integers(-(2**63), 2**63 - 1, 10)
    device, known, lengths = random.integers(0, 30, count), random.random(count) < 0.9, random.integers(0, 3, count)
    drawn = [random.integers(0, 10, length) for length in lengths]
    weights = [random.normal(size=length) for length in lengths]
    taste, meaning = random.normal(size=30), random.normal(size=10)
    logit = 2 * taste[device] * known + [w @ meaning[tag] for tag, w in zip(drawn, weights, strict=True)]
    frame = pl.DataFrame(
        {
            "label": pl.Series(random.random(count) < 1 / (1 + np.exp(-logit))).cast(pl.Int8),
            "hour": pl.Series(random.integers(0, 24, count), dtype=pl.Int32),
            "device": [int(i) if k else None for i, k in zip(devices[device], known, strict=True)],
            "tags": pl.Series([tags[tag].tolist() for tag in drawn], dtype=pl.List(pl.Int64)),
            "tag_weights": pl.Series([w.tolist() for w in weights], dtype=pl.List(pl.Float32)),
        }
    )
    splits = {}
    for name, part in {"train": frame[:3000], "validation": frame[3000:3500], "test": frame[3500:]}.items():
        (folder / name).mkdir(parents=True)
        part.write_parquet(folder / name / "part-00000.parquet")
        positives = int(part["label"].sum())
        splits[name] = Split(rows=len(part), positives=positives, files=[f"{name}/part-00000.parquet"])
    fields = [
        Field(name="hour", kind="categorical", transform="hash", cardinality=24),
        Field(name="device", kind="categorical", transform="raw", cardinality=48),
        Field(name="tags", kind="sequence", transform="raw", cardinality=16, weights="tag_weights"),
    ]
    Schema(label="click", fields=fields, seed=0, source={}, splits=splits).save(folder)  # type: ignore[arg-type]


def test_a_run_on_raw_and_weighted_fields(tmp_path: Path, sseds: Callable[..., Command]) -> None:
    write_raw_set(tmp_path / "data")
    config, run = tmp_path / "raw.yaml", tmp_path / "run"
    config.write_text(CONFIG.replace("DATA", str(tmp_path / "data")))
    refused = sseds("run", config, "train.table_optimizer=adam", "--run-dir", tmp_path / "refused")
    assert refused.code == 2 and "field device" in refused.err
    assert refused.err.splitlines()[-1].endswith("set train.table_optimizer=rowwise_adagrad and sharding.type=auto")
    done = sseds("run", config, "--run-dir", run)
    assert done.code == 0, done.err
    results = json.loads((run / "metrics.json").read_text())
    assert all(results[stage]["auc"] > 0.75 for stage in ("pretrain", "slim", "retrain"))
    assert results["retrain"]["embedding_parameters"] < results["pretrain"]["embedding_parameters"]
    plan = json.loads((run / "search/plan.json").read_text())
    assert list(plan["tables"]) == ["embeddings.hour", "managed.device", "managed.tags"]
    for stage in ("pretrain", "retrain"):
        again = sseds("evaluate", config, "--run-dir", run, "--stage", stage, "--json")
        assert again.json["auc"] == results[stage]["auc"]
