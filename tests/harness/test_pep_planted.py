"""PEP on data whose truth is known: sparsity rises with training, and fields of noise lose more than fields of signal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import sseds_rec as sr
from sseds_rec.config import load_config
from sseds_rec.data.synthetic import prepare_synthetic
from sseds_rec.data.truth import Truth
from sseds_rec.distributed.runtime import runtime
from sseds_rec.harness import pipeline_for
from sseds_rec.run_directory import RunDirectory

CONFIG = """
name: planted
device: cpu
data: {path: DATA}
model: {name: fm, embedding_dim: 8}
train: {epochs: 1, batch_size: 1024, learning_rate: 0.005}
search:
  method: pep
  budget: {parameters: 0.4}
  pep: {start: -8, learning_rate: 0.03, weight_decay: 0.01, epochs: 6, budgets: [0.8, 0.6]}
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The set, and a config for it."""
    folder = tmp_path_factory.mktemp("planted")
    prepare_synthetic(
        folder / "data",
        rows=100_000,
        fields=6,
        cardinality="80:80",
        zipf=0.3,
        ranks=[0, 4, 0, 4, 0, 0],
        duplicates=0,
        signal=3.0,
    )
    (folder / "planted.yaml").write_text(CONFIG.replace("DATA", str(folder / "data")))
    return folder, folder / "planted.yaml"


def test_thresholds_adapt_to_what_a_field_is_worth(planted: tuple[Path, Path]) -> None:
    folder, path = planted
    config, run = load_config(path), RunDirectory(folder / "run")
    with runtime("cpu") as place:
        pipeline = pipeline_for(config, run, place)
        run.open(config, place)
        pipeline.search()
    passed = json.loads(run.path("search/learned/learned.json").read_text())["passed"]
    steps = [passed[budget]["step"] for budget in ("0.8", "0.6", "0.4")]
    assert 20 < steps[0] < steps[1] < steps[2]

    plan, truth = sr.DimensionPlan.load(run.path("search/plan.json")), Truth.load(folder / "data")
    elements = plan.search["elements"]["tables"]
    left = {own.name: 4 * elements[own.name]["nonzeros"] / elements[own.name]["dense_bytes"] for own in truth.fields}
    noise, signal = ([own for own in truth.fields if bool(own.rank) is has] for has in (False, True))
    assert len(noise) == 4 and max(left[own.name] for own in noise) < min(left[own.name] for own in signal) / 2

    s = torch.empty(len(truth.fields), 1)
    dcp.load({"model": {"gate.s": s}}, checkpoint_id=run.path("search/checkpoint"))
    learned = dict(zip(elements, s.sigmoid().flatten().tolist(), strict=True))
    assert min(learned[own.name] for own in noise) > 1.1 * max(learned[own.name] for own in signal), learned
