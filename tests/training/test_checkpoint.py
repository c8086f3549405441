"""Checkpoints: another number of ranks, another plan, written beside training, half written, of other settings."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint import FileSystemWriter
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import KeyedOptimizer

from sseds_rec.config import Config
from sseds_rec.distributed.runtime import Runtime
from sseds_rec.distributed.sharding import ShardingConfig, shard
from sseds_rec.errors import UserError
from sseds_rec.run_directory import fingerprint
from sseds_rec.stages import Stage
from sseds_rec.training.checkpoint import CheckpointStore, Progress
from sseds_rec.training.config import TrainConfig
from sseds_rec.training.optimizers import build_optimizer, fuse_table_optimizer
from tests.ranks import run_ranks

BATCH = 12  # over all ranks: divides by 1, 2 and 3
ROWS = {"t0": 9, "t1": 14}


class _Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        tables = [
            EmbeddingBagConfig(name=name, feature_names=[f"f_{name}"], num_embeddings=rows, embedding_dim=8)
            for name, rows in ROWS.items()
        ]
        self.tables = EmbeddingBagCollection(tables=tables, device=torch.device("meta"))
        self.dense = nn.Linear(16, 1)

    def forward(self, ids: KeyedJaggedTensor, labels: Tensor) -> Tensor:
        pooled = self.tables(ids).to_dict()
        predicted: Tensor = self.dense(torch.cat([pooled["f_t0"], pooled["f_t1"]], dim=1))
        return (predicted[:, 0] - labels).square().mean()


def _build(runtime: Runtime, plan: str, optimizer: str) -> tuple[DistributedModelParallel, KeyedOptimizer]:
    torch.manual_seed(runtime.rank)
    config = TrainConfig(table_optimizer=optimizer, learning_rate=0.05)  # type: ignore[arg-type]
    model = _Regression()
    fuse_table_optimizer(model, config.table_optimizer, config.table_rate, plan)  # type: ignore[arg-type]
    sharded = shard(model, ShardingConfig(type=plan), runtime, BATCH // runtime.world_size)  # type: ignore[arg-type]
    return sharded, build_optimizer(sharded, config)


def _train(model: DistributedModelParallel, optimizer: KeyedOptimizer, runtime: Runtime, first: int, last: int) -> None:
    """Steps `first` to `last` over global batches that are the same on any number of ranks."""
    for step in range(first, last):
        random = torch.Generator().manual_seed(step)
        ids = torch.stack([torch.randint(rows, (BATCH,), generator=random) for rows in ROWS.values()])
        labels = torch.randn(BATCH, generator=random)
        mine = slice(*(BATCH // runtime.world_size * rank for rank in (runtime.rank, runtime.rank + 1)))
        optimizer.zero_grad()
        lengths = torch.ones(ids[:, mine].numel(), dtype=torch.int32)
        features = KeyedJaggedTensor([f"f_{name}" for name in ROWS], ids[:, mine].reshape(-1), lengths=lengths)
        model(features, labels[mine]).backward()
        optimizer.step()


Pieces = dict[str, list[tuple[list[int], list[int], Tensor]]]


def _pieces(model: nn.Module, optimizer: KeyedOptimizer) -> Pieces:
    """What this rank holds of weights and optimizer states: name -> (whole size, offsets, values)."""
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, values in optimizer.state_dict()["state"].items():
        state |= {f"{name}.{key}": value for key, value in values.items()}
    pieces: Pieces = {}
    for name, value in state.items():
        if isinstance(value, ShardedTensor):
            shards = [(shard.metadata.shard_offsets, shard.tensor) for shard in value.local_shards()]
            pieces[name] = [(list(value.size()), offsets, tensor.clone()) for offsets, tensor in shards]
        else:
            pieces[name] = [(list(value.shape), [0] * value.dim(), value.clone())]
    return pieces


def _whole(ranks: list[Pieces]) -> dict[str, Tensor]:
    """Whole tensors from the pieces of all ranks."""
    whole: dict[str, Tensor] = {}
    for name, (size, offsets, values) in [(n, p) for pieces in ranks for n, held in pieces.items() for p in held]:
        tensor = whole.setdefault(name, torch.full(size, float("nan")))
        tensor[tuple(slice(o, o + n) for o, n in zip(offsets, values.shape, strict=True))] = values
    assert not any(tensor.isnan().any() for tensor in whole.values())
    return whole


def _save_and_go_on(rank: int, world_size: int, folder: str, plan: str, optimizer: str) -> Pieces:
    runtime = Runtime(rank, world_size, torch.device("cpu"))
    model, keyed = _build(runtime, plan, optimizer)
    _train(model, keyed, runtime, 0, 3)
    CheckpointStore(Path(folder), runtime).save(model, keyed, Progress(step=3))
    _train(model, keyed, runtime, 3, 6)
    return _pieces(model, keyed)


def _load_and_go_on(rank: int, world_size: int, folder: str, plan: str, optimizer: str) -> Pieces:
    runtime = Runtime(rank, world_size, torch.device("cpu"))
    model, keyed = _build(runtime, plan, optimizer)
    _train(model, keyed, runtime, 90, 92)  # to be overwritten
    progress = CheckpointStore(Path(folder), runtime).load(3, model, keyed)
    _train(model, keyed, runtime, progress.step, 6)
    return _pieces(model, keyed)


@pytest.mark.parametrize(
    ("optimizer", "before", "after"),
    [
        ("rowwise_adagrad", (2, "table_wise"), (2, "row_wise")),
        ("rowwise_adagrad", (2, "row_wise"), (1, "table_wise")),
        ("adagrad", (1, "table_wise"), (2, "column_wise")),
        ("adagrad", (2, "column_wise"), (3, "row_wise")),
        ("sgd", (2, "row_wise"), (3, "data_parallel")),
        ("adam", (2, "data_parallel"), (1, "data_parallel")),
        ("adam", (1, "data_parallel"), (3, "data_parallel")),
    ],
)
def test_other_ranks_under_another_plan_go_on_as_the_same_would(
    tmp_path: Path, optimizer: str, before: tuple[int, str], after: tuple[int, str]
) -> None:
    expected = _whole(run_ranks(before[0], _save_and_go_on, str(tmp_path), before[1], optimizer))
    resumed = _whole(run_ranks(after[0], _load_and_go_on, str(tmp_path), after[1], optimizer))
    assert resumed.keys() == expected.keys()
    assert len(resumed) > len(_Regression().state_dict())  # the optimizers' states, too
    for name, values in expected.items():
        torch.testing.assert_close(resumed[name], values, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def _begin(rank: int, world_size: int, folder: str, plan: str, optimizer: str, save: bool) -> Pieces:
    runtime = Runtime(rank, world_size, torch.device("cpu"))
    model, keyed = _build(runtime, plan, optimizer)
    store = CheckpointStore(Path(folder), runtime)
    if save:
        store.save(model, keyed, Progress(step=0))
    else:
        store.load(0, model, keyed)
    _train(model, keyed, runtime, 0, 3)
    return _pieces(model, keyed)


@pytest.mark.parametrize(
    ("optimizer", "plan"), [("adam", "data_parallel"), ("adagrad", "table_wise"), ("sgd", "row_wise")]
)
def test_a_checkpoint_from_before_the_first_step(tmp_path: Path, optimizer: str, plan: str) -> None:
    expected = _whole(run_ranks(2, _begin, str(tmp_path), plan, optimizer, True))
    resumed = _whole(run_ranks(3, _begin, str(tmp_path), plan, optimizer, False))
    assert resumed.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(resumed[name], values, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def _refusal(rank: int, world_size: int, folder: str, plan: str, optimizer: str, fingerprint: str) -> str:
    runtime = Runtime(rank, world_size, torch.device("cpu"))
    model, keyed = _build(runtime, plan, optimizer)
    with pytest.raises(UserError) as refused:
        CheckpointStore(Path(folder), runtime, fingerprint=fingerprint).load(3, model, keyed)
    return str(refused.value)


@pytest.mark.parametrize(
    ("optimizer", "before", "after", "entry"),
    [
        ("adagrad", "table_wise", "data_parallel", "tables.embedding_bags.t0.weight."),
        ("adagrad", "data_parallel", "row_wise", "tables.embedding_bags.t0.weight."),
        ("rowwise_adagrad", "table_wise", "column_wise", "momentum1"),
    ],
)
def test_placements_with_other_optimizer_states_are_refused_on_all_ranks(
    tmp_path: Path, optimizer: str, before: str, after: str, entry: str
) -> None:
    run_ranks(2, _save_and_go_on, str(tmp_path), before, optimizer)
    for message in run_ranks(2, _refusal, str(tmp_path), after, optimizer, ""):
        assert "\n" not in message and "step-00000003" in message and entry in message
        assert message.endswith("resume with the sharding.type that it was saved under, or run its stage again")


def test_another_config_is_refused(tmp_path: Path) -> None:
    run_ranks(1, _save_and_go_on, str(tmp_path), "table_wise", "sgd")
    (message,) = run_ranks(1, _refusal, str(tmp_path), "table_wise", "sgd", "0123456789abcdef")
    assert "step-00000003: it was trained under another config" in message and "\n" not in message


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"fingerprint": None}, "fingerprint"), ({"phase": 2}, "phase"), ({"loader": {"batch": 1}, "step": "x"}, "step")],
)
def test_progress_of_another_version_is_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    run_ranks(1, _save_and_go_on, str(tmp_path), "table_wise", "sgd")
    file = tmp_path / "step-00000003/progress.json"
    held = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in held.items() if value is not None}))
    (message,) = run_ranks(1, _refusal, str(tmp_path), "table_wise", "sgd", "")
    assert message.startswith(f"{file}: {named} is not as this version writes it") and "\n" not in message


@pytest.mark.parametrize(
    ("setting", "changes"),
    [
        ({"seed": 1}, {"pretrain", "retrain"}),
        ({"train": {"learning_rate": 0.5}}, {"pretrain", "retrain"}),
        ({"search": {"num_batches": 3}}, {"retrain"}),
        ({"retrain": {"transform": "random"}}, {"retrain"}),
        ({"sharding": {"type": "row_wise"}}, set()),
        ({"sharding": {"comm_precision": "fp16"}}, {"pretrain", "retrain"}),
        ({"train": {"checkpoint_steps": 7, "keep_checkpoints": 3, "async_checkpoints": True}}, set()),
        ({"train": {"learning_rate": 0.001}}, set()),  # the default
    ],
)
def test_the_fingerprint_is_of_what_a_training_depends_on(setting: dict[str, Any], changes: set[str]) -> None:
    fixed: dict[str, Any] = {"name": "run", "data": {"path": "set"}}
    before, after = Config.model_validate(fixed), Config.model_validate(fixed | setting)
    stages: list[Stage] = ["pretrain", "retrain"]
    assert {stage for stage in stages if fingerprint(before, stage) != fingerprint(after, stage)} == changes


def _held(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _save_while_training(rank: int, world_size: int, folder: str) -> tuple[list[list[str]], Pieces, Pieces]:
    """Saves steps 1 and 2 while a gate holds the files back; returns what lay in the folder on the way."""
    runtime = Runtime(rank, world_size, torch.device("cpu"))
    model, keyed = _build(runtime, "table_wise", "adagrad")
    store = CheckpointStore(Path(folder), runtime, keep=2, asynchronous=True)
    _train(model, keyed, runtime, 0, 1)
    gate, write, held = threading.Event(), FileSystemWriter.write_data, []

    def slow(*args: Any) -> Any:
        gate.wait(60)
        return write(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileSystemWriter, "write_data", slow)
        before = _pieces(model, keyed)
        store.save(model, keyed, Progress(step=1))
        _train(model, keyed, runtime, 1, 4)  # collectives of training beside those of the save
        held.append(_held(Path(folder)))
        runtime.barrier()
        gate.set()
        store.save(model, keyed, Progress(step=4))  # waits for step 1
        held.append([name for name in _held(Path(folder)) if not name.startswith(".")][:1])
        store.finish()
        held.append(_held(Path(folder)))
    store.load(1, model, keyed)
    return held, before, _pieces(model, keyed)


def test_what_is_written_beside_training_is_the_state_of_its_step(tmp_path: Path) -> None:
    ranks = run_ranks(2, _save_while_training, str(tmp_path))
    for held, _, _ in ranks:
        assert held == [[".step-00000001.tmp"], ["step-00000001"], ["step-00000001", "step-00000004"]]
    before, after = (_whole([rank[part] for rank in ranks]) for part in (1, 2))
    assert all(torch.equal(after[name], values) for name, values in before.items())


def _lose_the_folder(rank: int, world_size: int, folder: str, asynchronous: bool) -> tuple[str, str, list[int]]:
    runtime = Runtime(rank, world_size, torch.device("cpu"))
    model, keyed = _build(runtime, "table_wise", "sgd")
    store = CheckpointStore(Path(folder), runtime, asynchronous=asynchronous)
    store.save(model, keyed, Progress(step=1))
    write = FileSystemWriter.write_data

    def fail_on_the_last_rank(*args: Any) -> Any:
        if rank == world_size - 1:
            raise OSError(28, "No space left on device")
        return write(*args)

    with pytest.MonkeyPatch.context() as patch:
        store.finish()
        patch.setattr(FileSystemWriter, "write_data", fail_on_the_last_rank)
        with pytest.raises(UserError) as refused:
            store.save(model, keyed, Progress(step=2))
            store.finish()
    store.save(model, keyed, Progress(step=3))
    store.finish()
    return str(refused.value), folder, store.steps()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_save_that_fails_on_one_rank_fails_on_all_and_leaves_the_last_good_state(
    tmp_path: Path, asynchronous: bool
) -> None:
    for message, folder, steps in run_ranks(2, _lose_the_folder, str(tmp_path), asynchronous):
        assert message == (
            f"{folder}/step-00000002: the checkpoint cannot be written ([Errno 28] No space left on device)"
        )
        assert steps == [3]


def _keep(rank: int, world_size: int, folder: str, keep: int) -> list[list[int]]:
    runtime = Runtime(rank, world_size, torch.device("cpu"))
    model, keyed = _build(runtime, "table_wise", "sgd")
    store, steps = CheckpointStore(Path(folder), runtime, keep), []
    for step, best_step in [(1, -1), (2, 2), (3, 2), (4, 2), (5, 5), (6, 5)]:
        store.save(model, keyed, Progress(step=step, best_step=best_step))
        steps.append(store.steps())
    return steps


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    assert run_ranks(1, _keep, str(tmp_path / "one"), 1) == [[[1], [2], [2, 3], [2, 4], [5], [5, 6]]]
    assert run_ranks(1, _keep, str(tmp_path / "two"), 2) == [[[1], [1, 2], [2, 3], [2, 3, 4], [4, 5], [5, 6]]]
    assert _held(tmp_path / "two") == ["step-00000005", "step-00000006"]


def test_what_a_kill_left_is_completed_or_removed(tmp_path: Path) -> None:
    run_ranks(1, _save_and_go_on, str(tmp_path), "table_wise", "sgd")
    whole = tmp_path / "step-00000003"
    shutil.copytree(whole, tmp_path / ".step-00000004.tmp")  # killed before the rename
    progress = json.loads((whole / "progress.json").read_text())
    (tmp_path / ".step-00000004.tmp/progress.json").write_text(json.dumps({**progress, "step": 4}))
    shutil.copytree(whole, tmp_path / ".step-00000005.tmp")  # killed while it was written
    (tmp_path / ".step-00000005.tmp/progress.json").unlink()
    shutil.copytree(whole, tmp_path / ".step-00000001.removed")  # killed while it was removed
    store = CheckpointStore(tmp_path, Runtime(0, 1, torch.device("cpu")))
    assert store.steps() == [3, 4] and _held(tmp_path) == ["step-00000003", "step-00000004"]
    run_ranks(1, _load_and_go_on, str(tmp_path), "table_wise", "sgd")
