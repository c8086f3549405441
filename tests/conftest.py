"""A small click log with a known structure, and a run over it, shared by the tests of the pipeline and the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from sseds_rec.cli import main
from sseds_rec.data.table import prepare_table
from tests.command import Command

# One thread in each process, those that tests start too: all add in the same order, and two of them fill two cores.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

CONFIG = """
name: small
seed: 7
device: cpu
data: {path: DATA}
model: {embedding_dim: 16, hidden: [16, 8], dropout: 0.1}
train: {epochs: 3, batch_size: 256, learning_rate: 0.01, patience: 3}
search: {budget: {parameters: 0.25}}
"""


@pytest.fixture(scope="session")
def click_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of 8,000 rows: `user` and `ad` decide the click together, `hour` a little, `noise` not at all."""
    random = np.random.default_rng(0)
    user, ad, hour, noise = (random.integers(0, n, 8000) for n in (60, 40, 24, 80))
    taste = random.normal(size=(60, 2)) @ random.normal(size=(2, 40))
    logit = 1.5 * taste[user, ad] + 0.4 * np.sin(hour / 4) - 0.5
    frame = pl.DataFrame({"user": user, "ad": ad, "hour": hour, "noise": noise, "price": random.lognormal(2, 1, 8000)})
    frame = frame.with_columns(pl.Series("click", random.random(8000) < 1 / (1 + np.exp(-logit))).cast(pl.Int8))
    path = tmp_path_factory.mktemp("log") / "clicks.csv"
    frame.write_csv(path)
    return path


@pytest.fixture(scope="session")
def prepared(click_log: Path) -> Path:
    """The click log as a prepared set, `price` as a dense input."""
    output = click_log.parent / "prepared"
    prepare_table(
        [click_log],
        output,
        label="click",
        categorical=["user", "ad", "hour", "noise"],
        numeric=["price"],
        numeric_as="dense",
    )
    return output


@pytest.fixture(scope="session")
def config(prepared: Path) -> Path:
    """A config that trains in seconds."""
    path = prepared.parent / "small.yaml"
    path.write_text(CONFIG.replace("DATA", str(prepared)))
    return path


@pytest.fixture(scope="session")
def finished_run(config: Path) -> Path:
    """The run directory of an uninterrupted `sseds run` on one process; tests only read it."""
    folder = config.parent / "finished"
    done = subprocess.run(
        [sys.executable, "-m", "sseds_rec", "run", config, "--run-dir", folder, "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (folder / "stdout.txt").write_text(done.stdout)
    (folder / "stderr.txt").write_text(done.stderr)
    return folder


@pytest.fixture
def sseds(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Command]:
    """Runs `sseds ARGS` in this process."""

    def run(*args: object) -> Command:
        monkeypatch.setattr(sys, "argv", ["sseds", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        code = ended.value.code
        return Command(code if isinstance(code, int) else 0, out, err)

    return run
