"""The document's example is a complete method: it searches under the budget, and is trained and counted as the others."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import sseds_rec.harness.scratch
from sseds_rec.compare.accounting import count_tables
from sseds_rec.compare.contestants import CONTESTANTS
from sseds_rec.config import load_config
from sseds_rec.distributed.runtime import runtime
from sseds_rec.harness import PIPELINES, pipeline_for
from sseds_rec.run_directory import RunDirectory

DOCUMENT = (Path(__file__).parent.parent.parent / "docs/add-a-method.md").read_text()


def test_the_example_runs(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    function, pipeline = re.findall(r"```python\n(.*?)```", DOCUMENT, flags=re.DOTALL)
    module = ModuleType("sseds_rec.search.methods.root")
    exec(function, module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    scope = {**vars(sseds_rec.harness.scratch), "allocate_root": module.__dict__["allocate_root"]}
    exec(pipeline, scope)
    monkeypatch.setitem(PIPELINES, "root", scope["Root"])

    own = load_config(config, ["train.epochs=1"])
    own = own.model_copy(update={"search": own.search.model_copy(update={"method": "root"})})
    with runtime("cpu") as place:
        run = RunDirectory(tmp_path)
        found = pipeline_for(own, run, place)
        found.search()
        found.retrain()
    plan = found._plan()
    counts = count_tables(tmp_path / "retrain/checkpoint")
    limit = 0.25 * sum(table.rows * 16 for table in plan.tables.values())
    assert counts.columns == sum(table.rows * table.embedding_dim for table in plan.tables.values()) <= limit
    widths = {table.rows: table.embedding_dim for table in plan.tables.values()}
    assert widths[max(widths)] >= widths[min(widths)] > 0


def test_the_comparisons_document_names_every_method() -> None:
    document = (Path(__file__).parent.parent.parent / "docs/compare.md").read_text()
    table = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", document, flags=re.MULTILINE)
    assert sorted(re.findall(r"\w+", " ".join(table))) == sorted(CONTESTANTS)
