"""`sseds prepare RECIPE` as a user runs it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from iopath.common.file_io import g_pathmgr

from tests.command import Command
from tests.data.test_recipes import AVAZU, criteo_lines

Sseds = Callable[..., Command]


def refused(done: Command, *words: str) -> None:
    """One line that names what is wrong, and exit code 2."""
    assert done.code == 2 and len(done.err.strip().splitlines()) == 1, done.err
    for word in words:
        assert word in done.err


def test_criteo(sseds: Sseds, tmp_path: Path) -> None:
    lines = criteo_lines(300)
    (tmp_path / "day_0").write_text("\n".join(lines[:200]) + "\n")
    (tmp_path / "day_1.txt").write_text("\n".join([*lines[200:], "0\tspoilt"]) + "\n")
    inputs = ["--input", tmp_path / "day_0", "--input", tmp_path / "day_1.txt", "--output", tmp_path / "set"]
    refused(sseds("prepare", "criteo", *inputs), "day_1.txt, row 101: has 2 cells instead of 40")
    assert not (tmp_path / "set").exists()

    done = sseds("prepare", "criteo", *inputs, "--on-error", "skip", "--hash", "C3=1000, C4=50", "--json")
    assert done.code == 0, done.err
    assert done.json["rows"] == {"train": 240, "validation": 30, "test": 30} and done.json["rejected"] == 1
    assert "1 rows skipped, listed in" in done.out and "rejected.csv" in done.out
    fields = {field["name"]: field for field in json.loads((tmp_path / "set" / "schema.json").read_text())["fields"]}
    assert len(fields) == 39 and fields["C3"]["cardinality"] == 1000 and fields["C4"]["transform"] == "hash"

    more = ["--input", tmp_path / "day_0", "--output", tmp_path / "more", "--split", "1,0,0", "--hash", "C3=1000,C4=50"]
    done = sseds("prepare", "criteo", *more, "--vocabulary", tmp_path / "set", "--grow", "--json")
    assert done.code == 0, done.err
    assert done.json["rows"] == {"train": 200, "validation": 0, "test": 0}
    refused(
        sseds("prepare", "criteo", *inputs, "--overwrite", "--on-error", "skip", "--hash", "C3"),
        "--hash 'C3'",
        "FIELD=ROWS",
    )
    refused(sseds("prepare", "criteo", *inputs, "--vocabulary", tmp_path / "none"), "none", "no such file")


def test_avazu(sseds: Sseds, tmp_path: Path) -> None:
    rows = [f"{row},{row % 2},1410{21 + row // 24:02}{row % 24:02}{',a' * 21}" for row in range(200)]
    (tmp_path / "train.csv").write_text("\n".join([AVAZU, *rows]) + "\n")
    options = ["--input", tmp_path / "train.csv", "--output", tmp_path / "set"]
    done = sseds("prepare", "avazu", *options, "--split-by", "time", "--min-count", "1", "--json")
    assert done.code == 0, done.err
    assert done.json["rows"] == {"train": 160, "validation": 20, "test": 20} and done.json["fields"] == 23
    (tmp_path / "train.csv").write_text("\n".join([AVAZU.replace("C14", "C15x"), *rows]) + "\n")
    refused(sseds("prepare", "avazu", *options, "--overwrite"), "train.csv", "no column 'C14'")


def test_synthetic(sseds: Sseds, tmp_path: Path) -> None:
    size = ["--rows", "3000", "--fields", "6", "--cardinality", "5:50", "--ranks", "0,1,2", "--duplicates", "1"]
    done = sseds("prepare", "synthetic", "--output", tmp_path / "set", *size, "--json")
    assert done.code == 0, done.err
    assert done.json["rows"] == {"train": 2400, "validation": 300, "test": 300}
    truth = json.loads((tmp_path / "set" / "truth.json").read_text())
    assert [field["rank"] for field in truth["fields"]] == [0, 1, 2, 0, 1, 0]
    refused(sseds("prepare", "synthetic", "--output", tmp_path / "other", "--positive-rate", "1"), "positive-rate 1")
    assert not (tmp_path / "other").exists()


def test_stores_are_registered_by_a_module_of_the_user(
    sseds: Sseds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "day_0").write_text("\n".join(criteo_lines(100)) + "\n")
    (tmp_path / "own_stores.py").write_text(
        "from pathlib import Path\nfrom iopath.common.file_io import g_pathmgr\nfrom tests.store import Store\n"
        f"g_pathmgr.register_handler(Store(Path({str(tmp_path / 'data')!r})))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(g_pathmgr, "_path_handlers", dict(g_pathmgr._path_handlers))
    refused(sseds("prepare", "criteo", "--input", "test://day_0", "--output", "test://set"), "test://", "SSEDS_STORES")
    monkeypatch.setenv("SSEDS_STORES", "no_such_module")
    refused(
        sseds("prepare", "criteo", "--input", "test://day_0", "--output", "test://set"), "SSEDS_STORES=no_such_module"
    )
    monkeypatch.setenv("SSEDS_STORES", "own_stores")
    done = sseds("prepare", "criteo", "--input", "test://day_0", "--output", "test://set")
    assert done.code == 0 and (tmp_path / "data" / "set" / "schema.json").exists(), done.err
