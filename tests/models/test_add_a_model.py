"""The document's example is a complete model: it is slimmed as exactly as the package's own, and runs through all stages."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import sseds_rec.models
from sseds_rec.models import MODELS
from tests.command import Command
from tests.models.test_ticket import assert_slim_equals_masked

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def source() -> Iterator[str]:
    """The example's code, its model registered."""
    before = dict(MODELS)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/add-a-model.md").read_text(), flags=re.DOTALL)
    exec(code, {"__name__": "sseds_rec.models.nfm"})
    assert MODELS.keys() - before.keys() == {"nfm"}
    yield code
    MODELS.clear()
    MODELS.update(before)


@pytest.mark.parametrize("num_dense", [0, 3])
def test_its_slim_form_equals_the_masked_full_model(source: str, num_dense: int, tmp_path: Path) -> None:
    assert_slim_equals_masked("nfm", num_dense, tmp_path, aligns=True, source=source)


def test_it_runs_through_all_stages(source: str, config: Path, sseds: Callable[..., Command], tmp_path: Path) -> None:
    settings = ["train.epochs=6", "model.batch_norm=true", "model.dropout=0", "retrain.transform=random"]
    done = sseds("run", config, "model.name=nfm", *settings, "--run-dir", tmp_path / "run")
    assert done.code == 0, done.err
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["pretrain"]["auc"] > 0.65 and metrics["retrain"]["auc"] > 0.65
    assert metrics["retrain"]["embedding_parameters"] <= 0.25 * metrics["pretrain"]["embedding_parameters"]


def test_the_document_names_every_model() -> None:
    table = re.findall(r"^\| `(\w+)` \| (\w+) \|", (ROOT / "docs/add-a-model.md").read_text(), flags=re.MULTILINE)
    assert {name: takes != "raw" for name, takes in table} == {name: model.aligns for name, model in MODELS.items()}
    assert all(hasattr(sseds_rec.models, name) for name, _ in table)
