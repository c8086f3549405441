"""Pieces of training that the end-to-end tests cannot see."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemWriter

from sseds_rec.data.batch import Batch
from sseds_rec.data.loader import Loader
from sseds_rec.distributed.runtime import Runtime, runtime
from sseds_rec.distributed.sharding import ShardingConfig, shard
from sseds_rec.errors import Preempted, UserError
from sseds_rec.models import ModelConfig, build_model
from sseds_rec.training.config import TrainConfig
from sseds_rec.training.optimizers import build_optimizer, fuse_table_optimizer, placement_for
from sseds_rec.training.trainer import Loaders, Trainer, average_batch_norm
from tests.ranks import run_ranks


def _batch_norm_on_rank(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[1].running_mean.fill_(1.0 + rank)
    model[1].running_var.fill_(4.0 * (1 + rank))
    average_batch_norm(model, Runtime(rank, world_size, torch.device("cpu")))
    return model[1].running_mean, model[1].running_var


def test_running_statistics_are_averaged_over_ranks() -> None:
    for mean, var in run_ranks(2, _batch_norm_on_rank):
        assert mean.tolist() == [1.5, 1.5] and var.tolist() == [6.0, 6.0]


BATCH = 256
#: Everything that a schedule does: the rates rise for one epoch and a half, and fall whenever the AUC does not rise.
SCHEDULE: dict[str, Any] = {
    "epochs": 8,
    "batch_size": BATCH,
    "optimizer": "AdamW",
    "optimizer_options": {"weight_decay": 0.1},
    "learning_rate": 0.2,
    "warmup_steps": 30,
    "clip_norm": 0.1,
    "patience": 3,
    "reduce_patience": 1,
    "reduce_factor": 0.25,
    "checkpoint_steps": 7,
}


class _Killed(Exception):
    """Stands for a kill: nothing that the trainer would do in the end is done."""


class _Mortal(Loader):
    """A loader that dies when it has given `life` batches, or whose process gets SIGTERM when it has given all."""

    life = 10**9
    sends_sigterm = False

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            if self.life == 0:
                raise _Killed
            self.life -= 1
            yield batch
        if self.sends_sigterm:
            os.kill(os.getpid(), signal.SIGTERM)


def _trainer(prepared: Path, folder: Path, config: TrainConfig, place: Runtime) -> Trainer:
    batch, mine = BATCH // place.world_size, {"rank": place.rank, "world_size": place.world_size}
    train = _Mortal(prepared, "train", batch, seed=3, shuffle=True, drop_last=True, **mine)
    torch.manual_seed(3)
    model = build_model(ModelConfig(embedding_dim=8, hidden=[16], dropout=0.2, batch_norm=True), train.schema)
    placement = placement_for(config.table_optimizer, "auto", place.device)
    fuse_table_optimizer(model, config.table_optimizer, config.table_rate, placement)
    torch.manual_seed(3 + place.rank)
    sharded = shard(model, ShardingConfig(type=placement), place, batch)
    loaders = Loaders(train, _Mortal(prepared, "validation", batch, **mine))
    return Trainer(sharded, build_optimizer(sharded, config), loaders, config, folder, place)


def _state(trainer: Trainer) -> dict[str, Tensor]:
    """Every number of the model and its optimizers."""
    state = {f"model.{name}": value for name, value in trainer.model.state_dict().items()}
    for name, values in trainer.optimizer.state_dict()["state"].items():
        state |= {f"{name}.{key}": value for key, value in values.items()}
    return {
        name: value.local_shards()[0].tensor if hasattr(value, "local_shards") else value
        for name, value in state.items()
    }


def _events(folder: Path, kind: str) -> list[dict[str, Any]]:
    events = map(json.loads, (folder / "history.jsonl").read_text().splitlines())
    return [event for event in events if event["kind"] == kind]


@pytest.mark.parametrize("table_optimizer", ["adam", "rowwise_adagrad"])
def test_schedules_survive_kills_bit_for_bit(table_optimizer: str, prepared: Path, tmp_path: Path) -> None:
    config = TrainConfig(**SCHEDULE, table_optimizer=table_optimizer)
    with runtime("cpu") as place:
        whole = _trainer(prepared, tmp_path / "whole", config, place)
        expected = whole.fit()
        assert expected.reductions >= 1
        after = [e["step"] for e in _events(tmp_path / "whole", "train") if e["step"] > 30 and e["learning_rate"] < 0.2]
        for step in (17, 40, after[0] + 5):  # warming up, warm, reduced
            killed = _trainer(prepared, tmp_path / "killed", config, place)
            killed.loaders.train.life = step - killed.progress.step
            with pytest.raises(_Killed):
                killed.fit()
        resumed = _trainer(prepared, tmp_path / "killed", config, place)
        assert resumed.progress.reductions >= 1
        progress = resumed.fit()
    times = {"seconds", "train_seconds"}
    assert progress.model_dump(exclude=times) == expected.model_dump(exclude=times)
    ours, theirs = _state(resumed), _state(whole)
    assert ours.keys() == theirs.keys() and any("embedding_bags" in name for name in ours)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_rates_fall_when_the_auc_does_not_rise_and_training_ends_with_patience(prepared: Path, tmp_path: Path) -> None:
    config = TrainConfig(**{**SCHEDULE, "epochs": 30, "learning_rate": 0.2, "patience": 4, "reduce_patience": 2})
    with runtime("cpu") as place:
        trainer = _trainer(prepared, tmp_path, config, place)
        steps = len(trainer.loaders.train)
        progress = trainer.fit()
    aucs = [event["auc"] for event in _events(tmp_path, "eval")]
    assert len(aucs) == progress.epoch < 30
    rates, bad, best = [1.0], 0, 0.0
    for auc in aucs:  # of the epochs, after which the next one's rate is known
        bad = 0 if auc > best else bad + 1
        best = max(best, auc)
        rates.append(rates[-1] * (0.25 if bad and bad % 2 == 0 else 1.0))
    assert bad == 4 and progress.best_auc == best
    assert progress.best_step == steps * (aucs.index(best) + 1) and progress.best_step in trainer.checkpoints.steps()
    for event in _events(tmp_path, "train"):
        last = event["step"] - 1
        expected = 0.2 * min(1.0, (last + 1) / 30) * rates[last // steps]
        assert event["learning_rate"] == pytest.approx(expected)


def test_a_loss_that_is_not_finite_is_named_by_its_step(prepared: Path, tmp_path: Path) -> None:
    config = TrainConfig(batch_size=BATCH, optimizer="SGD", learning_rate=1e30)
    with (
        runtime("cpu") as place,
        pytest.raises(UserError, match=r"the loss is nan at step \d+ .*train.learning_rate=1e\+30"),
    ):
        _trainer(prepared, tmp_path / "pretrain", config, place).fit()


def _kill_and_resume(rank: int, world_size: int, prepared: Path, folder: Path) -> tuple[list[str], list[str]]:
    """Names of what differs from a training without checkpoints on the way: at all, and by more than rounding."""
    place = Runtime(rank, world_size, torch.device("cpu"))
    config = TrainConfig(epochs=1, batch_size=BATCH)
    whole = _trainer(prepared, folder / "whole", config, place)
    whole.fit()
    config = config.model_copy(update={"checkpoint_steps": 20})
    killed = _trainer(prepared, folder / "killed", config, place)
    killed.loaders.train.life = 23
    with pytest.raises(_Killed):
        killed.fit()
    resumed = _trainer(prepared, folder / "killed", config, place)
    assert resumed.progress.step == 20 < len(resumed.loaders.train)
    resumed.fit()
    ours, theirs = _state(resumed), _state(whole)
    assert ours.keys() == theirs.keys()
    return (
        [name for name, value in ours.items() if not torch.equal(value, theirs[name])],
        [name for name, value in ours.items() if not torch.allclose(value, theirs[name], rtol=1e-6, atol=1e-7)],
    )


def test_two_ranks_killed_within_an_epoch_resume_with_the_statistics_of_both(prepared: Path, tmp_path: Path) -> None:
    """The running statistics are averaged once more than without the kill, in float32; nothing else may differ by a bit."""
    for differ, differ_much in run_ranks(2, _kill_and_resume, prepared, tmp_path):
        assert all("running_" in name for name in differ) and differ_much == []


def _stop_and_resume(
    rank: int, world_size: int, prepared: Path, folder: Path, stops_in: str
) -> tuple[int, int, int, bool]:
    """Steps, epochs and batches done when SIGTERM, to the last rank, has stopped all; whether the end is as without it."""
    place = Runtime(rank, world_size, torch.device("cpu"))
    config = TrainConfig(epochs=2, batch_size=BATCH)
    whole = _trainer(prepared, folder / "whole", config, place)
    whole.fit()
    stopped = _trainer(prepared, folder / "stopped", config, place)
    getattr(stopped.loaders, stops_in).sends_sigterm = rank == world_size - 1
    with pytest.raises(Preempted):
        stopped.fit()
    resumed = _trainer(prepared, folder / "stopped", config, place)
    at = resumed.progress.model_copy()
    resumed.fit()
    ours, theirs = _state(resumed), _state(whole)
    same = resumed.progress.best_auc == whole.progress.best_auc and ours.keys() == theirs.keys()
    same = same and all(torch.equal(value, theirs[name]) for name, value in ours.items())
    return at.step, at.epoch, at.loader.get("batch", 0), same


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("stops_in", "epoch", "batch"), [("train", 0, 25), ("validation", 1, 0)])
def test_sigterm_in_the_last_step_or_in_validation_stops_after_it(
    prepared: Path, tmp_path: Path, ranks: int, stops_in: str, epoch: int, batch: int
) -> None:
    stops = run_ranks(ranks, _stop_and_resume, prepared, tmp_path, stops_in)
    assert stops == [(25, epoch, batch, True)] * ranks
    for folder in ("stopped", "whole"):
        assert [event["step"] for event in _events(tmp_path / folder, "eval")] == [25, 50]


def test_a_checkpoint_under_way_is_not_lost_to_a_loss_that_is_not_finite(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = FileSystemWriter.write_data

    def slow(*args: Any) -> Any:
        time.sleep(0.3)
        return write(*args)

    monkeypatch.setattr(FileSystemWriter, "write_data", slow)
    config = TrainConfig(
        batch_size=BATCH, optimizer="SGD", learning_rate=1e30, checkpoint_steps=1, async_checkpoints=True
    )
    with runtime("cpu") as place:
        trainer = _trainer(prepared, tmp_path, config, place)
        with pytest.raises(UserError, match="the loss is nan at step"):
            trainer.fit()
        assert trainer.checkpoints.steps() == [trainer.progress.step - 1]
