"""Slim models of rotated plans start as the full model with its embeddings projected."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

import sseds_rec as sr
from sseds_rec.data.batch import Batch
from sseds_rec.data.schema import Schema
from sseds_rec.distributed.runtime import Runtime
from sseds_rec.distributed.sharding import ShardingConfig, shard
from sseds_rec.models import CtrModel, ModelConfig, build_model, build_slim_model, plan_for, table_names
from sseds_rec.models.ticket import load_ticket
from sseds_rec.search.plan import TablePlan
from sseds_rec.training.checkpoint import save_weights
from sseds_rec.training.optimizers import fuse_table_optimizer
from tests.models import test_managed_collision as managed
from tests.models import test_weighted as weighted
from tests.models.clicks import CONFIGS, COUNT, KEPT, D, batch_of, config_of, plan_of, randomize, schema_of
from tests.models.plain import fill_tables, plain_deepfm
from tests.ranks import run_ranks
from tests.slim.rotations import draw_rotation, project

CASES = [case for case in CONFIGS if not case.startswith("dcnv2")]
RUNTIME = Runtime(0, 1, torch.device("cpu"))


def _rotated(plan: sr.DimensionPlan, plain: str = "") -> sr.DimensionPlan:
    rotations = {
        name: draw_rotation(table.original_dim, seed).keep(table.kept)
        for seed, (name, table) in enumerate(plan.tables.items())
        if name != plain
    }
    return plan.model_copy(update={"rotations": rotations})


def _plan(name: str) -> sr.DimensionPlan:
    if name == "one-plain":
        return _rotated(plan_of("mixed"), plain="ad")
    if name != "whole":
        return _rotated(plan_of(name))
    tables = {
        table: own.model_copy(update={"kept": list(range(D)), "embedding_dim": D, "stored_dim": D})
        for table, own in plan_of("mixed").tables.items()
    }
    return _rotated(sr.DimensionPlan(tables=tables, budget={}, reached={}))


def _shard(model: CtrModel) -> DistributedModelParallel:
    fuse_table_optimizer(model, "rowwise_adagrad", 0.1, "auto")
    return shard(model, ShardingConfig(), RUNTIME, COUNT)


def _logits(model: DistributedModelParallel, batch: Batch) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(batch)[1][1]


def _projected(tables: dict[str, Tensor], plan: sr.DimensionPlan) -> dict[str, Tensor]:
    projected = {}
    for name, value in tables.items():
        mask = torch.zeros(D)
        mask[plan.tables[name].kept] = 1
        projected[name] = project(value, plan.rotations[name]).float() if name in plan.rotations else value * mask
    return projected


def _starts(
    config: ModelConfig, schema: Schema, plan: sr.DimensionPlan, batch: Batch, folder: Path
) -> dict[str, Tensor]:
    """Logits of the full model, of it with projected embeddings, and of the slim ones as they start."""
    torch.manual_seed(0)
    full = _shard(build_model(config, schema))
    randomize(full.module.over, seed=3)
    random = torch.Generator().manual_seed(4)
    tables = {name: 0.5 * torch.randn(table.rows, D, generator=random) for name, table in plan.tables.items()}
    fill_tables(full, tables)
    save_weights(folder / "full", full, RUNTIME)
    sr.slim_checkpoint(folder / "full", folder / "slim", plan)
    answers = {"full": _logits(full, batch)}
    fill_tables(full, _projected(tables, plan))
    answers["projected"] = _logits(full, batch)
    for transform in ("select", "random"):
        slim = _shard(build_slim_model(config, schema, plan, transform))  # type: ignore[arg-type]
        load_ticket(folder / "slim", slim, plan)
        answers[transform] = _logits(slim, batch)
        slim.train()
        loss = slim(batch)[0]
        loss.backward()  # DistributedDataParallel refuses parameters that take no part
        assert all(p.grad is not None for name, p in slim.named_parameters() if "embedding_bags" not in name)
    return answers


def _assert_close(found: Tensor, expected: Tensor, of: str) -> None:
    """To 1e-5, of the largest logit if that is more than 1."""
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max())), of


def _clicks(rank: int, world_size: int, case: str, num_dense: int, folder: str) -> dict[str, dict[str, Tensor]]:
    config = config_of(case, batch_norm=True, dropout=0.5)
    return {
        name: _starts(config, schema_of(num_dense), _plan(name), batch_of(num_dense), Path(folder) / name)
        for name in (*KEPT, "one-plain", "whole")
    }


@pytest.mark.parametrize("num_dense", [0, 3])
@pytest.mark.parametrize("case", CASES)
def test_the_slim_model_equals_the_projected_one(case: str, num_dense: int, tmp_path: Path) -> None:
    """Also when fields are dropped whole (their mean stays), or rows have no tag, and so no mean of it."""
    (answers,) = run_ranks(1, _clicks, case, num_dense, str(tmp_path))
    aligns = case in ("fm", "deepfm", "dlrm")
    for plan, logits in answers.items():
        assert logits["projected"].std() > 0.05, plan
        for transform in ("select",) if aligns else ("select", "random"):
            _assert_close(logits[transform], logits["projected"], f"{plan} {transform}")
        if plan == "whole":
            _assert_close(logits["select"], logits["full"], plan)
        else:
            assert (logits["projected"] - logits["full"]).abs().max() > 0.05, plan


def _sets_of_weights(rank: int, world_size: int, folder: str) -> dict[str, Tensor]:
    plan = weighted._plan()
    tags = {"kept": [], "embedding_dim": 0, "stored_dim": 0}
    tables = {name: own.model_copy(update=tags) if name == "tags" else own for name, own in plan.tables.items()}
    plan = _rotated(plan.model_copy(update={"tables": tables}))
    return _starts(weighted.MODEL, weighted._schema(), plan, weighted._batch(0, weighted.COUNT), Path(folder))


def test_the_mass_of_weighted_ids_is_their_weight(tmp_path: Path) -> None:
    """`tags`, which is dropped, has weights of both signs."""
    (logits,) = run_ranks(1, _sets_of_weights, str(tmp_path))
    _assert_close(logits["select"], logits["projected"], "weighted")
    assert (logits["projected"] - logits["full"]).abs().max() > 0.05


def test_an_id_that_is_absent_has_no_mass(tmp_path: Path) -> None:
    """Of fields of raw ids, whose tables are in a collection of their own; one of them is dropped."""
    saved = run_ranks(2, managed._save_on_rank, str(tmp_path / "full"))
    tables = {
        f"{managed.PATHS[name]}.{name}": TablePlan(
            rows=rows, original_dim=D, kept=kept, embedding_dim=len(kept), stored_dim=len(kept), feature_names=[name]
        )
        for (name, rows), kept in zip(managed.ROWS.items(), ([0, 1, 5, 7], [], [2, 3, 4, 6]), strict=True)
    }
    for name, table in tables.items():
        table.pooling = "MEAN" if name.endswith(".tags") else "SUM"
    plan = _rotated(sr.DimensionPlan(tables=tables, budget={}, reached={}))
    plan.save(tmp_path / "plan.json")
    sr.slim_checkpoint(tmp_path / "full", tmp_path / "slim", plan)
    own = plan_for(managed.MODEL, managed._schema(), plan)
    states, bags = [answer[2] for answer in saved], managed._bags(False)
    assert any(not ids for field in bags.values() for ids, _ in field)
    pooled = managed._pooled(bags, _projected(managed._whole_tables(states), own), managed._maps(states))
    expected = plain_deepfm(managed._over(states), torch.empty(managed.COUNT, 0), pooled).detach()
    answers = run_ranks(2, managed._slim_on_rank, str(tmp_path))
    _assert_close(torch.cat([start for start, _ in answers]), expected, "managed")


def test_with_random_transforms_the_mean_stays_in_the_original_width_only() -> None:
    torch.manual_seed(0)
    for name, width in (("mixed", D), ("narrow", 4)):
        plan = _plan(name)
        model = build_slim_model(config_of("fm"), schema_of(0), plan, "random")
        assert model.over.fields.alignment is not None
        for table, transform in model.over.fields.alignment.transforms.items():
            expected = plan.rotations[table].with_mean()[:, -1].float() if width == D else torch.zeros(width)
            assert torch.equal(transform[:, -1], expected)


def test_a_model_that_multiplies_raw_columns_is_refused() -> None:
    with pytest.raises(
        sr.UserError, match=r"^model.name=dcnv2 multiplies raw columns .* choose one of deepfm, dlrm, dnn, fm"
    ):
        build_slim_model(config_of("dcnv2"), schema_of(0), _plan("mixed"), "select")
    build_slim_model(config_of("dcnv2"), schema_of(0), plan_of("mixed"), "select")


def test_rotations_are_renamed_with_their_tables() -> None:
    """In sets with raw and other fields the scores' names say of which collection a table is."""
    fields = schema_of(0).fields
    raw = fields[0].model_copy(update={"transform": "raw", "min_count": None})
    schema = schema_of(0).model_copy(update={"fields": [raw, *fields[1:]]})
    own = _plan("mixed")
    prefixes = {table: "managed" if field == raw.name else "embeddings" for field, table in table_names(schema).items()}
    tables: dict[str, TablePlan] = {f"{prefixes[name]}.{name}": table for name, table in own.tables.items()}
    rotations = {f"{prefixes[name]}.{name}": rotation for name, rotation in own.rotations.items()}
    plan = plan_for(
        config_of("fm"), schema, sr.DimensionPlan(tables=tables, budget={}, reached={}, rotations=rotations)
    )
    assert list(plan.tables) == list(own.tables)
    assert all(plan.rotations[name] is rotation for name, rotation in own.rotations.items())
