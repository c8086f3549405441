"""Scoring in the middle of training: the training goes on as if it had not been there, and scores as if there were none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.datasets.utils import Batch
from torchrec.distributed import DistributedModelParallel, TrainPipelineBase, TrainPipelineSparseDist
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

import sseds_rec as sr
from sseds_rec.distributed.tables import lookup_modules, training_kernels
from tests.ranks import run_ranks
from tests.search.placed import load, shard
from tests.search.published import COUNT, DENSE, FEATURES, TABLES, TYPES, D, make_batch, make_tables

CPU = torch.device("cpu")
#: TorchRec's other pipelines need CUDA: they record streams.
PIPELINES: dict[str, Callable[..., Any]] = {"base": TrainPipelineBase, "sparse_dist": TrainPipelineSparseDist}
CRITERIA = ("snip", "ggn", "magnitude")


class Noisy(nn.Module):
    """A model whose training draws random numbers and keeps statistics of batches."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.tables = make_tables(list(TABLES), device)
        self.over = nn.Sequential(
            nn.Linear(len(FEATURES) * D + DENSE, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1)
        )

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        pooled = self.tables(batch.sparse_features)
        found = [pooled[feature] for feature in FEATURES]
        logits = self.over(torch.cat([batch.dense_features, *found], dim=1)).squeeze(1)
        return F.binary_cross_entropy_with_logits(logits, batch.labels), logits.detach()


def _job(optimizer: type[torch.optim.Optimizer] = RowWiseAdagrad) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    torch.manual_seed(6)
    weights = {name: value.clone() for name, value in Noisy("cpu").named_parameters()}
    model = Noisy("meta")
    apply_optimizer_in_backward(optimizer, model.tables.parameters(), {"lr": 0.1})
    sharded = shard(model, TYPES)
    load(sharded, weights)
    over = dict(in_backward_optimizer_filter(sharded.named_parameters()))
    dense = KeyedOptimizerWrapper(over, lambda params: torch.optim.Adam(params, lr=0.01))
    return sharded, CombinedOptimizer([sharded.fused_optimizer, dense])


def _batches(rank: int, steps: int) -> Iterator[Batch]:
    for step in range(steps):
        first = 2 * rank + step
        yield make_batch(first, first + 8)


def _scores(model: nn.Module, batch: Batch) -> dict[str, dict[str, Tensor]]:
    return {name: dict(sr.score_dimensions(model, [batch], name)) for name in CRITERIA}


def _state(model: DistributedModelParallel, optimizer: CombinedOptimizer) -> dict[str, Any]:
    """Everything that training reads."""
    found: dict[str, Any] = {"rng": torch.get_rng_state()}
    found |= {f"model {name}": value for name, value in model.state_dict().items()}
    for name, entries in optimizer.state_dict()["state"].items():
        found |= {f"optimizer {name} {entry}": value for entry, value in entries.items()}
    found |= {f"gradient {name}": p.grad for name, p in model.named_parameters()}
    for index, module in enumerate([*model.modules(), *lookup_modules(model)]):
        found[f"mode {index} {type(module).__name__}"] = module.training
    for index, kernel in enumerate(training_kernels(model)):
        found[f"kernel {index}"] = [kernel.step, int(kernel.iter), int(kernel.iter_cpu)]
    local = {}
    for name, value in found.items():
        parts = value.local_shards() if hasattr(value, "local_shards") else None
        for i, part in enumerate([value] if parts is None else [part.tensor for part in parts]):
            local[f"{name} {i}"] = part.detach().clone() if isinstance(part, Tensor) else part
    return local


def _differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    assert before.keys() == after.keys()
    return [
        name
        for name, value in before.items()
        if not (torch.equal(value, after[name]) if isinstance(value, Tensor) else value == after[name])
    ]


def _trained_on_rank(rank: int, world_size: int, kind: str, score_after: list[int]) -> tuple[Any, Any]:
    """State after seven steps, and scores after some of them."""
    model, optimizer = _job()
    pipeline = PIPELINES[kind](model, optimizer, CPU)
    torch.manual_seed(100 + rank)
    batches, held_out, scores = _batches(rank, 7), make_batch(rank, COUNT - 3 * rank), {}
    model.train()
    for step in range(8):
        if step:
            pipeline.progress(batches)
        if step in score_after:
            scores[step] = _scores(model, held_out)
    with pytest.raises(StopIteration):
        pipeline.progress(batches)
    if 8 in score_after:
        scores[8] = _scores(model, held_out)
    if kind == "sparse_dist":
        pipeline.detach()
        scores[9] = _scores(model, held_out)
    return _state(model, optimizer), scores


