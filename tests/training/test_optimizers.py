"""Several steps of training against plain PyTorch on the whole batch, with the optimizers' formulas written out."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import KeyedOptimizer

from sseds_rec.config import load_config
from sseds_rec.data.batch import Batch
from sseds_rec.distributed.runtime import Runtime
from sseds_rec.distributed.sharding import ShardingConfig, shard
from sseds_rec.errors import UserError
from sseds_rec.training.checkpoint import CheckpointStore, Progress
from sseds_rec.training.config import TrainConfig
from sseds_rec.training.optimizers import RateSchedule, build_optimizer, fuse_table_optimizer
from sseds_rec.training.pipelines import train_pipeline
from tests.models.plain import fill_tables
from tests.ranks import run_ranks

ROWS = {"user": 7, "item": 11}  # few, so that ids repeat within a batch
B, D, STEPS = 12, 8, 6
RATE, TABLE_RATE = 0.02, 0.05
#: What the rates are multiplied with when they warm up over 4 steps and are reduced to a fifth before the last.
SCALES = [0.25, 0.5, 0.75, 1.0, 1.0, 0.2]


class _Net(nn.Module):
    """Two tables under two linear layers; Batch -> (loss, (loss, logits, labels))."""

    def __init__(self) -> None:
        super().__init__()
        tables = [
            EmbeddingBagConfig(name=name, feature_names=[name], num_embeddings=rows, embedding_dim=D)
            for name, rows in ROWS.items()
        ]
        self.embeddings = EmbeddingBagCollection(tables, device=torch.device("meta"))
        self.over = nn.Sequential(nn.Linear(2 * D, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        embeddings = self.embeddings(batch.sparse)
        x = torch.cat([embeddings[name] for name in ROWS], dim=1)
        logits = self.over(x).squeeze(1)
        loss = F.binary_cross_entropy_with_logits(logits, batch.labels)
        return loss, (loss.detach(), logits.detach(), batch.labels)


def _rows(step: int) -> tuple[dict[str, list[list[int]]], Tensor]:
    """Field -> per row its ids, none to three, and labels; other ones each step."""
    random = torch.Generator().manual_seed(step)
    ids = {
        name: [torch.randint(0, rows, (int(n),), generator=random).tolist() for n in torch.randint(0, 4, (B,), generator=random)]
        for name, rows in ROWS.items()
    }  # fmt: skip
    return ids, torch.randint(0, 2, (B,), generator=random).float()


def _batch(step: int, rank: int, world_size: int) -> Batch:
    ids, labels = _rows(step)
    mine = slice(rank * B // world_size, (rank + 1) * B // world_size)
    bags = [bag for field in ids.values() for bag in field[mine]]
    sparse = KeyedJaggedTensor(
        keys=list(ROWS),
        values=torch.tensor([i for bag in bags for i in bag]),
        lengths=torch.tensor([len(bag) for bag in bags], dtype=torch.int32),
    )
    return Batch(dense=torch.empty(len(labels[mine]), 0), sparse=sparse, labels=labels[mine])


def _start() -> dict[str, Tensor]:
    """The weights at step 0, by their names in `_weights`."""
    random = torch.Generator().manual_seed(5)
    shapes = {name: (rows, D) for name, rows in ROWS.items()} | {"0.weight": (6, 2 * D), "0.bias": (6,)}
    return {
        name: 0.5 * torch.randn(shape, generator=random)
        for name, shape in {**shapes, "2.weight": (1, 6), "2.bias": (1,)}.items()
    }


def _model(
    runtime: Runtime, config: TrainConfig, placement: str
) -> tuple[DistributedModelParallel, KeyedOptimizer, RateSchedule]:
    net = _Net()
    fuse_table_optimizer(net, config.table_optimizer, config.table_rate, placement)  # type: ignore[arg-type]
    model = shard(net, ShardingConfig(type=placement), runtime, B)  # type: ignore[arg-type]
    fill_tables(model, _start())
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.startswith("over."):
                value.copy_(_start()[name.removeprefix("over.")])
    optimizer = build_optimizer(model, config)
    return model, optimizer, RateSchedule(optimizer, config)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Name -> this rank's part of a weight, with where it starts: (values, first row, first column) for a table's shards."""
    found: dict[str, Any] = {}
    for name, value in model.state_dict().items():
        if name.startswith("over."):
            found[name.removeprefix("over.")] = value.clone()
        elif hasattr(value, "local_shards"):
            for part in value.local_shards():
                found[name.split(".")[-2]] = (part.tensor.clone(), *part.metadata.shard_offsets)
        else:
            found[name.split(".")[-2]] = value.clone()
    return found


