"""The multiple-choice knapsack: one width for every table, as much value as the budget can hold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: A better choice than the one found would be better by less than this share: less than the scores' own rounding adds up to.
TOLERANCE = 1e-12
#: States kept at once. Only instances whose values per cost are all but equal come near it, and those are filled to
#: the last unit long before.
MAX_STATES = 1 << 17


@dataclass(frozen=True)
class Choice:
    """A solution.

    Attributes:
        options: int64 [T], one option of every class.
        gap: by how much the optimum may be better, as a share of its value; 0 when this is proven to be it.
    """

    options: np.ndarray
    gap: float


def solve(costs: np.ndarray, values: np.ndarray, capacity: int) -> Choice:
    """Chooses one option of each class so that the sum of values is largest among those that cost at most `capacity`.

    At a price λ for each unit of cost no choice is worth more than U(λ) = Σ_t max_j (v_tj - λ c_tj) + λ capacity. The λ of the
    lowest U (the LP relaxation) is where greedy by density would break off. An option's loss is what its v - λc lacks to its
    class's best, so that a choice is worth U less its options' losses less λ times what it leaves unspent: one that is
    better than the best known has losses below the gap only. Those few are enumerated class by class, as Pareto states
    of (cost, value). (Dyer, Kayal & Walsh, 1984; Pisinger, "A minimal algorithm for the multiple-choice knapsack", 1995.)
    Nothing is asked of the shape of value over cost.

    Args:
        costs: int64 [T, J], not negative; option 0 costs and is worth nothing.
        values: float64 [T, J]; -inf where a class has fewer options.
        capacity: not negative.

    Returns:
        The choice; the same for the same input. Of options worth the same the cheaper is taken.
    """
    unit = int(np.gcd.reduce(costs, axis=None)) or 1
    costs, capacity = costs // unit, capacity // unit
    rows = np.arange(len(costs))
    price, start = _cheapest_price(costs, values, capacity)
    surplus = values - price * costs
    losses = surplus.max(axis=1, keepdims=True) - surplus
    bound = float(surplus.max(axis=1).sum()) + price * capacity
    start = _spend_on_ties(costs, losses, start, capacity, TOLERANCE * bound / len(costs))
    best = _complete(costs, values, start, capacity)
    return _improve(costs, values, losses, price, bound, start, best, capacity) if bound > 0 else Choice(0 * rows, 0.0)


def _cheapest_price(costs: np.ndarray, values: np.ndarray, capacity: int) -> tuple[float, np.ndarray]:
    """The λ that minimises U, and a choice that is best at this price and affordable.

    U is convex and piecewise linear: where the lines of an affordable and an unaffordable choice cross, either a third choice
    lies above both, and replaces one of them, or this is the minimum.
    """
    rows = np.arange(len(costs))
    low, high = values.argmax(axis=1), np.zeros(len(costs), np.int64)
    if costs[rows, low].sum() <= capacity:
        return 0.0, low
    while True:
        spent = int(costs[rows, low].sum() - costs[rows, high].sum())
        price = float(values[rows, low].sum() - values[rows, high].sum()) / spent
        surplus = values - price * costs
        between = surplus.argmax(axis=1)
        gained = (surplus[rows, between] - surplus[rows, high]).sum()
        if gained <= TOLERANCE * abs(float(surplus[rows, between].sum())):
            return price, high
        if int(costs[rows, between].sum()) <= capacity:
            if (between == high).all():
                return price, high
            high = between
        else:
            if (between == low).all():
                return price, high
            low = between


def _spend_on_ties(costs: np.ndarray, losses: np.ndarray, start: np.ndarray, capacity: int, free: float) -> np.ndarray:
    """Goes on from `start` with options that lose nothing at the price, table by table, while they fit."""
    chosen = start.copy()
    left = capacity - int(costs[np.arange(len(costs)), start].sum())
    own = costs[np.arange(len(costs)), start][:, None]
    for row in np.flatnonzero(((losses <= free) & (costs > own)).any(axis=1)):
        more = costs[row] - own[row]
        fitting = np.flatnonzero((losses[row] <= free) & (more > 0) & (more <= left))
        if len(fitting):
            chosen[row] = fitting[more[fitting].argmax()]
            left -= int(more[chosen[row]])
    return chosen


def _complete(costs: np.ndarray, values: np.ndarray, start: np.ndarray, capacity: int) -> np.ndarray:
    """Spends what `start` leaves, by density, on what still fits: a first choice to beat."""
    rows = np.arange(len(costs))
    chosen = start
    while True:
        more, gain = costs - costs[rows, chosen][:, None], values - values[rows, chosen][:, None]
        left = capacity - int(costs[rows, chosen].sum())
        reachable = (more >= 0) & (more <= left) & (gain > 0)
        touched = np.flatnonzero(reachable.any(axis=1))
        if not len(touched):
            return chosen
        # One class more, whose only option is to stay, keeps the shapes when there is a single one.
        more, gain = np.where(reachable, more, 0)[touched], np.where(reachable, gain, -np.inf)[touched]
        stay = np.zeros((len(touched), 1))
        _, added = _cheapest_price(np.hstack([stay.astype(np.int64), more]), np.hstack([stay, gain]), left)
        if not added.any():  # each fits alone, but none is on the hull below what is left
            row, option = np.unravel_index(gain.argmax(), gain.shape)
            added = np.zeros(len(touched), np.int64)
            added[row] = option + 1
        chosen = chosen.copy()
        chosen[touched[added > 0]] = added[added > 0] - 1


def _improve(
    costs: np.ndarray,
    values: np.ndarray,
    losses: np.ndarray,
    price: float,
    bound: float,
    start: np.ndarray,
    best: np.ndarray,
    capacity: int,
) -> Choice:
    """Enumerates the deviations from `start` whose losses leave them a chance against `best`."""
    rows = np.arange(len(costs))
    own_cost, own_value = costs[rows, start], values[rows, start]
    zero = TOLERANCE * bound
    gap = bound - float(values[rows, best].sum()) - zero
    more = costs - own_cost[:, None]
    rates = np.divide(losses, np.abs(more), out=np.full(losses.shape, np.inf), where=more != 0)
    near = (losses < gap) & (np.arange(costs.shape[1]) != start[:, None])
    rates = np.where(near, rates, np.inf)
    classes = np.flatnonzero(near.any(axis=1))
    classes = classes[np.argsort(rates[classes].min(axis=1), kind="stable")]
    up = _lowest_after(np.where(more > 0, rates, np.inf)[classes])
    down = _lowest_after(np.where(more < 0, rates, np.inf)[classes])
    least = _lowest_after(np.where(near, losses, np.inf)[classes])

    slack = np.array([capacity - int(own_cost.sum())])
    value = np.array([0.0])  # above that of `start`
    base = bound - float(own_value.sum())
    layers: list[tuple[np.ndarray, np.ndarray]] = []
    found: tuple[int, int] | None = None
    unexplored = np.inf
    for depth, row in enumerate(classes):
        options = np.flatnonzero(near[row] & (losses[row] < gap))
        options = np.concatenate([[start[row]], options])
        states = len(slack)
        slack = (slack - more[row, options][:, None]).ravel()
        value = (value + (values[row, options] - own_value[row])[:, None]).ravel()
        short = base - value  # to the bound
        feasible = np.flatnonzero(slack >= 0)
        layer = len(layers)
        winner = feasible[short[feasible].argmin()] if len(feasible) else None
        chance = (
            short - price * slack + np.where(slack >= 0, slack * min(price, up[depth]), _times(-slack, down[depth]))
        )
        loss = short - price * slack
        if winner is not None and short[winner] < gap:
            gap = float(short[winner]) - zero
            found = (layer, winner)
        alive = np.flatnonzero((chance < gap) & (loss + least[depth] < gap))
        alive = alive[np.lexsort((-value[alive], -slack[alive]))]
        ahead = np.maximum.accumulate(np.concatenate([[-np.inf], value[alive]]))[:-1]
        alive = alive[value[alive] > ahead]
        if len(alive) > MAX_STATES:
            order = np.argsort(chance[alive], kind="stable")
            unexplored = min(unexplored, float(chance[alive[order[MAX_STATES]]]))
            alive = np.sort(alive[order[:MAX_STATES]])
        kept = alive
        if found == (layer, winner) and winner is not None:
            kept = np.append(alive, winner)
            found = (layer, len(alive))
        layers.append((kept % states, options[kept // states]))
        slack, value = slack[alive], value[alive]
        if not len(alive):
            break
    if found is not None:
        best = start.copy()
        at, index = found
        for depth in range(at, -1, -1):
            parents, options = layers[depth]
            best[classes[depth]] = options[index]
            index = parents[index]
    return Choice(best, max(0.0, gap - unexplored) / bound if unexplored < gap else 0.0)


def _times(amount: np.ndarray, rate: float) -> np.ndarray:
    """amount * rate with 0 * inf = 0."""
    return (
        np.where(amount > 0, amount, 1) * rate * (amount > 0)
        if np.isfinite(rate)
        else np.where(amount > 0, np.inf, 0.0)
    )


def _lowest_after(rates: np.ndarray) -> np.ndarray:
    """For each row the lowest entry of all rows behind it [T]."""
    lowest = np.minimum.accumulate(rates.min(axis=1)[::-1])[::-1]
    return np.append(lowest[1:], np.inf)
