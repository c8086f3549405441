"""Exports: what other systems read is what the plan says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor

import sseds_rec as sr
from sseds_rec.export import export_plan
from sseds_rec.search.plan import TablePlan
from tests.command import Command

Sseds = Callable[..., Command]

DOCUMENT = Path(__file__).parent.parent / "docs/export.md"


def _table(rows: int, kept: list[int], features: list[str], pooling: Any = "SUM") -> TablePlan:
    stored = {0: 0, 4: 4, 6: 8, 8: 8}[len(kept)]
    return TablePlan(
        rows=rows,
        original_dim=16,
        kept=kept,
        embedding_dim=len(kept),
        stored_dim=stored,
        feature_names=features,
        pooling=pooling,
    )


def _plan(**others: TablePlan) -> sr.DimensionPlan:
    """A table stored wider than kept, one of two features, one of sequences, one that is dropped."""
    tables = {
        "user": _table(100, [0, 1, 2, 5, 7, 9], ["user"]),
        "ads": _table(50, [3, 4, 5, 6], ["ad", "last_ad"]),
        "hour": _table(24, [], ["hour"]),
        "tags": _table(30, list(range(8)), ["tags"], "MEAN"),
    }
    return sr.DimensionPlan(tables=tables | others, budget={}, reached={})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    _plan().save(path)
    return path


def test_torchrec_snippet_builds_the_slim_collection(
    saved: Path, sseds: Sseds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = sseds("export", saved, "--format", "torchrec", "--output", tmp_path / "tables.json")
    assert (done.code, done.out) == (0, f"export: wrote {tmp_path / 'tables.json'}\n")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    found: dict[str, Any] = {}
    exec(code, found)
    ebc = found["ebc"]
    assert isinstance(ebc, EmbeddingBagCollection)
    assert {name: tuple(bag.weight.shape) for name, bag in ebc.embedding_bags.items()} == {
        "user": (100, 8),
        "ads": (50, 4),
        "tags": (30, 8),
    }
    assert [bag.mode for bag in ebc.embedding_bags.values()] == ["sum", "sum", "mean"]
    keys = ["user", "ad", "last_ad", "tags"]
    out = ebc(KeyedJaggedTensor(keys, torch.tensor([1, 2, 3, 4, 5]), lengths=torch.tensor([1, 1, 1, 2])))
    assert dict(zip(out.keys(), out.length_per_key(), strict=True)) == {"user": 8, "ad": 4, "last_ad": 4, "tags": 8}


def test_fuxictr_specs(saved: Path, sseds: Sseds) -> None:
    done = sseds("export", saved, "--format", "fuxictr")
    assert done.code == 0
    assert yaml.safe_load(done.out) == {
        "use_features": ["user", "ad", "last_ad", "tags"],
        "feature_specs": [
            {"name": "user", "embedding_dim": 6},
            {"name": "ad", "embedding_dim": 4},
            {"name": "last_ad", "embedding_dim": 4, "share_embedding": "ad"},
            {"name": "tags", "embedding_dim": 8},
        ],
    }
    indented = "slim:\n" + "".join(f"  {line}" for line in done.out.splitlines(keepends=True))
    assert yaml.safe_load(indented) == {"slim": yaml.safe_load(done.out)}  # as the document says to use it


def test_fuxictr_takes_any_feature_name() -> None:
    names = ["yes", "1", "a: b", "line\nbreak", "# no", "größe"]
    plan = _plan(odd=_table(9, [0, 1, 2, 3], names), gone=_table(9, [], ["line\nfeed: ["]))
    found = yaml.safe_load(export_plan(plan, "fuxictr"))
    assert found["use_features"][-len(names) :] == names
    assert [spec["name"] for spec in found["feature_specs"]] == found["use_features"]


def test_easyrec_features(saved: Path, sseds: Sseds) -> None:
    done = sseds("export", saved, "--format", "easyrec")
    fields = ("feature_name", "embedding_name", "embedding_dim", "num_buckets", "pooling")
    rows = [
        ("user", "user", 8, 100, "sum"),
        ("ad", "ads", 4, 50, "sum"),
        ("last_ad", "ads", 4, 50, "sum"),
        ("tags", "tags", 8, 30, "mean"),
    ]
    assert json.loads(done.out) == {
        "feature_configs": [{"id_feature": dict(zip(fields, row, strict=True))} for row in rows]
    }


def test_easyrec_names_tables_as_modules_can_be_and_gives_sequences_no_pooling() -> None:
    plan = _plan(**{"sparse.ec.history": _table(9, [0, 1, 2, 3], ["history"], "NONE")})
    last = json.loads(export_plan(plan, "easyrec"))["feature_configs"][-1]["id_feature"]
    assert last == {
        "feature_name": "history",
        "embedding_name": "sparse_ec_history",
        "embedding_dim": 4,
        "num_buckets": 9,
    }


def test_a_table_without_features_is_looked_up_by_its_name() -> None:
    plan = _plan(plain=_table(9, [0, 1, 2, 3], []))
    assert json.loads(export_plan(plan, "torchrec"))[-1]["feature_names"] == ["plain"]
    assert yaml.safe_load(export_plan(plan, "fuxictr"))["use_features"][-1] == "plain"


def test_a_feature_of_a_kept_and_a_dropped_table_stays(sseds: Sseds, tmp_path: Path) -> None:
    _plan(wide=_table(24, [], ["user"])).save(tmp_path / "plan.json")
    done = sseds("export", tmp_path / "plan.json", "--format", "fuxictr", "--json")
    assert done.json["dropped"] == ["hour"]


def test_one_width_a_feature(sseds: Sseds, tmp_path: Path) -> None:
    _plan(wide=_table(24, [0, 1, 2, 3], ["user"])).save(tmp_path / "plan.json")
    for form in ("fuxictr", "easyrec"):
        _refused(
            sseds("export", tmp_path / "plan.json", "--format", form), "feature user: tables user and wide", "torchrec"
        )
    assert sseds("export", tmp_path / "plan.json", "--format", "torchrec").code == 0


def test_of_a_run_directory_with_json(saved: Path, sseds: Sseds, tmp_path: Path) -> None:
    (tmp_path / "run/search").mkdir(parents=True)
    plan = saved.rename(tmp_path / "run/search/plan.json")
    output = tmp_path / "specs.yaml"
    done = sseds("export", tmp_path / "run", "--format", "fuxictr", "--output", output, "--json")
    assert done.json == {
        "verb": "export",
        "plan": str(plan),
        "format": "fuxictr",
        "output": str(output),
        "dropped": ["hour"],
    }
    assert output.read_text() == sseds("export", plan, "--format", "fuxictr").out


def _refused(done: Command, *words: str) -> None:
    assert done.code == 2 and done.out == ""
    assert done.err.count("\n") == 1 and "Traceback" not in done.err
    for word in words:
        assert word in done.err, done.err


def test_errors_are_one_line(saved: Path, sseds: Sseds, tmp_path: Path) -> None:
    before = saved.read_bytes()
    torchrec = ("--format", "torchrec")
    _refused(sseds("export", saved, "--format", "tensorflow"), "tensorflow", "fuxictr")
    _refused(sseds("export", saved), "--format")
    _refused(sseds("export", tmp_path / "none.json", *torchrec), "none.json: no such file")
    _refused(sseds("export", tmp_path, *torchrec), "search/plan.json: no such file", "sseds search")
    _refused(sseds("export", saved, *torchrec, "--output", tmp_path / "a/b.json"), f"no folder {tmp_path / 'a'}")
    _refused(sseds("export", saved, *torchrec, "--output", tmp_path), "is a folder")
    _refused(sseds("export", saved, *torchrec, "--output", saved), "is the plan itself")
    for content, words in (("{}", "tables"), ("[1]", "plan"), ("{", "not valid JSON")):
        (tmp_path / "other.json").write_text(content)
        _refused(sseds("export", tmp_path / "other.json", *torchrec), "other.json", words)
    assert saved.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.json", "plan.json"]


def test_a_plan_that_keeps_nothing_is_refused(saved: Path, sseds: Sseds, tmp_path: Path) -> None:
    sr.DimensionPlan(tables={"hour": _table(24, [], ["hour"])}, budget={}, reached={}).save(saved)
    _refused(sseds("export", saved, "--format", "fuxictr"), "the plan keeps no column")


def test_unknown_format_in_python() -> None:
    with pytest.raises(sr.UserError, match="unknown format 'onnx'; choose one of torchrec, fuxictr, easyrec"):
        export_plan(_plan(), "onnx")  # type: ignore[arg-type]


def test_importing_it_needs_no_torch() -> None:
    code = "import sys, sseds_rec.export, sseds_rec.output, sseds_rec.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
