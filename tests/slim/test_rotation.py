"""Rotated plans: slim models and checkpoints against projected embeddings, computed bag by bag in float64."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.modules.embedding_configs import PoolingType

import sseds_rec as sr
from sseds_rec.distributed.sharding import BagSharder
from sseds_rec.search.plan import TablePlan
from tests.ranks import run_ranks
from tests.search.reference import ClickModel, make_batch, make_rows
from tests.slim.rotations import draw_rotation, project
from tests.slim.test_slim import _logits_of_slim_job, _save_sharded, _weights

COUNT = 30
#: Table -> (columns, features, kept): one table of two features, one feature of two tables, one table dropped, one not rotated.
TABLES: dict[str, tuple[int, list[str], list[int]]] = {
    "shared": (8, ["a", "b"], [0, 2, 3, 6, 7]),
    "wide": (16, ["c"], [1, 4, 9, 12]),
    "again": (8, ["a"], [5]),
    "dropped": (8, ["d"], []),
    "plain": (8, ["e"], [0, 1, 6, 7]),
}
ROWS = 20


def _plan(kept: dict[str, list[int]], dims: dict[str, int], rows: dict[str, int], plain: str = "") -> sr.DimensionPlan:
    tables = {
        name: TablePlan(
            rows=rows[name],
            original_dim=d,
            kept=kept[name],
            embedding_dim=len(kept[name]),
            stored_dim=-(-len(kept[name]) // 4) * 4,
        )
        for name, d in dims.items()
    }
    rotations = {
        name: draw_rotation(d, seed).keep(kept[name]) for seed, (name, d) in enumerate(dims.items()) if name != plain
    }
    return sr.DimensionPlan(tables=tables, budget={}, reached={}, rotations=rotations)


def _own_plan(whole: bool = False) -> sr.DimensionPlan:
    dims = {name: d for name, (d, _, _) in TABLES.items()}
    kept = {name: list(range(d)) if whole else kept for name, (d, _, kept) in TABLES.items()}
    return _plan(kept, dims, dict.fromkeys(TABLES, ROWS), plain="plain")


class _Model(nn.Module):
    """Bags of ids -> pooled embeddings; sums, means (but for one table, which sums) or weighted sums."""

    def __init__(self, pooling: str) -> None:
        super().__init__()
        kinds = {
            name: PoolingType.MEAN if pooling == "mean" and name != "again" else PoolingType.SUM for name in TABLES
        }
        configs = [
            EmbeddingBagConfig(
                name=name, num_embeddings=ROWS, embedding_dim=d, feature_names=features, pooling=kinds[name]
            )
            for name, (d, features, _) in TABLES.items()
        ]
        self.ebc = EmbeddingBagCollection(tables=configs, is_weighted=pooling == "weighted")


def _bags() -> dict[str, list[tuple[list[int], list[float]]]]:
    """Feature -> none to three ids a row, and weights of both signs."""
    random = torch.Generator().manual_seed(1)
    return {
        feature: [
            (torch.randint(0, ROWS, (n,), generator=random).tolist(), torch.randn(n, generator=random).tolist())
            for n in torch.randint(0, 4, (COUNT,), generator=random).tolist()
        ]
        for feature in "abcde"
    }


def _features() -> KeyedJaggedTensor:
    bags = [bag for feature in _bags().values() for bag in feature]
    return KeyedJaggedTensor(
        keys=list("abcde"),
        values=torch.tensor([i for ids, _ in bags for i in ids]),
        weights=torch.tensor([w for _, weights in bags for w in weights]),
        lengths=torch.tensor([len(ids) for ids, _ in bags], dtype=torch.int32),
    )


def _pooled(tables: dict[str, Tensor], pooling: str) -> dict[str, Tensor]:
    """Key -> float64 [COUNT, D]."""
    result = {}
    for name, (_, features, _) in TABLES.items():
        for feature in features:
            rows = []
            for ids, weights in _bags()[feature]:
                own = torch.tensor(weights if pooling == "weighted" else [1.0] * len(ids), dtype=torch.float32).double()
                mean = pooling == "mean" and name != "again"
                rows.append((own[:, None] * tables[name][ids]).sum(dim=0) / (max(len(ids), 1) if mean else 1))
            result[f"{feature}@{name}" if feature == "a" else feature] = torch.stack(rows)
    return result


def _masked(table: Tensor, kept: list[int]) -> Tensor:
    mask = torch.zeros(table.shape[1], dtype=torch.float64)
    mask[kept] = 1
    return table.double() * mask


@pytest.mark.parametrize("pooling", ["sum", "mean", "weighted"])
def test_slim_returns_projected_embeddings_under_the_original_keys(pooling: str) -> None:
    torch.manual_seed(0)
    model, plan = _Model(pooling), _own_plan()
    slim = sr.slim(model, plan)
    original, found = model.ebc(_features()), slim.ebc(_features())
    assert found.keys() == original.keys() and found.length_per_key() == original.length_per_key()
    weights = {name: bag.weight.detach() for name, bag in model.ebc.embedding_bags.items()}
    projected = {name: project(weights[name], rotation) for name, rotation in plan.rotations.items()}
    projected["plain"] = _masked(weights["plain"], TABLES["plain"][2])
    expected = _pooled(projected, pooling)
    for key, value in found.to_dict().items():
        torch.testing.assert_close(value.double(), expected[key], rtol=1e-6, atol=1e-6)
    assert found["d"].std() > 0.1  # the mean of a dropped table, times the mass of its bags


@pytest.mark.parametrize("pooling", ["sum", "mean", "weighted"])
def test_slim_equals_the_original_when_nothing_is_cut(pooling: str) -> None:
    torch.manual_seed(0)
    model = _Model(pooling)
    slim = sr.slim(model, _own_plan(whole=True))
    torch.testing.assert_close(slim.ebc(_features()).values(), model.ebc(_features()).values(), rtol=1e-6, atol=2e-6)


def test_a_random_start_keeps_the_tables_and_their_mean() -> None:
    torch.manual_seed(0)
    model, plan = _Model("sum"), _own_plan()
    selected, random = sr.slim(model, plan), sr.slim(model, plan, init="random")
    found, start = dict(random.named_parameters()), dict(selected.named_parameters())
    for name, value in found.items():
        table = name.rpartition(".")[2]
        if ".transforms." not in name:
            assert torch.equal(value, start[name])
        elif table in plan.rotations:
            assert torch.equal(value[:, -1], plan.rotations[table].with_mean()[:, -1].float())
            kept = value[:, :-1]
            torch.testing.assert_close(kept.T @ kept, torch.eye(kept.shape[1]))  # as the paper's
    assert not torch.allclose(random.ebc(_features())["c"], selected.ebc(_features())["c"], atol=0.1)


def test_transforms_and_means_are_trained() -> None:
    torch.manual_seed(0)
    slim = sr.slim(_Model("sum"), _own_plan())
    slim.ebc(_features()).values().square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in slim.parameters())


def _click_plan(model: nn.Module) -> sr.DimensionPlan:
    kept = {"t0": [], "t1": [0, 3, 8, 13, 15], "t2": [2, 3, 4, 7]}
    configs = {c.name: c for c in model.ebc.embedding_bag_configs()}  # type: ignore[union-attr, operator]
    dims = {name: configs[name].embedding_dim for name in kept}
    return _plan(kept, dims, {name: configs[name].num_embeddings for name in kept})


@pytest.mark.parametrize("sharding_type", ["table_wise", "row_wise", "column_wise"])
def test_slim_checkpoint_rotates_rows_of_any_sharding(tmp_path: Path, sharding_type: str) -> None:
    weights, model = _weights(), ClickModel().eval()
    model.load_state_dict(weights)
    plan = _click_plan(model)
    plan.save(tmp_path / "plan.json")
    run_ranks(2, _save_sharded, sharding_type, weights, str(tmp_path / "full"))
    sr.slim_checkpoint(tmp_path / "full", tmp_path / "slim", plan)
    stored = dcp.FileSystemReader(tmp_path / "slim").read_metadata().state_dict_metadata
    assert "model.ebc.embedding_bags.t0.weight" not in stored
    for name in ("t1", "t2"):
        rotation, table = plan.rotations[name], plan.tables[name]
        state = {f"model.ebc.embedding_bags.{name}.weight": torch.empty(table.rows, table.stored_dim)}
        dcp.load(state, checkpoint_id=tmp_path / "slim")
        (content,) = state.values()
        expected = (weights[f"ebc.embedding_bags.{name}.weight"].double() - rotation.mean) @ rotation.forward
        torch.testing.assert_close(content[:, : len(table.kept)].double(), expected, rtol=1e-7, atol=1e-7)
        assert not content[:, len(table.kept) :].any()
    parts = run_ranks(2, _logits_of_slim_job, str(tmp_path / "plan.json"), str(tmp_path / "slim"))
    projected = copy.deepcopy(model)
    over = {"model": {f"over.{name}": value for name, value in projected.over.state_dict().items()}}
    dcp.load(over, checkpoint_id=tmp_path / "slim")  # the sharded model's own
    with torch.no_grad():
        for name, rotation in plan.rotations.items():
            bag = projected.ebc.embedding_bags[name].weight
            bag.copy_(project(bag, rotation))
    expected = projected(make_batch(make_rows(60, seed=2), 0, 60))[1]
    torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-6, atol=2e-6)


def _convert(folder: Path, plan: sr.DimensionPlan, **states: Tensor) -> dict[str, Tensor]:
    """What becomes of optimizer state of table t1, by the names it has in a checkpoint."""
    model, path = ClickModel(), "ebc.embedding_bags.t1.weight"
    dcp.save({"model": model.state_dict(), "optimizer": {"state": {path: states}}}, checkpoint_id=folder / "full")
    sr.slim_checkpoint(folder / "full", folder / "slim", plan)
    width = plan.tables["t1"].stored_dim
    found = {
        f"optimizer.state.{path}.{name}": torch.empty([70, width] if value.ndim == 2 else [70])
        for name, value in states.items()
    }
    dcp.load(found, checkpoint_id=folder / "slim")
    return {name: found[f"optimizer.state.{path}.{name}"] for name in states}


def test_optimizer_state_is_that_of_gradients_in_the_coordinates(tmp_path: Path) -> None:
    plan = _click_plan(ClickModel())
    inverse = plan.rotations["t1"].inverse
    random = torch.Generator().manual_seed(0)
    scale = torch.rand(70, 16, generator=random, dtype=torch.float64)
    gradients = scale * torch.randn(4000, 70, 16, generator=random, dtype=torch.float64)  # independent entries
    turned = gradients @ inverse  # e = M t + μ, so that ∂/∂t = Mᵀ ∂/∂e
    means, squares, rowwise = gradients.mean(0).float(), gradients.square().mean(0).float(), torch.rand(70)
    adam = _convert(tmp_path / "adam", plan, exp_avg=means, exp_avg_sq=squares, step=torch.tensor([3.0] * 70))
    torch.testing.assert_close(adam["exp_avg"][:, :5].double(), turned.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(adam["exp_avg_sq"][:, :5].double(), turned.square().mean(0), rtol=0.15, atol=0)
    assert not adam["exp_avg"][:, 5:].any() and not adam["exp_avg_sq"][:, 5:].any() and (adam["step"] == 3).all()
    # FBGEMM's names, with the table's before them
    fused = _convert(tmp_path / "fused", plan, **{"t1.momentum1": means, "t1.exp_avg_sq": squares})
    assert torch.equal(fused["t1.momentum1"], adam["exp_avg"])
    assert torch.equal(fused["t1.exp_avg_sq"], adam["exp_avg_sq"])
    adagrad = _convert(tmp_path / "adagrad", plan, **{"t1.momentum1": squares})
    assert torch.equal(adagrad["t1.momentum1"], adam["exp_avg_sq"])
    assert torch.equal(_convert(tmp_path / "row", plan, **{"t1.momentum1": rowwise})["t1.momentum1"], rowwise)


def test_optimizer_state_that_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    plan = _click_plan(ClickModel())
    with pytest.raises(
        sr.UserError, match=r"ebc.embedding_bags.t1.weight.hessian: the plan rotates its table, and how hessian"
    ):
        _convert(tmp_path, plan, hessian=torch.rand(70, 16))
    assert not (tmp_path / "slim").exists()


def _pipelined(rank: int, world_size: int) -> tuple[list[Tensor], list[Tensor]]:
    """Logits of a slim job by a training pipeline, whose tracing must not enter the slim module's own code, and without."""
    torch.manual_seed(0)
    configs = [
        EmbeddingBagConfig(name=f"t_{f}", num_embeddings=ROWS, embedding_dim=8, feature_names=[f]) for f in "abc"
    ]
    dlrm = DLRMTrain(DLRM(EmbeddingBagCollection(tables=configs), 3, [16, 8], [16, 1]))
    kept = {"t_a": [0, 3, 4, 7], "t_b": [2], "t_c": []}
    slim = sr.slim(dlrm, _plan(kept, dict.fromkeys(kept, 8), dict.fromkeys(kept, ROWS)))
    apply_optimizer_in_backward(
        torch.optim.SGD, [p for name, p in slim.named_parameters() if "embedding_bags" in name], {"lr": 0.0}
    )
    job = DistributedModelParallel(slim, device=torch.device("cpu"), sharders=[BagSharder()])
    batches = [
        Batch(dense_features=torch.randn(COUNT, 3), sparse_features=_features(), labels=torch.ones(COUNT))
        for _ in range(3)
    ]
    alone = [job(batch)[1][1] for batch in batches]
    optimizer = torch.optim.SGD([p for name, p in job.named_parameters() if "embedding_bags" not in name], lr=0.0)
    pipeline = TrainPipelineSparseDist(job, optimizer, torch.device("cpu"))
    remaining = iter(batches)
    return [pipeline.progress(remaining)[1] for _ in batches], alone


def test_a_slim_job_runs_in_a_training_pipeline() -> None:
    ((pipelined, alone),) = run_ranks(1, _pipelined)
    torch.testing.assert_close(pipelined, alone, rtol=0, atol=1e-6)
