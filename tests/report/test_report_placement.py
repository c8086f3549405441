"""The page shows both sharding plans side by side, as the stages' files have them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sseds_rec.errors import UserError
from sseds_rec.report import write_report
from sseds_rec.report.artefacts import read_run
from sseds_rec.report.placement import read_placements
from tests.report.test_report_page import Page, edit

MakeRun = Callable[..., Path]


def _table(kind: str, rows: int, dim: int, shards: list[tuple[int, int, int]], kernel: str = "fused") -> dict[str, Any]:
    """Shards are (rank, rows, columns)."""
    return {
        "rows": rows,
        "embedding_dim": dim,
        "sharding_type": kind,
        "compute_kernel": kernel,
        "ranks": [rank for rank, _, _ in shards],
        "shards": [{"rank": r, "shard_offsets": [0, 0], "shard_sizes": [n, d]} for r, n, d in shards],
    }


BASE = {
    "embeddings": {
        "tailnum": _table("row_wise", 4000, 64, [(0, 2000, 64), (1, 2000, 64)]),
        "dest": _table("table_wise", 100, 64, [(1, 100, 64)], "fused_uvm"),
        "origin": _table("data_parallel", 4, 64, [], "dense"),
    },
    "managed": {"dest": _table("row_wise", 64, 64, [(0, 32, 64), (1, 32, 64)])},
}
SLIM = {"embeddings": {"tailnum": _table("column_wise", 4000, 8, [(0, 4000, 4), (1, 4000, 4)])}}


@pytest.fixture
def run(make_run: MakeRun) -> Path:
    run = make_run()
    for stage, modules in (("pretrain", BASE), ("retrain", SLIM)):
        content = {"version": 1, "world_size": 2, "local_world_size": 2, "modules": modules}
        (run / stage / "sharding_plan.json").write_text(json.dumps(content))
    return run


def test_both_plans_stand_side_by_side(run: Path) -> None:
    page = Page(write_report(run))
    assert page.tables[2][1:] == [
        ["tailnum", "row_wise", "all", "column_wise", "all"],
        ["embeddings.dest", "table_wise, fused_uvm", "1", "dropped", "–"],
        ["origin", "data_parallel", "all", "dropped", "–"],
        ["managed.dest", "row_wise", "all", "dropped", "–"],
    ]
    assert (
        "fullest of 2 ranks holds 0.52 MiB before and 0.061 MiB after; that is 1.02 and 1.00 times the mean"
        in page.text
    )
    assert 'id="ranks"' in page.source


def test_what_ranks_hold_is_counted_from_the_shards(run: Path) -> None:
    placements = read_placements(read_run(run))
    assert placements is not None
    shared = 4 * (2000 * 64 + 4 * 64 + 32 * 64) / 2**20
    np.testing.assert_allclose(placements.base.mib, [shared, shared + 4 * 100 * 64 / 2**20])
    np.testing.assert_allclose(placements.slim.mib, [4 * 4000 * 4 / 2**20] * 2)


def test_one_rank_has_no_chart(run: Path) -> None:
    modules = {"embeddings": {"tailnum": _table("table_wise", 4000, 8, [(0, 4000, 8)])}}
    for stage in ("pretrain", "retrain"):
        edit(run / stage / "sharding_plan.json", lambda plan: plan.update(world_size=1, modules=modules))
    page = Page(write_report(run))
    assert page.tables[2][1:] == [["tailnum", "table_wise", "0", "table_wise", "0"]]
    assert 'id="ranks"' not in page.source and "One rank holds all tables: 0.12 MiB before" in page.text


def test_runs_of_before_have_no_such_section(make_run: MakeRun) -> None:
    assert "Placement" not in Page(write_report(make_run())).text


def test_a_damaged_plan_is_named(run: Path) -> None:
    path = run / "retrain" / "sharding_plan.json"
    edit(path, lambda plan: plan["modules"]["embeddings"]["tailnum"]["shards"][0].update(rank=7))
    with pytest.raises(UserError, match="retrain/sharding_plan.json: is not as it should be: IndexError"):
        write_report(run)