def _train_on_rank(rank: int, world_size: int, config: TrainConfig, placement: str) -> dict[str, Any]:
    runtime = Runtime(rank, world_size, torch.device("cpu"))
    model, optimizer, rates = _model(runtime, config, placement)
    batches = iter([_batch(step, rank, world_size) for step in range(STEPS)])
    model.train()
    with train_pipeline(model, optimizer, runtime) as train_step:
        for step in range(STEPS):
            rates.set(step, reductions=int(step == STEPS - 1))
            train_step(batches)
    return _weights(model)


Update = Callable[[Tensor, Tensor, float], Tensor]


def _sgd() -> Update:
    return lambda w, g, rate: w - rate * g


def _adagrad() -> Update:
    total: Tensor | float = 0.0

    def update(w: Tensor, g: Tensor, rate: float) -> Tensor:
        nonlocal total
        total = total + g.square()
        return w - rate * g / (total.sqrt() + 1e-8)

    return update


def _rowwise_adagrad() -> Update:
    total: Tensor | float = 0.0

    def update(w: Tensor, g: Tensor, rate: float) -> Tensor:
        nonlocal total
        total = total + g.square().mean(dim=1, keepdim=True)
        return w - rate * g / (total.sqrt() + 1e-8)

    return update


def _adam() -> Update:
    m: Tensor | float = 0.0
    v: Tensor | float = 0.0
    steps = 0

    def update(w: Tensor, g: Tensor, rate: float) -> Tensor:
        nonlocal m, v, steps
        steps += 1
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g.square()
        return w - rate * (m / (1 - 0.9**steps)) / ((v / (1 - 0.999**steps)).sqrt() + 1e-8)

    return update


FORMULAS = {"adam": _adam, "rowwise_adagrad": _rowwise_adagrad, "adagrad": _adagrad, "sgd": _sgd}


def _gradients(weights: dict[str, Tensor], step: int) -> dict[str, Tensor]:
    """Of the mean loss over the whole batch, row by row."""
    leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
    ids, labels = _rows(step)
    x = torch.stack([torch.cat([leaves[name][ids[name][b]].sum(dim=0) for name in ROWS]) for b in range(B)])
    hidden = torch.tanh(x @ leaves["0.weight"].T + leaves["0.bias"])
    z = (hidden @ leaves["2.weight"].T + leaves["2.bias"]).squeeze(1)
    loss = -(labels * F.logsigmoid(z) + (1 - labels) * F.logsigmoid(-z)).mean()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def _reference(
    dense: Callable[[], Update], table: Callable[[], Update], scales: list[float], clip_norm: float = math.inf
) -> dict[str, Tensor]:
    weights = {name: value.double() for name, value in _start().items()}
    updates = {name: (table if name in ROWS else dense)() for name in weights}
    for step, scale in enumerate(scales):
        gradients = _gradients(weights, step)
        norm = math.sqrt(sum(float(g.square().sum()) for name, g in gradients.items() if name not in ROWS))
        for name, g in gradients.items():
            shrink = 1.0 if name in ROWS else min(1.0, clip_norm / norm)
            rate = scale * (TABLE_RATE if name in ROWS else RATE)
            weights[name] = updates[name](weights[name], shrink * g, rate)
    return weights


def _assert_equal(parts: dict[str, Any], expected: dict[str, Tensor]) -> None:
    for name, part in parts.items():
        values, *offsets = part if isinstance(part, tuple) else (part,)
        whole = expected[name].float()
        for axis, offset in enumerate(offsets):
            whole = whole.narrow(axis, offset, values.shape[axis])
        torch.testing.assert_close(values, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("table_optimizer", "placement"),
    [
        ("adam", "data_parallel"),
        ("rowwise_adagrad", "table_wise"),
        ("rowwise_adagrad", "row_wise"),
        ("adagrad", "table_wise"),
        ("adagrad", "column_wise"),
        ("adagrad", "data_parallel"),
        ("sgd", "row_wise"),
        ("sgd", "data_parallel"),
    ],
)
def test_tables_and_rates_follow_the_formulas_on_any_number_of_ranks(
    world_size: int, table_optimizer: str, placement: str
) -> None:
    config = TrainConfig(
        learning_rate=RATE,
        table_optimizer=table_optimizer,  # type: ignore[arg-type]
        table_learning_rate=TABLE_RATE,
        warmup_steps=4,
        reduce_factor=0.2,
    )
    expected = _reference(_adam, FORMULAS[table_optimizer], SCALES)
    answers = run_ranks(world_size, _train_on_rank, config, placement)
    assert set().union(*answers) == set(expected)
    for parts in answers:
        _assert_equal(parts, expected)


