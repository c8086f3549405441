"""AutoDim end to end: what its search finds, leaves, shares between budgets and survives, on one rank and on two."""

from __future__ import annotations

import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor

import sseds_rec as sr
from sseds_rec.config import load_config
from sseds_rec.data.batch import Batch
from sseds_rec.data.truth import Truth
from sseds_rec.distributed.runtime import Runtime, runtime
from sseds_rec.errors import UserError
from sseds_rec.files import read_json
from sseds_rec.harness import autodim, pipeline_for
from sseds_rec.harness.autodim import Architect, Autodim
from sseds_rec.models import build_model
from sseds_rec.run_directory import RunDirectory
from sseds_rec.search.methods.autodim import Mixture
from sseds_rec.training.optimizers import build_optimizer
from sseds_rec.training.pipelines import train_pipeline
from tests.ranks import run_ranks

#: 25 steps an epoch, so α moves 25 times.
SHORT = [
    "search.method=autodim",
    "search.autodim.epochs=2",
    "search.autodim.every=2",
    "search.autodim.learning_rate=0.05",
]


def _pipeline(config: Path, run: Path, place: Runtime, *overrides: str) -> Autodim:
    loaded = load_config(config, [*SHORT, *overrides])
    directory = RunDirectory(run)
    pipeline = pipeline_for(loaded, directory, place)
    assert isinstance(pipeline, Autodim)
    directory.open(loaded, place)
    return pipeline


def _learned(run: Path) -> dict[str, np.ndarray]:
    with np.load(run / "search/learned/probabilities.npz") as stored:
        return dict(stored)


def _parameters(checkpoint: Path) -> tuple[int, int]:
    """Numbers in the tables of a checkpoint, and those of columns that are not zero, counted from the stored tensors."""
    entries = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    names = [name.removeprefix("model.") for name in entries if ".embedding_bags." in name]
    tables = {name: torch.empty(entries[f"model.{name}"].size) for name in names}
    dcp.load({"model": tables}, checkpoint_id=checkpoint)
    used = sum(len(table) * int(table.any(dim=0).sum()) for table in tables.values())
    return sum(table.numel() for table in tables.values()), used


