"""Live slim models to what is around them: state dicts, optimizers and training pipelines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import LazyAwaitable
from torchrec.modules.embedding_configs import DataType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

import sseds_rec as sr
from tests.ranks import run_ranks
from tests.search import placed
from tests.search.zoo import DIM, KEYS, ROWS, Case, Click, _column, build, fill_maps, make_batch, weights_of
from tests.slim.moves import mask, plan_keeping, shards
from tests.slim.shared import CUTS, make_features, make_share, pooled, sequences
from tests.slim.test_live import EVERY, _full, _sharded
from tests.slim.test_live_options import PLACES
from tests.slim.test_slim_modules import KEPT

SHARDED = ["table_wise", "row_wise", "column_wise", "table_wise"]
CASES = [
    (Case(), EVERY),
    (Case(pooling="MEAN"), ["table_wise", "column_wise", "data_parallel", "table_wise"]),
    (Case(weighted=True), EVERY),
    (Case("ec"), SHARDED),
    (Case("fp"), SHARDED),
    (Case("mc"), ["row_wise"] * 4),
    (Case("mcec"), ["row_wise"] * 4),
]


def _slim_live(case: Case, types: list[str]) -> tuple[DistributedModelParallel, DistributedModelParallel]:
    full = _full(case, types).eval()
    return full, sr.slim(full, plan_keeping(build(case, "meta"), KEPT)).eval()  # type: ignore[return-value]


def _names(rank: int, world_size: int, case: Case, types: list[str]) -> list[tuple[list[str], list[str]]]:
    full, slim = _slim_live(case, types)
    before = {name: value.clone() for name, value in shards(slim.state_dict())}
    state, optimizer = slim.state_dict(), slim.fused_optimizer.state_dict()
    again = sr.slim(full, plan_keeping(build(case, "meta"), KEPT), init="random")
    missing, unexpected = again.load_state_dict(state, strict=True)
    assert not missing and not unexpected
    again.fused_optimizer.load_state_dict(optimizer)
    found = dict(shards(again.state_dict()))
    assert list(found) == list(before) and all(torch.equal(found[name], value) for name, value in before.items())
    states = [full.fused_optimizer.state_dict()["state"], optimizer["state"]]
    inner = [[f"{name}/{key}" for name, own in entries.items() for key in own] for entries in states]
    plain = [[name for name in own.state_dict() if ".transforms." not in name] for own in (full, slim)]
    return [(plain[0], plain[1]), (list(states[0]), list(states[1])), (inner[0], inner[1])]


@pytest.mark.parametrize(("case", "types"), CASES, ids=str)
def test_names_are_those_of_the_original(case: Case, types: list[str]) -> None:
    answers = run_ranks(2, _names, case, types)
    for of in range(3):  # optimizer states are where the shards are
        original = {name for answer in answers for name in answer[of][0]}
        slim = {name for answer in answers for name in answer[of][1]}
        assert slim == {name for name in original if ".t3." not in name and ".f4" not in name} != set()
        assert all(len(set(answer[of][1])) == len(answer[of][1]) for answer in answers)


class _Batch(Pipelineable):
    """What pipelines take."""

    def __init__(self, features: KeyedJaggedTensor, labels: Tensor) -> None:
        self.features, self.labels = features, labels

    def to(self, device: torch.device, non_blocking: bool = False) -> _Batch:
        return self

    def record_stream(self, stream: Any) -> None:
        pass

    def pin_memory(self) -> _Batch:
        return self


class _Traced(nn.Module):
    """`Click` with all that follows its embeddings in a module of its own, so that pipelines can trace it."""

    def __init__(self, click: Click) -> None:
        super().__init__()
        self.embedding, self.head = click.embedding, _Head()

    def forward(self, batch: _Batch) -> Any:
        return self.head(self.embedding(batch.features), batch.labels)


class _Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.over = nn.Linear(DIM * len(KEYS), 1).double()

    def forward(self, found: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        found = found[0] if isinstance(found, tuple) else found
        found = found.wait() if isinstance(found, LazyAwaitable) else found
        logits = self.over(torch.cat([_column(found, key) for key in KEYS], dim=1)).squeeze(1)
        return F.binary_cross_entropy_with_logits(logits, labels), logits.detach()


def _traced(case: Case, types: list[str]) -> DistributedModelParallel:
    model = _Traced(build(case, "meta"))
    if case.kind == "mcec":
        model.embedding._return_remapped_features = True
    full = _sharded(case, types, model)
    placed.load(full, {name: own for name, own in weights_of(case).items() if name.startswith("embedding.")})
    fill_maps(full)
    return full.eval()


def _dense(model: nn.Module) -> torch.optim.Optimizer:
    named = model.named_parameters()
    return torch.optim.SGD(
        [p for name, p in named if ".embedding_bags." not in name and ".embeddings." not in name], 0.05
    )


def _through_pipeline(model: Any, batches: list[_Batch]) -> list[Tensor]:
    pipeline = TrainPipelineSparseDist(model, _dense(model), torch.device("cpu"))
    remaining = iter(batches)
    return [pipeline.progress(remaining).clone() for _ in batches]


def _plainly(model: Any, batches: list[_Batch]) -> list[Tensor]:
    optimizer, found = _dense(model), []
    for batch in batches:
        optimizer.zero_grad()
        loss, logits = model(batch)
        if model.training:
            loss.backward()
            optimizer.step()
        found.append(logits)
    return found


def _pipelined(
    rank: int, world_size: int, case: Case, types: list[str]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Logits of three steps: of a live slim model, of another in a pipeline, and of one made once a pipeline had the original."""
    plan = plan_keeping(build(case, "meta"), KEPT)
    full = _traced(case, types)
    plain, piped = sr.slim(full, plan), sr.slim(full, plan)
    count = ROWS // world_size // 3
    starts = range(rank * 3 * count, (rank + 1) * 3 * count, count)
    batches = [_Batch(*make_batch(case, first, first + count)) for first in starts]
    _through_pipeline(full, batches)
    after = sr.slim(full, plan)
    for model in (plain, piped, after):
        model.train(case.kind not in ("mc", "mcec"))  # whose maps change in training
    return _plainly(plain, batches), _through_pipeline(piped, batches), _plainly(after, batches)


