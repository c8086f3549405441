"""`sseds slim SRC DST --plan plan.json`, as a user runs it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from sseds_rec import cli_slim
from tests.command import Command, torchrun
from tests.slim.checkpoints import (
    TABLES,
    assert_same,
    entries,
    full_state,
    plan_of,
    slim_entries,
    small_parts,
    weights,
)

Sseds = Callable[..., Command]


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """A checkpoint, beside a plan for it."""
    dcp.save(full_state(), checkpoint_id=tmp_path / "full")
    plan_of().save(tmp_path / "plan.json")
    return tmp_path / "full"


def test_it_converts_and_says_what_it_did(sseds: Sseds, full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_slim, "LINE_SECONDS", 0.0)
    slim, plan = full.with_name("slim"), full.with_name("plan.json")
    with small_parts():
        done = sseds("slim", full, slim, "--plan", plan, "--processes", 1, "--json")
    assert done.code == 0, done.err
    assert_same(entries(slim), slim_entries(entries(full)))
    parts = len(list(slim.glob("*.distcp")))
    assert done.err.splitlines()[-1] == f"slim: {parts} of {parts} parts" and f"slim: 3 of {parts} parts" in done.err
    assert done.out.startswith(f"slim: wrote {slim}: {parts} parts, ") and " rows verified" in done.out
    own = done.json
    assert own["verb"] == "slim" and own["src"] == str(full) and own["dst"] == str(slim) and own["plan"] == str(plan)
    assert own["parts"] == parts and own["parts_before"] == 0 and own["seconds"] > 0 and own["rows_verified"] > 100
    assert own["bytes_written"] == sum(path.stat().st_size for path in slim.glob("*.distcp"))


def test_bytes_read_are_those_of_what_is_kept(sseds: Sseds, tmp_path: Path) -> None:
    tables = {f"m.embedding_bags.{name}.weight": value for name, value in weights().items()}
    dcp.save(tables, checkpoint_id=tmp_path / "full")
    torch.save(tables, tmp_path / "full.pt")
    plan_of().save(tmp_path / "plan.json")
    converted = sum(4 * TABLES[name][0] * TABLES[name][1] for name in "acd")
    for suffix in ("", ".pt"):
        places = tmp_path / f"full{suffix}", tmp_path / f"slim{suffix}"
        own = sseds("slim", *places, "--plan", tmp_path / "plan.json", "--json").json
        copied = own["bytes_read"] - converted  # of table e, which is kept as it is
        assert copied == 4 * 20 * 8 if suffix else 640 < copied < 3000
        assert own["parts"] == 1


def test_it_goes_on_and_says_so(sseds: Sseds, full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sseds_rec.slim.offline import job

    slim, plan = full.with_name("slim"), full.with_name("plan.json")
    helper = full.with_name("helper")
    helper.write_text("#!/bin/sh\nsleep 0.1\nkill -9 $$\n")
    helper.chmod(0o755)
    with small_parts(), monkeypatch.context() as patch:
        patch.setattr(job.sys, "executable", str(helper))
        killed = sseds("slim", full, slim, "--plan", plan, "--processes", 2)
        assert (
            killed.code == 2 and len(killed.err.splitlines()) == 1 and "the same call goes on from there" in killed.err
        )
    before = len(list(full.with_name(".slim.converting").glob("part-*.json")))
    with small_parts():
        own = sseds("slim", full, slim, "--plan", plan, "--processes", 1, "--json")
    assert own.json["parts_before"] == before > 0 and f"({before} more were made before)" in own.out
    assert own.json["parts"] + before == len(list(slim.glob("*.distcp")))


def test_command_lines_of_neither_form(sseds: Sseds, full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slim, plan = full.with_name("slim"), full.with_name("plan.json")
    for arguments, said in (
        ([full], "--plan takes SRC and DST, and 1 were given: sseds slim SRC DST --plan plan.json"),
        ([full, slim, "train.epochs=2"], "--plan takes SRC and DST, and 3 were given"),
        ([full, slim, "--paper"], "--paper goes with a config, not with --plan"),
        ([full, slim, "--rerun"], "--rerun goes with a config, not with --plan"),
        ([full, slim, "--run-dir", "x"], "--run-dir goes with a config, not with --plan"),
        ([full, slim, "--processes", 0], "--processes"),
        ([full.with_name("none"), slim], "none: no checkpoint here"),
    ):
        refused = sseds("slim", *arguments, "--plan", plan)
        assert refused.code == 2 and len(refused.err.splitlines()) == 1 and said in refused.err, refused.err
    refused = sseds("slim", full, slim, "--plan", full.with_name("other.json"))
    assert refused.code == 2 and refused.err == f"sseds: {full.with_name('other.json')}: no such file\n"
    refused = sseds("slim", "configs/flights_deepfm.yaml", "--processes", 2)
    assert refused.code == 2 and "--processes goes with --plan" in refused.err
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused = sseds("slim", full, slim, "--plan", plan, "--processes", 2)
    assert refused.code == 2 and "--processes goes without torchrun" in refused.err
    assert sorted(path.name for path in full.parent.iterdir()) == ["full", "plan.json"]


def test_under_torchrun_one_rank_speaks(full: Path) -> None:
    slim, plan = full.with_name("slim"), full.with_name("plan.json")
    said = torchrun(2, "slim", full, slim, "--plan", plan, "--json")
    wrote, line = said.strip().splitlines()
    assert wrote.startswith(f"slim: wrote {slim}: 1 parts") and json.loads(line)["parts"] == 1
    assert_same(entries(slim), slim_entries(entries(full)))
