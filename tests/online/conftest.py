"""A click log whose users come over time, in windows, and a finished experiment over them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from sseds_rec.data.table import prepare_table
from tests.command import Command

WINDOWS, ROWS = 7, 1500
CONFIG = """
name: stream
seed: 7
device: cpu
data: {path: DATA}
model: {name: deepfm, embedding_dim: 16, hidden: [16, 8]}
train: {epochs: 2, batch_size: 250, learning_rate: 0.01, patience: 2, embedding_l2: 0.001}
search: {budget: {parameters: 0.25}, batch_size: 250, num_batches: 2}
online: {warm_up: 3, research_every: 2}
"""


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """CSV files of 1,500 rows, one a day: each day twelve users are new, and tastes drift."""
    random = np.random.default_rng(0)
    folder, paths = tmp_path_factory.mktemp("days"), []
    taste, ads = random.normal(size=(200, 2)), random.normal(size=(2, 30))
    for day in range(WINDOWS):
        user, ad, noise = (random.integers(0, n, ROWS) for n in (40 + 12 * day, 30, 50))
        logit = 1.5 * np.einsum("bd,bd->b", taste[user], ads[:, ad].T) - 0.5 + 0.2 * day
        click = (random.random(ROWS) < 1 / (1 + np.exp(-logit))).astype(int)
        price = random.lognormal(2, 1, ROWS)
        tags = [f"t{u % 5}|t{d + day}" for u, d in zip(user, noise % 4, strict=True)]
        paths.append(folder / f"day-{day}.csv")
        pl.DataFrame({"click": click, "user": user, "ad": ad, "noise": noise, "price": price, "tags": tags}).write_csv(
            paths[-1]
        )
    return paths


def prepare(log: Path, output: Path, previous: Path | None, grow: bool = True) -> None:
    prepare_table(
        [log],
        output,
        label="click",
        categorical=["user", "ad", "noise"],
        numeric=["price"],
        sequence=["tags"],
        numeric_as="dense",
        split=(1, 0, 0),
        min_count=5,
        vocabulary=previous,
        grow=grow and previous is not None,
    )


@pytest.fixture(scope="session")
def windows(logs: list[Path]) -> Path:
    """The days as windows, each grown from the one before, as one prepares them when they come."""
    folder, previous = logs[0].parent / "windows", None
    for log in logs:
        prepare(log, folder / log.stem, previous)
        previous = folder / log.stem
    return folder


@pytest.fixture(scope="session")
def stream(windows: Path) -> Path:
    """A config that follows them in seconds."""
    path = windows.parent / "stream.yaml"
    path.write_text(CONFIG.replace("DATA", str(windows)))
    return path


@pytest.fixture(scope="module")
def followed(stream: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of an uninterrupted `sseds online`; tests only read it."""
    from tests.online.runs import follow

    run = tmp_path_factory.mktemp("online") / "run"
    follow(stream, run)
    return run


Sseds = Callable[..., Command]
