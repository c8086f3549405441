"""How a slim model starts: equal to the full one with its dropped columns masked, or with what shapes allow."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

import sseds_rec as sr
from sseds_rec.distributed.runtime import Runtime
from sseds_rec.distributed.sharding import ShardingConfig, shard
from sseds_rec.models import CtrModel, ModelConfig, build_model, build_slim_model
from sseds_rec.models.ticket import load_ticket
from sseds_rec.training.checkpoint import save_weights
from sseds_rec.training.optimizers import fuse_table_optimizer
from tests.models.clicks import CONFIGS, COUNT, KEPT, D, batch_of, config_of, plan_of, randomize, schema_of
from tests.models.plain import fill_tables
from tests.ranks import run_ranks

RUNTIME = Runtime(0, 1, torch.device("cpu"))


def _shard(model: CtrModel) -> DistributedModelParallel:
    fuse_table_optimizer(model, "rowwise_adagrad", 0.1, "auto")
    return shard(model, ShardingConfig(), RUNTIME, COUNT)


def _full(
    config: ModelConfig, num_dense: int, plan: sr.DimensionPlan, folder: Path
) -> tuple[Tensor, dict[str, Tensor]]:
    """Leaves the slim checkpoint of a full model; gives the masked full model's logits, and the full one's dense weights."""
    model = _shard(build_model(config, schema_of(num_dense)))
    randomize(model.module.over, seed=3)
    random = torch.Generator().manual_seed(4)
    tables = {name: torch.randn(table.rows, D, generator=random) for name, table in plan.tables.items()}
    fill_tables(model, tables)
    save_weights(folder / "full", model, RUNTIME)
    sr.slim_checkpoint(folder / "full", folder / "slim", plan)
    for name, table in plan.tables.items():
        tables[name][:, [column for column in range(D) if column not in table.kept]] = 0
    fill_tables(model, tables)
    return _logits(model, num_dense), {name: value.clone() for name, value in model.module.over.state_dict().items()}


def _logits(model: DistributedModelParallel, num_dense: int) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(batch_of(num_dense))[1][1]


def _slim_and_masked(
    rank: int, world_size: int, case: str, num_dense: int, folder: str, source: str = ""
) -> dict[str, tuple[Tensor, Tensor]]:
    """Plan and transform -> logits of the slim model as it starts, and of the masked full one.

    Args:
        source: of a module that registers the model, if the package does not.
    """
    exec(source, {"__name__": "added"})
    answers = {}
    config = config_of(case, batch_norm=True, dropout=0.5)
    plans = [plan for plan in KEPT if (case, num_dense, plan) != ("dlrm", 0, "alone")]  # that is refused
    for name in plans:
        torch.manual_seed(0)
        plan = plan_of(name)
        masked, _ = _full(config, num_dense, plan, Path(folder) / name)
        for transform in ("select", "random"):
            slim = _shard(build_slim_model(config, schema_of(num_dense), plan, transform))  # type: ignore[arg-type]
            load_ticket(Path(folder) / name / "slim", slim, plan)
            answers[f"{name}-{transform}"] = (_logits(slim, num_dense), masked)
    return answers


def assert_slim_equals_masked(case: str, num_dense: int, folder: Path, aligns: bool, source: str = "") -> None:
    """Also when fields are dropped whole; with random transforms only if there are none."""
    (answers,) = run_ranks(1, _slim_and_masked, case, num_dense, str(folder), source)
    assert len(answers) >= 2 * (len(KEPT) - 1)
    for form, (slim, masked) in answers.items():
        assert masked.std() > 0.05, form
        if form.endswith("select") or not aligns:
            torch.testing.assert_close(slim, masked, rtol=0, atol=1e-5, msg=lambda text, form=form: f"{form}: {text}")
        elif not form.startswith("alone"):  # one field has no pair for transforms to change
            assert (slim - masked).abs().max() > 1e-3, form


@pytest.mark.parametrize("num_dense", [0, 3])
@pytest.mark.parametrize("case", CONFIGS)
def test_the_slim_model_equals_the_masked_one(case: str, num_dense: int, tmp_path: Path) -> None:
    assert_slim_equals_masked(case, num_dense, tmp_path, aligns=case in ("fm", "deepfm", "dlrm"))


def _taken_over(
    rank: int, world_size: int, case: str, num_dense: int, plan_name: str, folder: str
) -> tuple[set[str], set[str], dict[str, Tensor], dict[str, Tensor]]:
    """Weights that kept their own start, weights that are the full model's, the slim model's weights and the full one's."""
    plan, config = plan_of(plan_name), config_of(case)
    _, full = _full(config, num_dense, plan, Path(folder))
    torch.manual_seed(1)
    slim = _shard(build_slim_model(config, schema_of(num_dense), plan, "random"))
    over = slim.module.over
    start = {name: value.clone() for name, value in over.state_dict().items()}
    load_ticket(Path(folder) / "slim", slim, plan)
    end = {name: value.clone() for name, value in over.state_dict().items()}
    own = {name for name, value in end.items() if torch.equal(value, start[name])}
    same = {name for name, value in end.items() if name in full and torch.equal(value, full[name])}
    return own, same, end, full


