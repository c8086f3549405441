"""TorchRec's own models, sharded and unmodified, against float64 copies whose tables have an α on every column."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor
from torchrec.datasets.random import RandomRecDataset
from torchrec.datasets.utils import Batch
from torchrec.distributed import DistributedModelParallel, TrainPipelineSparseDist
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

import sseds_rec as sr
from tests.ranks import run_ranks
from tests.search.placed import load, shard
from tests.search.published import (
    COUNT,
    DENSE,
    FEATURES,
    LOSSES,
    TABLES,
    TYPES,
    D,
    build,
    logits_of,
    make_batch,
    make_tables,
    weights_of,
)

CUTS = [(0, 15), (15, COUNT)]
Scores = dict[str, Tensor]


class Alphas(nn.Module):
    """A collection whose tables' columns are multiplied by an α; float64."""

    def __init__(self, tables: EmbeddingBagCollection, alpha: Scores) -> None:
        super().__init__()
        self.configs, self.alpha = tables.embedding_bag_configs(), alpha
        self.weights = {c.name: tables.embedding_bags[c.name].weight.detach().double() for c in self.configs}

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        keys, pooled = [], []
        for config in self.configs:
            for feature in config.feature_names:
                bags = features[feature]
                table = self.weights[config.name] * self.alpha[config.name]
                pooled.append(
                    F.embedding_bag(bags.values(), table, bags.offsets(), mode="sum", include_last_offset=True)
                )
                keys.append(feature)
        return KeyedTensor(keys, [D] * len(keys), torch.cat(pooled, dim=1))


def _with_alphas(model: nn.Module, dim: int = D) -> tuple[nn.Module, Scores]:
    """The same model in float64, and the α of each table, by the name that its scores have."""
    found = {path: m for path, m in model.named_modules() if isinstance(m, EmbeddingBagCollection)}
    named: Scores = {}
    for path, tables in found.items():
        alpha = {
            c.name: torch.ones(dim, dtype=torch.float64, requires_grad=True) for c in tables.embedding_bag_configs()
        }
        named |= {f"{path}.{name}" if len(found) > 1 else name: own for name, own in alpha.items()}
        model.set_submodule(path, Alphas(tables, alpha))
    return model.double(), named


def _expected(logits: Tensor, labels: Tensor, alpha: Scores) -> dict[str, Scores]:
    """Criterion -> table -> scores: |∂ℓ/∂α| and the mean of p(1-p)(∂z/∂α)², by autograd row by row."""
    loss = F.binary_cross_entropy_with_logits(logits, labels.double())
    gradients = torch.autograd.grad(loss, list(alpha.values()), retain_graph=True)
    rows = [torch.autograd.grad(z, list(alpha.values()), retain_graph=True) for z in logits]
    p = torch.sigmoid(logits.detach())
    curvatures = [
        torch.stack([p_b * (1 - p_b) * c[i] ** 2 for p_b, c in zip(p, rows, strict=True)]).mean(0)
        for i in range(len(alpha))
    ]
    found = {"snip": [g.abs() for g in gradients], "ggn": curvatures}
    totals = {name: sum(float(values.sum()) for values in own) for name, own in found.items()}
    return {
        name: {table: values / totals[name] for table, values in zip(alpha, own, strict=True)}
        for name, own in found.items()
    }


def _assert_close(found: dict[str, Scores], expected: dict[str, Scores]) -> None:
    """To 1e-5 of each table's largest score: these models compute in float32, to 6e-8 in each of a dozen steps."""
    for criterion, tables in expected.items():
        assert found[criterion].keys() == tables.keys()
        for table, values in tables.items():
            error = float((found[criterion][table] - values).abs().max() / values.max())
            assert error < 1e-5, f"{criterion} of {table}: off by {error}"


def _scores_on_rank(rank: int, world_size: int, name: str) -> dict[str, Scores]:
    model = shard(build(name, "meta"), TYPES)
    load(model, weights_of(name))
    batches = [make_batch(*CUTS[rank])]
    return {c: dict(sr.score_dimensions(model, batches, c, loss_fn=LOSSES[name])) for c in ("snip", "ggn")}


@pytest.mark.parametrize("name", LOSSES)
def test_models_of_torchrec(name: str) -> None:
    plain = build(name)
    plain.load_state_dict(weights_of(name))
    copy, alpha = _with_alphas(plain)
    batch = make_batch()
    batch.dense_features = batch.dense_features.double()
    expected = _expected(logits_of(name, copy, batch), batch.labels, alpha)
    for found in run_ranks(2, _scores_on_rank, name):
        _assert_close(found, expected)


GOLDEN_FEATURES, GOLDEN_ROWS = [f"cat_{i}" for i in range(5)], 100


def _golden_model(device: str) -> DLRMTrain:
    tables = [
        EmbeddingBagConfig(name=f"t_{name}", embedding_dim=D, num_embeddings=GOLDEN_ROWS, feature_names=[name])
        for name in GOLDEN_FEATURES
    ]
    collection = EmbeddingBagCollection(tables=tables, device=torch.device(device))
    return DLRMTrain(DLRM(collection, DENSE, [16, D], [16, 1], dense_device=torch.device("cpu")))


