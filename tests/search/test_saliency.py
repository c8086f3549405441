"""Scores against autograd in an explicit α, on 1 and 2 processes, and that scoring leaves no trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchrec.optim
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints

import sseds_rec as sr
from sseds_rec.distributed.sharding import BagSharder
from tests.ranks import run_ranks
from tests.search.reference import TABLES, ClickModel, explicit_alpha, make_batch, make_rows

ROWS = 90
CUTS = {1: [[(0, 40), (40, 90)]], 2: [[(0, 25), (25, 40)], [(40, 77), (77, 90)]]}
"""Ranks -> per rank, the (first, last) row of each batch: sizes differ between ranks and batches."""


def _weights() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {name: value.detach().clone() for name, value in ClickModel().state_dict().items()}


def _expected(criterion: str) -> dict[str, Tensor]:
    raw = explicit_alpha(_weights(), make_rows(ROWS, seed=5))[criterion]
    total = sum(float(values.sum()) for values in raw.values())
    return {name: values / total for name, values in raw.items()}


def _assert_scores(scores: Any, criterion: str) -> None:
    expected = _expected(criterion)
    assert list(scores) == list(TABLES)
    assert sum(float(values.sum()) for values in scores.values()) == pytest.approx(1.0, abs=1e-12)
    for name, values in expected.items():
        assert scores[name].dtype == torch.float64
        torch.testing.assert_close(scores[name], values, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("criterion", ["snip", "ggn"])
def test_plain_model_equals_explicit_alpha(criterion: str) -> None:
    model = ClickModel()
    model.load_state_dict(_weights())
    rows = make_rows(ROWS, seed=5)
    _assert_scores(sr.score_dimensions(model, [make_batch(rows, *cut) for cut in CUTS[1][0]], criterion), criterion)


def _sharded(
    sharding_type: str, world_size: int, optimizer: type[torch.optim.Optimizer] | None
) -> DistributedModelParallel:
    model = ClickModel(device="meta")
    if optimizer:
        apply_optimizer_in_backward(optimizer, model.ebc.parameters(), {"lr": 0.1})
    constraints = {name: ParameterConstraints(sharding_types=[sharding_type], min_partition=4) for name in TABLES}
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=world_size, compute_device="cpu"), constraints=constraints
    )
    sharders = [BagSharder()]
    plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
    sharded = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
    _load(sharded, _weights())
    return sharded


def _load(model: DistributedModelParallel, weights: dict[str, Tensor]) -> None:
    for name, value in model.state_dict().items():
        if not hasattr(value, "local_shards"):
            value.copy_(weights[name])
            continue
        for shard in value.local_shards():
            row, column = shard.metadata.shard_offsets
            rows, columns = shard.metadata.shard_sizes
            shard.tensor.copy_(weights[name][row : row + rows, column : column + columns])


def _score_on_rank(rank: int, world_size: int, sharding_type: str, criterion: str) -> dict[str, Tensor]:
    optimizer = None if sharding_type == "data_parallel" else torchrec.optim.RowWiseAdagrad
    model = _sharded(sharding_type, world_size, optimizer)
    rows = make_rows(ROWS, seed=5)
    batches = [make_batch(rows, *cut) for cut in CUTS[world_size][rank]]
    return dict(sr.score_dimensions(model, batches, criterion))


@pytest.mark.parametrize("sharding_type", ["table_wise", "row_wise", "column_wise", "data_parallel"])
@pytest.mark.parametrize("criterion", ["snip", "ggn"])
def test_two_ranks_with_uneven_batches_equal_explicit_alpha(sharding_type: str, criterion: str) -> None:
    for scores in run_ranks(2, _score_on_rank, sharding_type, criterion):
        _assert_scores(scores, criterion)


def _all_reduced_on_rank(rank: int, world_size: int, criterion: str) -> list[tuple[str, int]]:
    model = _sharded("row_wise", world_size, torchrec.optim.RowWiseAdagrad)
    rows = make_rows(ROWS, seed=5)
    batches = [make_batch(rows, *cut) for cut in CUTS[world_size][rank]]
    batches += [make_batch(rows, 0, 30)] * rank  # the last rank has one more, which nobody waits for
    found: list[tuple[str, int]] = []
    original = dist.all_reduce

    def recorded(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append((str(tensor.dtype), tensor.numel()))
        return original(tensor, *args, **kwargs)

    dist.all_reduce = recorded
    try:
        scores = sr.score_dimensions(model, batches, criterion)
    finally:
        dist.all_reduce = original
    assert scores.search["batches"] == 2
    return found


@pytest.mark.parametrize(("criterion", "numbers"), [("snip", 32), ("ggn", 32), ("ggn_rotated", 2 * 384 + 32 + 2 * 3)])
def test_one_small_all_reduce_a_batch_is_the_only_communication(criterion: str, numbers: int) -> None:
    """Σd = 8 + 16 + 8 and Σd² = 384 of three tables; three more are rows, loss and failures."""
    flag, moments = ("torch.int64", 1), ("torch.float64", numbers + 3)
    for found in run_ranks(2, _all_reduced_on_rank, criterion):
        assert found == [flag, moments, flag, moments, flag]


def _training_state(model: DistributedModelParallel, dense: torch.optim.Optimizer) -> list[Tensor]:
    state = [value for _, value in sorted(model.state_dict().items())]
    fused = model.fused_optimizer.state_dict()["state"]
    state += [value for _, entries in sorted(fused.items()) for _, value in sorted(entries.items())]
    state += [value for entries in dense.state_dict()["state"].values() for value in entries.values()]
    lookups = [lookup for module in model.modules() for lookup in getattr(module, "_lookups", [])]
    state += [m.iter.clone() for lookup in lookups for m in lookup.modules() if hasattr(m, "iter_cpu")]
    local = [shard.tensor for v in state for shard in (v.local_shards() if hasattr(v, "local_shards") else [])]
    plain = [v for v in state if isinstance(v, Tensor) and not hasattr(v, "local_shards")]
    return [*local, *plain, *(p.grad for p in dense.param_groups[0]["params"])]


def _trace_left_on_rank(rank: int, world_size: int, optimizer: str) -> bool:
    model = _sharded("table_wise", world_size, getattr(torchrec.optim, optimizer))
    dense = torch.optim.Adam([p for name, p in model.named_parameters() if "over." in name], lr=0.01)
    rows = make_rows(ROWS, seed=5)

    def step() -> None:
        dense.zero_grad()
        model(make_batch(rows, 30 * rank, 30 * rank + 30))[0].backward()
        dense.step()

    model.train()
    step()
    model.over_mode = [module.training for module in model.modules()]
    before, rng = copy.deepcopy(_training_state(model, dense)), torch.get_rng_state()
    for criterion in ("snip", "ggn"):
        sr.score_dimensions(model, [make_batch(rows, 40 * rank, 40 * rank + 35)], criterion)
    same = all(torch.equal(a, b) for a, b in zip(before, _training_state(model, dense), strict=True))
    same &= torch.equal(rng, torch.get_rng_state())
    same &= model.over_mode == [module.training for module in model.modules()]
    step()  # and training goes on
    return same


@pytest.mark.parametrize("optimizer", ["RowWiseAdagrad", "SGD"])
def test_scoring_leaves_weights_optimizers_gradients_modes_and_rng_bit_identical(optimizer: str) -> None:
    assert run_ranks(2, _trace_left_on_rank, optimizer) == [True, True]


def test_num_batches_takes_the_first_ones() -> None:
    model = ClickModel()
    rows = make_rows(ROWS, seed=5)
    batches = [make_batch(rows, 0, 40), make_batch(rows, 40, 90)]
    one = sr.score_dimensions(model, batches, num_batches=1)
    torch.testing.assert_close(dict(one), dict(sr.score_dimensions(model, batches[:1])), rtol=0, atol=0)
    assert one.search["batches"] == 1 and one.search["samples"] == 40


def test_loss_fn_decides_what_is_scored() -> None:
    model = ClickModel()
    batch = make_batch(make_rows(ROWS, seed=5), 0, 40)
    doubled = sr.score_dimensions(model, [batch], loss_fn=lambda m, b: 2 * m(b)[0])
    torch.testing.assert_close(dict(doubled), dict(sr.score_dimensions(model, [batch])))


def test_two_modules_are_named_by_their_path_and_a_module_called_twice_sums() -> None:
    class TwoTowers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = ClickModel()  # an attribute with the name of DDP's wrapper must keep it
            self.right = ClickModel()

        def forward(self, batch: Any) -> Tensor:
            return self.module(batch)[0] + self.module(batch)[0] + self.right(batch)[0]

    torch.manual_seed(0)
    model = TwoTowers().eval()
    batch = make_batch(make_rows(ROWS, seed=5), 0, 40)
    scores = sr.score_dimensions(model, [batch])
    assert list(scores) == [f"{path}.ebc.{table}" for path in ("module", "right") for table in TABLES]
    left = sr.score_dimensions(model.module, [batch])
    ratio = torch.cat([scores[f"module.ebc.{t}"] / left[t] for t in TABLES])
    right = sr.score_dimensions(model.right, [batch])
    other = torch.cat([scores[f"right.ebc.{t}"] / right[t] for t in TABLES])
    torch.testing.assert_close(ratio, ratio[0].expand_as(ratio))
    torch.testing.assert_close(other, other[0].expand_as(other))


def test_what_cannot_be_scored_is_refused_by_name() -> None:
    model, batch = ClickModel(), make_batch(make_rows(ROWS, seed=5), 0, 40)
    with pytest.raises(sr.UserError, match="unknown criterion 'spin'; choose one of snip, snip_batch_abs"):
        sr.score_dimensions(model, [batch], "spin")
    with pytest.raises(sr.UserError, match="no batch"):
        sr.score_dimensions(model, [])
    with pytest.raises(sr.UserError, match="holds no EmbeddingBagCollection"):
        sr.score_dimensions(nn.Linear(2, 1), [batch])
    with pytest.raises(sr.UserError, match="no logits: the loss calls none of binary_cross_entropy_with_logits"):
        sr.score_dimensions(
            model,
            [batch],
            "ggn",
            loss_fn=lambda m, b: F.softplus(
                m.over(torch.cat([m.ebc(b[0])[f] for f in ("f0", "f1", "f2", "f3")], 1))
            ).mean(),
        )
    with pytest.raises(sr.UserError, match="in eval mode the model must return its mean loss"):
        sr.score_dimensions(model, [batch], loss_fn=lambda m, b: m.ebc(b[0]).values())
    with torch.no_grad():
        model.over[0].weight.fill_(float("nan"))
    with pytest.raises(sr.UserError, match="the loss of a scoring batch is nan"):
        sr.score_dimensions(model, [batch])


def test_curvature_of_probabilities_is_that_of_their_logits() -> None:
    model, batch = ClickModel().eval(), make_batch(make_rows(ROWS, seed=5), 0, 40)

    def on_probability(m: nn.Module, b: Any) -> Tensor:
        pooled = m.ebc(b[0])
        p = torch.sigmoid(m.over(torch.cat([pooled[f] for f in ("f0", "f1", "f2", "f3")], dim=1)).squeeze(1))
        return F.binary_cross_entropy(p, b[1])

    expected = sr.score_dimensions(model, [batch], "ggn")
    torch.testing.assert_close(dict(sr.score_dimensions(model, [batch], "ggn", loss_fn=on_probability)), dict(expected))