@pytest.mark.parametrize("placement", ["table_wise", "data_parallel"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_clipping_bounds_the_norm_of_the_dense_gradients_alone(world_size: int, placement: str) -> None:
    clip = 0.1
    config = TrainConfig(
        optimizer="SGD",
        learning_rate=RATE,
        table_optimizer="sgd",
        table_learning_rate=TABLE_RATE,
        warmup_steps=4,
        reduce_factor=0.2,
        clip_norm=clip,
    )
    expected, unclipped = (_reference(_sgd, _sgd, SCALES, norm) for norm in (clip, math.inf))
    assert not torch.allclose(expected["0.weight"], unclipped["0.weight"], rtol=1e-2)
    for parts in run_ranks(world_size, _train_on_rank, config, placement):
        _assert_equal(parts, expected)


def _of_torch() -> Iterator[str]:
    """The optimizers that the config's own error message offers."""
    with pytest.raises(ValueError, match="choose one of") as refused:
        TrainConfig(optimizer="none")
    match = re.search(r"choose one of ([\w, ]+)", str(refused.value))
    assert match
    yield from match[1].strip().split(", ")


DENSE: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in _of_torch()),
    ("SGD", {"momentum": 0.9, "nesterov": True}),
    ("AdamW", {"betas": [0.8, 0.99], "weight_decay": 0.1, "amsgrad": True}),
    ("Adam", {"foreach": True}),
]


def _config(optimizer: str, options: dict[str, Any]) -> TrainConfig:
    return TrainConfig(
        optimizer=optimizer,
        optimizer_options=options,
        learning_rate=RATE,
        table_optimizer="sgd",
        table_learning_rate=TABLE_RATE,
    )


def _train_each_on_rank(rank: int, world_size: int, folder: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Weights after all steps of each of DENSE: in one go, and from a checkpoint of the third step."""
    runtime = Runtime(rank, world_size, torch.device("cpu"))

    def steps(model: nn.Module, optimizer: KeyedOptimizer, first: int, last: int) -> None:
        with train_pipeline(model.train(), optimizer, runtime) as train_step:
            batches = iter([_batch(step, rank, world_size) for step in range(first, last)])
            for _ in range(first, last):
                train_step(batches)

    answers = []
    for number, (name, options) in enumerate(DENSE):
        model, optimizer, _ = _model(runtime, _config(name, options), "table_wise")
        store = CheckpointStore(folder / str(number), runtime)
        steps(model, optimizer, 0, 3)
        store.save(model, optimizer, Progress(step=3))
        steps(model, optimizer, 3, STEPS)
        resumed, its_optimizer, _ = _model(runtime, _config(name, options), "table_wise")
        store.load(3, resumed, its_optimizer)
        steps(resumed, its_optimizer, 3, STEPS)
        answers.append((_weights(model), _weights(resumed)))
    return answers


@pytest.mark.parametrize("world_size", [1, 2])
def test_dense_parameters_take_any_optimizer_of_torch_and_it_resumes(world_size: int, tmp_path: Path) -> None:
    every = run_ranks(world_size, _train_each_on_rank, tmp_path)
    for number, (name, options) in enumerate(DENSE):
        kind = getattr(torch.optim, name)
        own = {**options, "fused": False} if "fused" in inspect.signature(kind).parameters else options

        def plain(kind: Any = kind, own: dict[str, Any] = own) -> Update:
            known: list[tuple[nn.Parameter, torch.optim.Optimizer]] = []

            def update(w: Tensor, g: Tensor, rate: float) -> Tensor:
                if not known:
                    weight = nn.Parameter(w)
                    known.append((weight, kind([weight], lr=rate, **own)))
                weight, optimizer = known[0]
                weight.grad = g
                optimizer.step()
                return weight.detach().clone()

            return update

        expected = _reference(plain, _sgd, [1.0] * STEPS)
        for answers in every:
            trained, resumed = answers[number]
            _assert_equal(trained, expected)
            torch.testing.assert_close(resumed, trained, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.optimizer=LBFGS", "train.optimizer='LBFGS': .*choose one of .*AdamW"),
        ("train.optimizer=Muon", "train.optimizer='Muon': .*choose one of"),
        ("train.optimizer=SparseAdam", "train.optimizer='SparseAdam': .*choose one of"),
        ("train.optimizer=adamw", "train.optimizer='adamw': .*choose one of .*AdamW"),
        ("train.optimizer_options.momentum=0.9", "train.optimizer_options.momentum; Adam takes betas"),
        ("train.optimizer_options.lr=0.9", "train.optimizer_options.lr; set train.learning_rate"),
        ("train.optimizer_options.betas=0.9", "Adam refuses {'betas': 0.9}"),
        ("train.reduce_patience=2", "training stops after train.patience=2"),
        ("train.reduce_factor=1", "train.reduce_factor=1: .*less than 1"),
        ("train.clip_norm=0", "train.clip_norm=0: .*greater than 0"),
    ],
)
def test_bad_settings_are_one_line(override: str, says: str, config: Path) -> None:
    with pytest.raises(UserError, match=says) as refused:
        load_config(config, ["train.patience=2", override])
    assert "\n" not in str(refused.value)