@pytest.mark.parametrize(("world_size", "kind"), [(1, "sparse_dist"), (2, "sparse_dist"), (2, "base")])
def test_training_ends_as_without_scoring(world_size: int, kind: str) -> None:
    alone = run_ranks(world_size, _trained_on_rank, kind, [])
    scored = run_ranks(world_size, _trained_on_rank, kind, [0, 3, 7, 8])
    for (expected, _), (state, _) in zip(alone, scored, strict=True):
        assert _differences(expected, state) == []


def _assert_same(found: dict[str, dict[str, Tensor]], expected: dict[str, dict[str, Tensor]]) -> None:
    for name, tables in expected.items():
        for table, values in tables.items():
            assert torch.equal(found[name][table], values), f"{name} of {table}"


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_pipelined_model_scores_as_an_unpipelined_one(world_size: int) -> None:
    pipelined = run_ranks(world_size, _trained_on_rank, "sparse_dist", [3, 7, 8])
    plain = run_ranks(world_size, _trained_on_rank, "base", [3, 7])
    for (_, found), (_, expected) in zip(pipelined, plain, strict=True):
        _assert_same(found[3], expected[3])
        for step in (7, 8, 9):  # the last step, when batches have run out, and detached
            _assert_same(found[step], expected[7])


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "train": nullcontext,
    "eval": nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


def _traces_on_rank(rank: int, world_size: int) -> tuple[list[str], dict[str, Any]]:
    """What scoring changed or called, and the scores, in every setting."""
    model, optimizer = _job()
    model.train()
    optimizer.zero_grad()
    model(next(_batches(rank, 1)))[0].backward()
    optimizer.step()
    traces, scores, batch = [], {}, make_batch(rank, COUNT - 3 * rank)
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda gradient, name=name: traces.append(f"a gradient of {name}"))
    for setting, context in SETTINGS.items():
        model.train(setting != "eval")
        before = _state(model, optimizer)
        with context():
            scores[setting] = _scores(model, batch)
        traces += [f"{setting}: {name}" for name in _differences(before, _state(model, optimizer))]
    return traces, scores


@pytest.mark.parametrize("world_size", [1, 2])
def test_nothing_changes_in_any_setting_and_no_hook_fires(world_size: int) -> None:
    for traces, scores in run_ranks(world_size, _traces_on_rank):
        assert traces == []
        for setting in ("eval", "no_grad", "inference"):
            _assert_same(scores[setting], scores["train"])
        for name, tables in scores["autocast"].items():  # bfloat16 has 8 bits; shares that sum to 1 differ by as little
            apart = sum(float((values - scores["train"][name][t]).abs().sum()) for t, values in tables.items())
            assert apart < 0.02, name
        assert any(not torch.equal(scores["autocast"]["ggn"][t], scores["train"]["ggn"][t]) for t in TABLES)


def test_autocast_keeps_no_casts_without_gradients() -> None:
    """It keeps casts of weights until its context ends: of a scoring without gradients they would train nothing."""
    torch.manual_seed(7)
    model, batch = Noisy("cpu").eval(), make_batch()
    gradients = []
    for score in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            if score:
                sr.score_dimensions(model, [batch], "magnitude")
            model(batch)[0].backward()
        gradients.append([p.grad.clone() for p in model.over.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) == len(list(model.over.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def _ddp_on_rank(rank: int, world_size: int, score: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Weights after two steps, and scores before the first."""
    torch.manual_seed(8)
    model = nn.parallel.DistributedDataParallel(Noisy("cpu"), static_graph=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batch, scores = make_batch(10 * rank, 10 * rank + 10 + rank), {}
    for _ in range(2):
        scores = scores or (dict(sr.score_dimensions(model, [batch], "ggn")) if score else {})
        optimizer.zero_grad()
        model(batch)[0].backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()], scores


def test_ddp_without_sharding() -> None:
    torch.manual_seed(8)
    expected = sr.score_dimensions(Noisy("cpu"), [make_batch(0, 21)], "ggn")
    alone, scored = run_ranks(2, _ddp_on_rank, False), run_ranks(2, _ddp_on_rank, True)
    for (without, _), (weights, scores) in zip(alone, scored, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(without, weights, strict=True))
        assert scores.keys() == expected.keys()
        for table, values in expected.items():
            torch.testing.assert_close(scores[table], values, rtol=1e-5, atol=1e-8)
