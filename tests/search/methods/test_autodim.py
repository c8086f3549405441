"""The mixture of candidates against plain PyTorch, and the choice against all choices there are."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedTensor

from sseds_rec.errors import UserError
from sseds_rec.search.budget import Budget
from sseds_rec.search.methods.autodim import AutodimConfig, Mixture, allocate_autodim
from sseds_rec.search.scores import Table

FIELDS, DIM, WIDTHS = ["a", "b", "c"], 8, [1, 3, 8]


def _mixture(annealing: float = 5e-5) -> Mixture:
    torch.manual_seed(0)
    mixture = Mixture(FIELDS, DIM, WIDTHS, annealing, seed=3)
    mixture.log_alpha.copy_(torch.randn(3, 3))
    return mixture


def _plain(mixture: Mixture, fields: dict[str, Tensor], shares: Tensor) -> dict[str, Tensor]:
    """Σ_n p_n BN(W_n e[:d_n]), candidate by candidate, times the scale."""
    seen = {}
    for row, name in enumerate(mixture.fields):
        candidates = [
            nn.BatchNorm1d(DIM, affine=False)(fields[name][:, :width] @ transform[row].T)
            for width, transform in zip(WIDTHS, mixture.transforms, strict=True)
        ]
        seen[name] = mixture.scale * sum(p * one for p, one in zip(shares[row], candidates, strict=True))
    return seen


def test_it_is_the_mixture_of_normed_candidates_and_so_is_its_gradient() -> None:
    mixture = _mixture().eval()
    order = ["c", "a", "b"]  # as a sharded collection may have them
    values = (torch.randn(50, 3 * DIM) * torch.rand(3 * DIM) + 2).requires_grad_()
    found = mixture(KeyedTensor(order, [DIM] * 3, values))
    assert found.keys() == order and found.length_per_key() == [DIM] * 3

    plain = _plain(mixture, dict(zip(order, values.split(DIM, dim=1), strict=True)), mixture.log_alpha.softmax(dim=1))
    expected = torch.cat([plain[name] for name in order], dim=1)
    torch.testing.assert_close(found.values(), expected, rtol=1e-4, atol=1e-5)

    weights, inputs = torch.randn_like(expected), [values, *mixture.transforms, mixture.scale]
    for ours, theirs in zip(
        torch.autograd.grad((found.values() * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_a_constant_field_says_nothing() -> None:
    values = torch.cat([torch.full((20, DIM), 5.0), torch.randn(20, 2 * DIM)], dim=1)
    assert _mixture()(KeyedTensor(FIELDS, [DIM] * 3, values))["a"].abs().max() < 1e-3


def test_noise_is_gumbels_and_the_temperature_anneals() -> None:
    mixture, steps = _mixture(annealing=1e-4).train(), 4000
    drawn = []
    for step in range(5000, 5000 + steps):
        mixture.step = step
        drawn.append(mixture.shares())
    shares = torch.stack(drawn).double()  # [steps, F, N]
    frequencies = nn.functional.one_hot(shares.argmax(dim=2), 3).double().mean(dim=0)
    # The largest of log α + g is n with probability softmax(log α)_n.
    torch.testing.assert_close(frequencies, mixture.probabilities().double(), rtol=0, atol=0.04)
    # The difference of two such numbers is logistic, of standard deviation π/√3, over τ, which here falls from .5 to .1.
    first, last = (shares[part, :, 0].log() - shares[part, :, 1].log() for part in (slice(0, 400), slice(-400, None)))
    spread = math.pi / math.sqrt(3)
    assert float(first.std(dim=0).mean()) == pytest.approx(spread / 0.48, rel=0.1)
    assert float(last.std(dim=0).mean()) == pytest.approx(spread / 0.12, rel=0.1)
    mixture.step = 10**6
    assert mixture.temperature == 0.01


def test_the_search_draws_other_noise_than_training_and_the_same_again() -> None:
    mixture = _mixture().train()
    with mixture.searching() as log_alpha:
        searching = mixture.shares()
        assert torch.equal(log_alpha, mixture.log_alpha)
    assert not torch.allclose(searching, mixture.shares())
    assert torch.equal(mixture.shares(), mixture.shares()) and torch.equal(mixture.shares(), _mixture().shares())


def test_updates_are_adams() -> None:
    mixture, reference = _mixture(), nn.Parameter(_mixture().log_alpha.clone())
    adam = torch.optim.Adam([reference], lr=0.1)
    for number in range(1, 6):
        reference.grad = torch.randn(3, 3)
        adam.step()
        mixture.update(reference.grad, 0.1, number)
    torch.testing.assert_close(mixture.log_alpha, reference.detach())


def _tables(random: np.random.Generator) -> dict[str, Table]:
    return {f"t{i}": Table(int(random.integers(2, 50)), DIM) for i in range(4)}


@pytest.mark.parametrize("kind", ["parameters", "bytes", "dims"])
def test_it_chooses_the_most_probable_widths_that_fit(kind: str) -> None:
    random, config = np.random.default_rng(0), AutodimConfig(widths=[1, 3, 5, 8])
    choices = set()
    for _ in range(40):
        tables = _tables(random)
        probabilities = {name: random.dirichlet(np.full(4, 0.3)) for name in tables}
        facts = list(tables.values())
        smallest, largest = (budget_cost(kind, facts, [width] * 4) for width in (1, 8))
        budget = Budget(**{kind: int(random.integers(smallest, largest))})
        plan = allocate_autodim(tables, probabilities, budget, config)

        worth = {}
        for widths in itertools.product([1, 3, 5, 8], repeat=4):
            if budget.cost(facts, widths) <= budget.limit(facts):
                of_each = zip(probabilities.values(), widths, strict=True)
                worth[widths] = sum(math.log(p[[1, 3, 5, 8].index(width)]) for p, width in of_each)
        best = max(worth.values())
        assert worth[tuple(plan.dims().values())] == pytest.approx(best)  # so it fits, too
        assert plan.search["log_probability"] == pytest.approx(best)
        assert all(table.kept == list(range(table.embedding_dim)) for table in plan.tables.values())
        argmax = [[1, 3, 5, 8][p.argmax()] for p in probabilities.values()]
        choices.add(plan.search["choice"])
        assert (plan.search["choice"] == "argmax") == (list(plan.dims().values()) == argmax)
        assert plan.search.get("argmax_cost", 0) in (0, budget.cost(facts, argmax))
    assert len(choices) == 2


def budget_cost(kind: str, tables: list[Table], widths: list[int]) -> int:
    return Budget(**{kind: 2}).cost(tables, widths)


def test_what_no_candidate_can_be_is_refused() -> None:
    tables = {"t": Table(100, DIM), "u": Table(10, DIM)}
    even = {name: np.full(3, 1 / 3) for name in tables}
    with pytest.raises(
        UserError, match=r"the smallest candidates, 2 columns of every table, cost 220, the budget is 219"
    ):
        allocate_autodim(tables, even, Budget(parameters=219), AutodimConfig(widths=[2, 4, 8]))
    with pytest.raises(UserError, match=r"search.autodim.widths: 9 is above model.embedding_dim=8"):
        allocate_autodim(tables, even, Budget(parameters=0.5), AutodimConfig(widths=[2, 4, 9]))
    with pytest.raises(ValueError, match="not ascending"):
        AutodimConfig(widths=[4, 2])


def test_the_default_candidates_are_the_papers_at_its_width() -> None:
    assert AutodimConfig().candidates(32) == [2, 8, 16, 24, 32]
    assert AutodimConfig().candidates(4) == [1, 2, 3, 4]