def test_weights_over_the_raw_concatenation_keep_the_kept_columns(tmp_path: Path) -> None:
    ((own, same, slim, full),) = run_ranks(1, _taken_over, "dcnv2", 2, "dropped", str(tmp_path))
    kept = [0, 1] + [2 + D + c for c in KEPT["dropped"]["ad"]] + [2 + 3 * D + c for c in KEPT["dropped"]["hour"]]
    assert own == set() and same == {"deep.0.bias", "deep.2.weight", "deep.2.bias", "output.weight", "output.bias"}
    assert torch.equal(slim["deep.0.weight"], full["deep.0.weight"][:, kept])
    for layer in range(3):
        assert torch.equal(slim[f"cross.{layer}.v.weight"], full[f"cross.{layer}.v.weight"][:, kept])
        assert torch.equal(slim[f"cross.{layer}.u.weight"], full[f"cross.{layer}.u.weight"][kept])
        assert torch.equal(slim[f"cross.{layer}.u.bias"], full[f"cross.{layer}.u.bias"][kept])


def test_the_top_mlp_keeps_the_pairs_of_kept_fields(tmp_path: Path) -> None:
    ((_, _, slim, full),) = run_ranks(1, _taken_over, "dlrm", 0, "dropped", str(tmp_path))
    # pairs of user.id, ad, tags, hour: 01 02 03 12 13 23, of which only ad-hour stays
    assert torch.equal(slim["top.0.weight"], full["top.0.weight"][:, [4]])


@pytest.mark.parametrize(("plan", "num_dense"), [("narrow", 3), ("narrow", 0), ("mixed", 3)])
def test_weights_of_another_shape_keep_their_own_start(plan: str, num_dense: int, tmp_path: Path) -> None:
    """A is 4 in "narrow", so that the bottom MLP's last layer and what reads it have no counterpart; in "mixed" it is D."""
    ((own, same, _, full),) = run_ranks(1, _taken_over, "dlrm", num_dense, plan, str(tmp_path))
    transforms = {f"fields.alignment.transforms.{name}" for name in ("user_id", "ad", "tags", "hour")}
    anew = {"bottom.4.weight", "bottom.4.bias", "top.0.weight"} if (plan, num_dense) == ("narrow", 3) else set()
    assert own == transforms | anew
    assert same == set(full) - anew


def _refusal(rank: int, world_size: int, case: str, folder: str) -> list[str]:
    plan, said = plan_of("mixed"), []
    _full(config_of(case), 3, plan, Path(folder))
    for changed, num_dense in (({"hidden": [12, 6]}, 3), ({"hidden": [10]}, 3), ({"hidden": [10, 6, 4]}, 3), ({}, 2)):
        slim = _shard(build_slim_model(config_of(case, **changed), schema_of(num_dense), plan, "select"))
        with pytest.raises(sr.UserError) as refused:
            load_ticket(Path(folder) / "slim", slim, plan)
        said.append(str(refused.value))
    return said


def test_checkpoints_of_another_model_are_refused_by_name(tmp_path: Path) -> None:
    (said,) = run_ranks(1, _refusal, "dlrm", str(tmp_path))
    wider, shorter, longer, inputs = (line.partition("slim: ")[2] for line in said)
    assert wider == "over.top.0.bias is [10], the model's is [12]"
    assert shorter == "over.output.weight is [1, 6], the model's is [1, 10]"
    assert longer == "holds no weight over.top.4.bias; it is not of this model"
    assert inputs == "over.bottom.0.weight is [5, 3], the model's is [5, 2]"
