"""Plans for clusters, against all plans there are, each asked of TorchRec's planner directly."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.storage_reservations import HeuristicalStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError, Topology
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim import Adam, apply_optimizer_in_backward

import sseds_rec as sr
from sseds_rec.config import load_config
from sseds_rec.data.dataset import open_dataset
from sseds_rec.distributed.hardware import MARGIN, Cluster
from sseds_rec.forecast import search_budget
from sseds_rec.output import print_fit
from sseds_rec.search.scores import DimensionScores
from tests.command import Command
from tests.search.problems import make_scores

BATCH = 16
ROWS = [900, 400, 70]
DIM = 16


def _scores(rows: Sequence[int] = ROWS, dim: int = DIM) -> DimensionScores:
    return make_scores([[1 / (1 + i + j) for j in range(dim)] for i in range(len(rows))], list(rows))


@cache
def _planner_finds_a_place(shapes: tuple[tuple[int, int], ...], kib: int, ranks: int, dense: int = 1) -> bool:
    """TorchRec's planner, with nothing of ours but the margin."""
    names = {f"x{i}": shape for i, shape in enumerate(shapes) if shape[1]}
    configs = [
        EmbeddingBagConfig(name=name, feature_names=[name], num_embeddings=rows, embedding_dim=-(-dim // 4) * 4)
        for name, (rows, dim) in names.items()
    ]
    module = torch.nn.ModuleList([EmbeddingBagCollection(configs, device=torch.device("meta"))])
    apply_optimizer_in_backward(Adam, module.parameters(), {"lr": 0.1})
    kinds = [kind.value for kind in ShardingType if kind != ShardingType.DATA_PARALLEL]
    constraints = {name: ParameterConstraints(sharding_types=kinds, compute_kernels=["fused"]) for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reservation = HeuristicalStorageReservation(MARGIN, dense_tensor_estimate=dense)
    planner = EmbeddingShardingPlanner(
        topology=Topology(ranks, "cuda", hbm_cap=kib * 1024, local_world_size=ranks),
        batch_size=BATCH,
        constraints=constraints,
        storage_reservation=reservation,
    )
    try:
        planner.plan(module, [EmbeddingBagCollectionSharder()])
    except PlannerError:
        return False
    return True


def _fits(scores: DimensionScores, widths: Sequence[int], kib: int, ranks: int) -> bool:
    shapes = tuple((table.rows, width) for table, width in zip(scores.tables.values(), widths, strict=True))
    return any(widths) and _planner_finds_a_place(shapes, kib, ranks)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kib", [40, 75, 120, 220, 400])
@pytest.mark.parametrize("order", ["knapsack", "fill", "stop"])
def test_the_plan_fits_and_the_next_group_does_not(order: Any, kib: int, ranks: int) -> None:
    scores = _scores()
    budget = sr.Budget(fits=f"1x{ranks}xhbm={kib}KiB", batch_size=BATCH)
    plan = sr.allocate(scores, budget, order=order)
    widths = tuple(plan.dims().values())
    assert _fits(scores, widths, kib, ranks)
    if order == "knapsack":
        wider = [(*widths[:i], widths[i] + 4, *widths[i + 1 :]) for i in range(3) if widths[i] < DIM]
        assert not any(_fits(scores, other, kib, ranks) for other in wider)
    elif order == "stop":
        line = sorted(
            (-float(scores[name][j : j + 4].mean()) / n**0.5, i)
            for i, (name, n) in enumerate(zip(scores, ROWS, strict=True))
            for j in range(0, DIM, 4)
        )
        taken = sum(widths) // 4
        counts = [[owner for _, owner in line[:k]] for k in (taken, taken + 1)]
        now, then = ([4 * own.count(i) for i in range(3)] for own in counts)
        assert list(widths) == now
        assert taken == len(line) or not _fits(scores, then, kib, ranks)
    memory = plan.reached["memory_per_rank"]
    assert memory["mean"] <= memory["max"] <= memory["of"] == kib * 1024
    assert plan.reached["bytes"]["kept"] == sum(n * w * 12 for n, w in zip(ROWS, widths, strict=True))
    assert plan.budget == {"fits": f"1x{ranks}xhbm={kib}KiB", "batch_size": BATCH}


@pytest.mark.parametrize("kib", [40, 47, 64, 100, 163])
def test_one_table_gets_the_widest_multiple_that_fits(kib: int) -> None:
    scores = _scores([700], 64)
    widest = max(width for width in range(0, 65, 4) if _fits(scores, [width], kib, 1))
    plan = sr.allocate(scores, sr.Budget(fits=f"1x1xhbm={kib}KiB", batch_size=BATCH))
    assert plan.dims() == {"t0": widest}
    # Any columns: a table is stored at a multiple of 4, which it fills.
    assert sr.allocate(scores, sr.Budget(fits=f"1x1xhbm={kib}KiB", batch_size=BATCH), multiple=1).dims() == {
        "t0": widest
    }


def test_memory_beside_the_tables_counts() -> None:
    scores = _scores([700], 64)

    def width(**options: Any) -> int:
        return sr.allocate(scores, sr.Budget(fits="1x1xhbm=163KiB", batch_size=BATCH, **options)).dims()["t0"]

    # Of 4 columns 700 rows x 12 bytes, and a pooled row of 4 x 4 bytes for each of 16.
    group = 700 * 4 * 12 + 16 * 4 * 4
    assert width(dense_bytes=3 * group) == width() - 12
    assert width(optimizer="sgd") > width(optimizer="adagrad") > width()
    assert width(precision="bf16") > width()
    assert width(transforms=True) <= width()


def test_a_model_that_fits_is_not_cut() -> None:
    plan = sr.allocate(_scores(), sr.Budget(fits="1x1xT4", batch_size=BATCH))
    assert plan.dims() == {"t0": DIM, "t1": DIM, "t2": DIM}
    assert plan.reached["bytes"]["fraction"] == 1


def test_columns_that_score_0_stay_if_all_fit() -> None:
    scores = make_scores([[1.0, 1.0, *[0.0] * 14], [0.5, *[0.0] * 15], [0.0] * 16], ROWS)
    budget = sr.Budget(fits="1x1xT4", batch_size=BATCH)
    for order in ("knapsack", "fill", "stop"):
        assert sr.allocate(scores, budget, order=order).dims() == dict.fromkeys(scores, DIM)  # type: ignore[arg-type]
    rules = {"t0": sr.TableRule(max_dim=8), "t1": sr.TableRule(fixed=0)}
    assert sr.allocate(scores, budget, tables=rules).dims() == {"t0": 8, "t1": 0, "t2": DIM}


@pytest.mark.parametrize(
    ("cap", "says"),
    [(DIM, "1x1xT4: the full model fits, nothing is cut; "), (8, "1x1xT4: 83.3% of the columns are kept; ")],
)
def test_the_verb_says_what_is_cut(cap: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    rules = {"t0": sr.TableRule(max_dim=cap)}
    plan = sr.allocate(_scores(), sr.Budget(fits="1x1xT4", batch_size=BATCH), tables=rules)
    print_fit({"reached": plan.reached, "budget": plan.budget})
    words = capsys.readouterr().out
    assert says in words and " MiB of 14.56 GiB, margin and all" in words


def test_rules_hold_in_a_cluster_too() -> None:
    rules = {"t0": sr.TableRule(max_dim=4), "t2": sr.TableRule(drop="never")}
    plan = sr.allocate(_scores(), sr.Budget(fits="1x1xhbm=120KiB", batch_size=BATCH), tables=rules)
    assert plan.dims()["t0"] <= 4 and plan.dims()["t2"] >= 4


def test_the_smallest_plan_is_too_large() -> None:
    with pytest.raises(
        sr.UserError, match=r"even the smallest plan, 4 columns in all, needs \d\.\d\d KiB|keeps no column"
    ):
        sr.allocate(_scores(), sr.Budget(fits="1x1xhbm=3KiB", batch_size=BATCH))
    # The tables alone would do, the ids of so large a batch do not.
    with pytest.raises(sr.UserError) as refused:
        sr.allocate(_scores([10**7]), sr.Budget(fits="1x1xhbm=1GB", batch_size=10**7))
    assert "budget fits=1x1xhbm=1GB: even the smallest plan, 4 columns in all, needs" in str(refused.value)
    with pytest.raises(sr.UserError, match=r"a floor of 16 columns .* the budget fits=1x1xhbm=100KiB allows"):
        sr.allocate(_scores(), sr.Budget(fits="1x1xhbm=100KiB", batch_size=BATCH), min_dim=16)


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        ({"fits": "1x8xH10"}, "did you mean H100-80GB"),
        ({"fits": "1x8xH100", "bytes": 0.5}, "give exactly one of parameters, bytes, dims, fits"),
        ({"parameters": 0.5, "batch_size": 5}, "batch_size and dense_bytes go with fits only"),
        ({"fits": "1x8xH100", "batch_size": 0}, "greater than or equal to 1"),
    ],
)
def test_budgets_that_are_refused(budget: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        sr.Budget.model_validate(budget)


def test_rounds_go_from_everything_to_what_the_cluster_could_hold() -> None:
    tables = list(_scores().tables.values())
    everything = sum(ROWS) * DIM * 12
    budget = sr.Budget(fits="1x1xhbm=100KiB")
    usable = 100 * 1024 - Cluster.parse("1x1xhbm=100KiB").device.margin
    assert budget.at(0, tables).limit(tables) == everything
    assert budget.at(0.5, tables).limit(tables) == pytest.approx((everything * usable) ** 0.5, abs=1)
    assert budget.at(1, tables) is budget
    assert sr.Budget(fits="1x1xT4").at(0.5, tables).limit(tables) == everything


def test_search_for_a_cluster(finished_run: Path, config: Path, tmp_path: Path, sseds: Callable[..., Command]) -> None:
    """The verb: a budget of the config, in rounds; the report shows what was asked."""
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    text = config.read_text().replace(
        "{parameters: 0.25}", "{fits: 1x2xhbm=8KiB, batch_size: 4, optimizer: sgd, dense_bytes: 0}"
    )
    assert load_config(config, ["search.budget.fits=1x2xhbm=30KiB"]).search.budget.fits == "1x2xhbm=30KiB"
    (tmp_path / "fits.yaml").write_text(text)
    done = sseds("run", tmp_path / "fits.yaml", "search.rounds=2", "--run-dir", run, "--rerun-from", "search", "--json")
    assert done.code == 0, done.err
    assert "search: 1x2xhbm=8KiB: " in done.out and "of the columns are kept; the fullest rank has" in done.out
    plan = json.loads((run / "search/plan.json").read_text())
    assert plan["budget"] == {"fits": "1x2xhbm=8KiB", "optimizer": "sgd", "batch_size": 4, "dense_bytes": 0}
    assert 0 < plan["reached"]["bytes"]["fraction"] < 1
    assert plan["reached"]["memory_per_rank"]["max"] <= 8 * 1024
    page = (run / "report/index.html").read_text()
    assert "fits 1x2xhbm=8KiB" in page and "fullest rank takes" in page


def test_a_run_says_what_the_budget_leaves_open(finished_run: Path, config: Path) -> None:
    own = load_config(config, ["train.table_optimizer=rowwise_adagrad", "search.budget.fits=1x3xA100-40GB"])
    schema = open_dataset(own.data).schema
    metrics = json.loads((finished_run / "pretrain/metrics.json").read_text())
    dense = metrics["parameters"] - metrics["embedding_parameters"]
    found = search_budget(own, schema)
    # weights, gradients and Adam's moments of float32, and a count of steps for each parameter
    assert 16 * dense <= found.dense_bytes <= 16 * dense + 4 * 20
    assert (found.optimizer, found.batch_size) == ("rowwise_adagrad", 86)  # of 256 rows on three devices
    asked = sr.Budget(fits="1x3xA100-40GB", optimizer="sgd", batch_size=5, dense_bytes=0)
    said = own.model_copy(update={"search": own.search.model_copy(update={"budget": asked})})
    assert search_budget(said, schema) == asked
    in_bytes = load_config(config, ["train.table_optimizer=rowwise_adagrad", "search.budget.bytes=0.5"])
    assert search_budget(in_bytes, schema) == sr.Budget(bytes=0.5, optimizer="rowwise_adagrad")


def test_tables_that_every_device_holds_whole_have_no_cluster(config: Path) -> None:
    own = load_config(config, ["search.budget.fits=1x2xCPU-1GB"])
    with pytest.raises(sr.UserError, match="fits=1x2xCPU-1GB: its tables would be data-parallel"):
        search_budget(own, open_dataset(own.data).schema)