def test_a_run_keeps_the_budget_and_budgets_share_what_is_learned(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with runtime("cpu") as place:
        pipeline = _pipeline(config, run, place, "train.epochs=1", "search.budget.parameters=0.3")
        metrics = {"search": pipeline.search(), "slim": pipeline.slim(), "retrain": pipeline.retrain()}
    plan = sr.DimensionPlan.load(run / "search/plan.json")
    assert set(plan.dims().values()) <= {1, 4, 8, 12, 16}
    assert plan.search["method"] == "autodim" and plan.search["choice"] == "most probable within the budget"
    stored, used = _parameters(run / "retrain/checkpoint")
    assert stored == metrics["retrain"]["embedding_parameters"] == plan.reached["stored_parameters"]["kept"]
    assert used == plan.reached["parameters"]["kept"] <= 0.3 * sum(t.rows * 16 for t in plan.tables.values())
    assert metrics["search"]["batches"] == 25
    learned = read_json(run / "search/learned/metrics.json")
    assert metrics["search"]["seconds"] >= learned["seconds"] > 0 and not (run / "search/learned/checkpoints").exists()
    assert all(one.sum() == pytest.approx(1) and one.std() > 0 for one in _learned(run).values())

    other = tmp_path / "other"
    (other / "search").mkdir(parents=True)
    (other / "search/learned").symlink_to(run / "search/learned")
    with runtime("cpu") as place:
        found = _pipeline(config, other, place, "train.epochs=1", "search.budget.dims=1.0").search()
        whole = sr.DimensionPlan.load(other / "search/plan.json")
        assert found["seconds"] == pytest.approx(learned["seconds"], abs=1)  # not learned again, and yet counted
        assert whole.search["choice"] == "argmax"
        assert list(whole.dims().values()) == [[1, 4, 8, 12, 16][one.argmax()] for one in _learned(run).values()]
        changed = _pipeline(config, tmp_path / "changed", place, "train.epochs=1", "search.autodim.every=3")
        (tmp_path / "changed/search").mkdir()
        (tmp_path / "changed/search/learned").symlink_to(run / "search/learned")
        with pytest.raises(UserError, match="learned: it was learned under another config"):
            changed.search()
        with pytest.raises(UserError, match="the smallest candidates, 1 columns of every table"):
            _pipeline(config, tmp_path / "small", place, "search.budget.parameters=0.01")
        (run / "search/learned/probabilities.npz").write_bytes(b"PK, but no archive")
        with pytest.raises(
            UserError, match=r"probabilities.npz: cannot be read \(.*\); remove .*learned and search again"
        ):
            pipeline.search()


class _Killed(Exception):
    """Stands for a kill."""


def test_a_killed_search_goes_on_bit_for_bit(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with runtime("cpu") as place:
        _pipeline(config, tmp_path / "whole", place).search()
        call = Architect.__call__

        def dies(self: Architect, step: int) -> bool:
            if step == 33:
                raise _Killed
            return call(self, step)

        checkpoints = "train.checkpoint_steps=9"
        monkeypatch.setattr(Architect, "__call__", dies)
        with pytest.raises(_Killed):
            _pipeline(config, tmp_path / "killed", place, checkpoints).search()
        assert not (tmp_path / "killed/search/learned/metrics.json").exists()
        monkeypatch.setattr(Architect, "__call__", call)
        _pipeline(config, tmp_path / "killed", place, checkpoints).search()
    whole, killed = _learned(tmp_path / "whole"), _learned(tmp_path / "killed")
    assert all(np.array_equal(whole[name], killed[name]) for name in whole)


def _plain_gradient(model: nn.Module, mixture: Mixture, tables: dict[str, Tensor], batch: Batch) -> Tensor:
    """Of the mean loss in log α, by autograd through every look-up and every candidate, in plain PyTorch."""
    log_alpha = mixture.log_alpha.clone().requires_grad_()
    noise = np.random.default_rng([mixture.seed, mixture.step, 1]).gumbel(size=log_alpha.shape)
    shares = F.softmax((log_alpha + torch.from_numpy(noise).float()) / mixture.temperature, dim=1)
    seen = []
    for row, name in enumerate(mixture.fields):
        bags = batch.sparse[name]
        embedded = nn.EmbeddingBag.from_pretrained(tables[name], mode="sum")(bags.values(), bags.offsets()[:-1])
        for column, transform in enumerate(mixture.transforms):
            candidate = embedded[:, : transform.shape[2]] @ transform[row].T
            candidate = nn.BatchNorm1d(candidate.shape[1], affine=False)(candidate)
            seen.append(mixture.scale * shares[row, column] * candidate)
    count = len(mixture.transforms)
    raw = torch.cat([sum(seen[i : i + count]) for i in range(0, len(seen), count)], dim=1)  # type: ignore[arg-type]
    over = model.module.over
    x = torch.cat([batch.dense, raw], dim=1)
    fields = raw.view(len(raw), len(mixture.fields), -1)
    pairs = 0.5 * (fields.sum(dim=1).square() - fields.square().sum(dim=1)).sum(dim=1)
    logits = over.first_order(x).squeeze(1) + pairs + over.output(over.deep(x)).squeeze(1)
    return torch.autograd.grad(F.binary_cross_entropy_with_logits(logits, batch.labels), log_alpha)[0]


def _whole(table: Tensor | ShardedTensor, world_size: int) -> Tensor:
    """All of a table, on every rank."""
    if not isinstance(table, ShardedTensor):
        return table.detach().clone()
    whole = torch.zeros(table.size())
    for part in table.local_shards():
        (row, column), (rows, columns) = part.metadata.shard_offsets, part.metadata.shard_sizes
        whole[row : row + rows, column : column + columns] = part.tensor
    if world_size > 1:
        torch.distributed.all_reduce(whole)
    return whole


def _step_of_alpha(
    rank: int, world_size: int, config: Path, run: Path, optimizer: str, overlap: bool
) -> tuple[Tensor, Tensor, int]:
    """The gradient in log α, that of plain PyTorch, and the rows; nothing else may change."""
    place = Runtime(rank, world_size, torch.device("cpu"))
    overrides = [f"train.table_optimizer={optimizer}", "model.dropout=0"]
    pipeline = _pipeline(config, run, place, *overrides)
    torch.manual_seed(1)
    model = build_model(pipeline.config.model, pipeline.schema)
    fields = [field.name for field in pipeline.schema.sparse_fields]
    mixture = model.gate = Mixture(fields, 16, [2, 8, 16], 5e-5, seed=5)
    mixture.log_alpha.copy_(torch.randn(len(fields), 3))
    sharded = pipeline._shard(model, pipeline.config.train)
    sgd = build_optimizer(sharded, pipeline.config.train)
    architect = Architect(
        sharded, mixture, pipeline.loader("validation"), pipeline.config.search.autodim, pipeline.runtime
    )
    sharded.train()

    def state() -> dict[str, Tensor]:
        named = {**sharded.state_dict(), **{f"{n}.grad": p.grad for n, p in sharded.named_parameters()}}
        for name, values in sgd.state_dict()["state"].items():
            named |= {f"{name}.{key}": value for key, value in values.items()}
        local = {
            n: [s.tensor for s in v.local_shards()] if hasattr(v, "local_shards") else [v]
            for n, v in named.items()
            if v is not None
        }
        return {f"{n}.{i}": part.detach().clone() for n, parts in local.items() for i, part in enumerate(parts)}

    batch = next(iter(pipeline.loader("validation")))
    with train_pipeline(sharded, sgd, place, overlap) as step:
        rest = islice(pipeline.loader("train"), 4)
        for _ in range(2):  # optimizers have states, parameters gradients
            step(rest)
        architect.start(7)
        before = state()
        found = architect.gradient(batch)
        after = state()
    assert len(before) > 20 and before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert sharded.training and mixture.training

    values = {name.split(".")[-2]: value for name, value in sharded.state_dict().items() if ".embedding_bags." in name}
    tables = {name: _whole(value, world_size) for name, value in values.items()}
    return found, _plain_gradient(sharded, mixture, tables, batch), len(batch.labels)


@pytest.mark.parametrize(
    ("optimizer", "overlap"), [("adam", False), ("rowwise_adagrad", False), ("rowwise_adagrad", True)]
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_gradient_is_that_of_plain_pytorch_and_touches_nothing_else(
    config: Path, tmp_path: Path, optimizer: str, overlap: bool, ranks: int
) -> None:
    answers = run_ranks(ranks, _step_of_alpha, config, tmp_path, optimizer, overlap)
    expected = sum(plain * rows for _, plain, rows in answers) / sum(rows for *_, rows in answers)
    for found, *_ in answers:
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    assert float(expected.abs().max()) > 1e-4


PLANTED = """
name: planted
device: cpu
data: {path: DATA}
model: {name: fm, embedding_dim: 16}
train: {epochs: 1, batch_size: 1024, learning_rate: 0.01}
search: {method: autodim, budget: {dims: 1.0}, autodim: {widths: [1, 4, 16], epochs: 2, every: 1}}
"""


def _search_on_rank(rank: int, world_size: int, config: Path, run: Path) -> Tensor:
    """log α as this rank has it in the end."""
    mixtures: list[Mixture] = []

    class Watched(Mixture):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            mixtures.append(self)

    place, loaded, directory = Runtime(rank, world_size, torch.device("cpu")), load_config(config), RunDirectory(run)
    directory.open(loaded, place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autodim, "Mixture", Watched)
        pipeline_for(loaded, directory, place).search()
    return mixtures[0].log_alpha


def test_noise_gets_the_narrowest_width_and_fields_of_high_rank_the_widest_on_one_rank_and_on_two(
    tmp_path: Path,
) -> None:
    options = "--rows 100000 --fields 6 --cardinality 60:200 --zipf 0.3 --ranks 0,8 --duplicates 0 --signal 3"
    command = [
        sys.executable,
        "-m",
        "sseds_rec",
        "prepare",
        "synthetic",
        "--output",
        tmp_path / "data",
        *options.split(),
    ]
    subprocess.run(command, check=True, capture_output=True)
    config = tmp_path / "planted.yaml"
    config.write_text(PLANTED.replace("DATA", str(tmp_path / "data")))
    (alone,) = run_ranks(1, _search_on_rank, config, tmp_path / "one")
    first, second = run_ranks(2, _search_on_rank, config, tmp_path / "two")
    for run in ("one", "two"):
        dims = sr.DimensionPlan.load(tmp_path / run / "search/plan.json").dims()
        assert dims == {one.name: 16 if one.rank else 1 for one in Truth.load(tmp_path / "data").fields}
    assert torch.equal(first, second)
    # The ranks see other batches than one rank alone does, and each norms its own rows.
    assert torch.corrcoef(torch.stack([first.flatten(), alone.flatten()]))[0, 1] > 0.9
