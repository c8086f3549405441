"""What training leaves in its logs, and what it says where nobody watches a terminal."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sseds_rec.training import progress
from sseds_rec.training.progress import History, StepReporter

#: Trains to step 40, validates at step 20, and is killed.
KILLED = """
import os, signal, sys
from pathlib import Path
from sseds_rec.training.progress import History
history = History(Path(sys.argv[1]), 0, True)
for step in (10, 20, 30, 40):
    history.add({"kind": "train", "step": step, "epoch": step / 20, "loss": 1 / step, "seconds": step * 0.1})
    if step == 20:
        history.add({"kind": "eval", "split": "validation", "step": 20, "epoch": 1, "auc": 0.75, "samples": 9})
os.kill(os.getpid(), signal.SIGKILL)
"""


def _curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_logs_go_on_after_a_kill_where_training_does(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, tmp_path], check=False)
    before = {
        "train/loss": [(step, pytest.approx(1 / step)) for step in (10, 20, 30, 40)],
        "validation/auc": [(20, 0.75)],
    }
    assert _curves(tmp_path) == before
    with open(tmp_path / "history.jsonl", "a") as file:
        file.write('{"kind": "train", "st')  # killed while it wrote
    (events,) = (tmp_path / "tensorboard").iterdir()
    with open(events, "ab") as file:
        file.write(b"\x10\x00\x00")
    time.sleep(1)  # TensorBoard reads files in order of the second that they were begun in

    history = History(tmp_path, 20, True)
    for step in (30, 40, 50):
        history.add({"kind": "train", "step": step, "epoch": step / 20, "loss": 2 / step, "seconds": step * 0.1})
    losses = [(10, 1 / 10), (20, 1 / 20), (30, 2 / 30), (40, 2 / 40), (50, 2 / 50)]
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"] == losses
    assert [line["step"] for line in lines] == [10, 20, 20, 30, 40, 50]
    after = {"train/loss": [(step, pytest.approx(loss)) for step, loss in losses], "validation/auc": [(20, 0.75)]}
    assert _curves(tmp_path) == after


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    History(tmp_path, 0, False).add({"kind": "train", "step": 1, "loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_a_line_every_ten_seconds_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    reporter = StepReporter("pretrain", enabled=True)
    with reporter.epoch(epoch=1, epochs=3, first=40, steps=100):
        for done in range(41, 101):
            now += 0.5
            reporter.step(done, loss=0.25, samples_per_second=4096.0)
    said = [
        f"pretrain epoch 2/3: {done}/100 steps  loss 0.2500  4,096 samples/s  ETA {eta} s"
        for done, eta in ((60, 20), (80, 10), (100, 0))
    ]
    assert capsys.readouterr().err.splitlines() == said
