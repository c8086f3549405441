"""The default search on data whose truth is known: ranks found, noise dropped, duplicates shared, no field lost."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import pytest
from scipy.stats import spearmanr

import sseds_rec as sr
from sseds_rec.config import Config, load_config
from sseds_rec.data.truth import Truth
from sseds_rec.distributed.runtime import runtime
from sseds_rec.pipeline import Pipeline
from sseds_rec.run_directory import RunDirectory
from sseds_rec.search.scores import DimensionScores

D = 16
CONFIG = """
name: planted
data: {path: DATA}
model: {name: fm, embedding_dim: 16}
train: {epochs: 4, patience: 2, batch_size: 2048, learning_rate: 0.003, embedding_l2: 0.0001}
"""


@pytest.fixture(scope="module")
def truth_and_draws(tmp_path_factory: pytest.TempPathFactory) -> tuple[Truth, Config, list[DimensionScores]]:
    """The truth, and scores of a trained model from two draws of the default batches."""
    folder = tmp_path_factory.mktemp("planted")
    options = "--rows 600000 --fields 11 --cardinality 60:500 --zipf 0.5 --ranks 0,1,2,4,8 --duplicates 1 --signal 2"
    command = [sys.executable, "-m", "sseds_rec", "prepare", "synthetic", "--output", folder / "data", *options.split()]
    subprocess.run(command, check=True, capture_output=True)
    (folder / "planted.yaml").write_text(CONFIG.replace("DATA", str(folder / "data")))
    config = load_config(folder / "planted.yaml", ["search.multiple=1"])
    draws = []
    with runtime("cpu") as place:
        run = RunDirectory(folder / "run")
        pipeline = Pipeline(config, run, place)
        run.open(config, place)
        pipeline.pretrain()
        model = pipeline.pretrained()
        draws.append(pipeline.score(model))
        other = config.model_copy(update={"seed": config.seed + 1})
        draws.append(Pipeline(other, run, place).score(model))
    return Truth.load(folder / "data"), config, draws


def _widths(truth: Truth, dims: dict[str, int]) -> dict[str, int]:
    """Columns of every field that is no duplicate, those of its duplicate with them."""
    twins = {one.duplicate_of: one.name for one in truth.fields if one.duplicate_of}
    return {
        one.name: dims[one.name] + dims.get(twins.get(one.name, ""), 0) for one in truth.fields if not one.duplicate_of
    }


def _right_budget(truth: Truth, scores: DimensionScores) -> sr.Budget:
    return sr.Budget(parameters=sum(one.rank * scores.tables[one.name].rows for one in truth.fields))


def test_at_the_right_budget_widths_are_the_planted_ranks(
    truth_and_draws: tuple[Truth, Config, list[DimensionScores]],
) -> None:
    truth, _, (scores, _) = truth_and_draws
    ranks = {one.name: one.rank for one in truth.fields if not one.duplicate_of}
    (twin,) = [one for one in truth.fields if one.duplicate_of]
    assert twin.duplicate_of is not None
    budget = _right_budget(truth, scores)
    for order in ("stop", "knapsack"):
        plan = sr.allocate(scores, budget, multiple=1, order=order)  # type: ignore[arg-type]
        widths = _widths(truth, plan.dims())
        assert spearmanr([widths[name] for name in ranks], list(ranks.values())).statistic >= 0.9
        assert [name for name, rank in ranks.items() if rank and not widths[name]] == []
        noise = {name: widths[name] for name, rank in ranks.items() if not rank}
        if order == "stop":
            assert not any(noise.values())
        else:  # spends on it what fits nothing else
            cost = sum(width * scores.tables[name].rows for name, width in noise.items())
            assert cost < 0.03 * plan.reached["parameters"]["kept"]
        assert min(plan.dims()[twin.name], plan.dims()[twin.duplicate_of]) < D


@pytest.mark.parametrize("share", [0.1, 0.2, 0.4])
def test_no_planted_field_is_dropped_where_the_budget_can_hold_it(
    truth_and_draws: tuple[Truth, Config, list[DimensionScores]], share: float
) -> None:
    truth, config, (scores, _) = truth_and_draws
    widths = _widths(truth, config.search.allocate(scores, sr.Budget(parameters=share)).dims())
    assert [one.name for one in truth.fields if one.rank and not widths[one.name]] == []


def test_another_draw_of_the_batches_keeps_nine_in_ten(
    truth_and_draws: tuple[Truth, Config, list[DimensionScores]],
) -> None:
    _, _, draws = truth_and_draws
    plan = partial(sr.allocate, budget=sr.Budget(parameters=0.1), multiple=1, order="knapsack")
    first, second = ({(n, c) for n, t in plan(s).tables.items() for c in t.kept} for s in draws)
    assert first != set() and 2 * len(first & second) / (len(first) + len(second)) >= 0.9