@pytest.mark.parametrize(("case", "types"), CASES[:1] + CASES[3:], ids=str)
def test_pipelines_run_slim_models_and_may_have_run_the_original(case: Case, types: list[str]) -> None:
    for plain, piped, after in run_ranks(2, _pipelined, case, types):
        torch.testing.assert_close(piped, plain, rtol=0, atol=1e-6)
        torch.testing.assert_close(after, plain, rtol=0, atol=1e-6)


def _half(rank: int, world_size: int, kind: str, stored: DataType) -> dict[str, Tensor]:
    make = pooled if kind == "ebc" else sequences
    full = placed.shard(make(device="meta", data_type=stored), PLACES)
    placed.load(full, dict(make(data_type=stored).named_parameters()))
    slim = sr.slim(full, plan_keeping(make(), CUTS[0]))
    found = slim(make_share(rank, world_size))
    found = found.wait() if hasattr(found, "wait") else found
    columns = {key: found[key] if kind == "ebc" else found[key].values() for key in list(found.keys())}
    sum(own.float().square().sum() for own in columns.values()).backward()  # type: ignore[union-attr]
    return {key: own.detach() for key, own in columns.items()}


@pytest.mark.parametrize("kind", ["ebc", "ec"])
def test_tables_of_half_precision(kind: str) -> None:
    make = pooled if kind == "ebc" else sequences
    masked = make()
    masked.load_state_dict(make(data_type=DataType.FP16).state_dict())  # its own collections sum in float16
    mask(masked, CUTS[0])
    expected = masked(make_features())
    answers = run_ranks(2, _half, kind, DataType.FP16)
    for key in ("a@first", "b", "a@second", "c"):
        found = torch.cat([own[key] for own in answers])
        own = expected[key] if kind == "ebc" else expected[key].values()
        torch.testing.assert_close(found, own, rtol=0, atol=1e-6)