def _golden_batches(seed: int, count: int | None = None) -> Iterator[Batch]:
    data = RandomRecDataset(
        GOLDEN_FEATURES,
        batch_size=8,
        hash_size=GOLDEN_ROWS,
        ids_per_feature=1,
        num_dense=DENSE,
        manual_seed=seed,
        num_generated_batches=4,
    )
    return islice(iter(data), count)


def _golden_on_rank(rank: int, world_size: int) -> tuple[dict[str, Scores], list[tuple[str, list[int], Tensor]]]:
    """The golden training example, with three lines more between two of its steps."""
    torch.manual_seed(rank)
    train_model = _golden_model("meta")
    apply_optimizer_in_backward(RowWiseAdagrad, train_model.model.sparse_arch.parameters(), {"lr": 0.1})
    model = DistributedModelParallel(
        train_model, device=torch.device("cpu"), sharders=[EmbeddingBagCollectionSharder()]
    )
    dense = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(model.named_parameters())),
        lambda params: torch.optim.Adagrad(params, lr=0.01),
    )
    optimizer = CombinedOptimizer([model.fused_optimizer, dense])
    pipeline = TrainPipelineSparseDist(model, optimizer, torch.device("cpu"))
    batches = _golden_batches(rank)
    for _ in range(5):
        pipeline.progress(batches)
    scores = {name: dict(sr.score_dimensions(model, _golden_batches(100 + rank, 2), name)) for name in ("snip", "ggn")}
    state = []
    for name, value in model.state_dict().items():
        parts = value.local_shards() if hasattr(value, "local_shards") else None
        if parts is None:
            state.append((name, [], value.clone()))
        else:
            state += [(name, part.metadata.shard_offsets, part.tensor.clone()) for part in parts]
    pipeline.progress(batches)  # and training goes on
    return scores, state


def test_the_golden_training_example() -> None:
    answers = run_ranks(2, _golden_on_rank)
    plain = _golden_model("cpu")
    state = plain.state_dict()
    for _, parts in answers:
        for name, offsets, part in parts:
            row, column = offsets or (0, 0)
            whole = state[name] if not offsets else state[name][row : row + len(part), column : column + part.shape[1]]
            whole.copy_(part)
    copy, alpha = _with_alphas(plain)
    held_out = [batch for rank in range(2) for batch in _golden_batches(100 + rank, 2)]
    logits = [copy.model(b.dense_features.double(), b.sparse_features).squeeze(1) for b in held_out]
    expected = _expected(torch.cat(logits), torch.cat([b.labels for b in held_out]), alpha)
    for found, _ in answers:
        _assert_close(found, expected)


class TwoTasks(nn.Module):
    """Batch -> logits of clicks [B] and of what was bought [B, 3], over one collection."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = make_tables(list(TABLES), "cpu")
        self.shared = nn.Sequential(nn.Linear(4 * D, 8), nn.Tanh())
        self.click, self.bought = nn.Linear(8, 1), nn.Linear(8, 3)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        pooled = self.tables(batch.sparse_features)
        shared = self.shared(torch.cat([pooled[feature] for feature in FEATURES], dim=1))
        return self.click(shared).squeeze(1), self.bought(shared)


def test_models_of_several_tasks_are_scored_by_their_loss_fn() -> None:
    torch.manual_seed(5)
    model, batch = TwoTasks(), make_batch()
    classes, importance = (torch.arange(COUNT) * 7) % 3, torch.tensor([1.0, 2.0, 0.5])

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        clicks, bought = model(batch)
        F.mse_loss(clicks, batch.labels)  # shown only
        return F.binary_cross_entropy_with_logits(clicks, batch.labels) + 0.3 * F.cross_entropy(
            bought, classes, weight=importance
        )

    found = {c: dict(sr.score_dimensions(model, [batch], c, loss_fn=loss_fn)) for c in ("snip", "ggn")}
    with pytest.raises(sr.UserError, match="must return its mean loss"):
        sr.score_dimensions(model, [batch])

    copy, alpha = _with_alphas(model)
    clicks, bought = copy(batch)
    p, q = torch.sigmoid(clicks.detach()), F.softmax(bought.detach(), dim=1)
    share = 0.3 * importance[classes] / importance[classes].sum()
    logs = F.logsigmoid(clicks * (2 * batch.labels - 1)), F.log_softmax(bought, dim=1)[torch.arange(COUNT), classes]
    gradients = torch.autograd.grad(-logs[0].mean() - (share * logs[1]).sum(), list(alpha.values()), retain_graph=True)
    raw = {"snip": [g.abs() for g in gradients], "ggn": [torch.zeros(D, dtype=torch.float64) for _ in alpha]}
    for b in range(COUNT):
        click = torch.autograd.grad(clicks[b], list(alpha.values()), retain_graph=True)
        each = [torch.autograd.grad(bought[b, k], list(alpha.values()), retain_graph=True) for k in range(3)]
        hessian = share[b] * (torch.diag(q[b]) - torch.outer(q[b], q[b]))
        for i, total in enumerate(raw["ggn"]):
            jacobian = torch.stack([one[i] for one in each])
            total += p[b] * (1 - p[b]) / COUNT * click[i] ** 2 + (jacobian * (hessian @ jacobian)).sum(dim=0)
    totals = {c: sum(float(values.sum()) for values in own) for c, own in raw.items()}
    _assert_close(found, {c: {t: v / totals[c] for t, v in zip(alpha, own, strict=True)} for c, own in raw.items()})
