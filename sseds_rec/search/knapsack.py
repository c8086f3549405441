"""The multiple-choice knapsack: one width for every table, as much value as the budget can hold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: What is better by less than this share of all values counts as equal: it is what rounding adds up to.
TOLERANCE = 1e-12
#: The search goes on with this many partial choices at first, which mostly is enough, and with four times as many where
#: it is not, while partial choices x options stay below the other number: about a second's work.
_FEWEST_STATES = 128
_MOST_WORK = 12_000_000


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

    At a price for each unit of cost, let every class take the option that is worth most after paying for it. The price is
    chosen so that these options just about use the capacity up: they are the start. At that price any other option loses
    something against the start's, and a unit left unspent loses the price; what a choice loses in all is what it falls
    short of the best that could be, fractions of options allowed. So the best choice is the one that loses least. Few
    options lose little, and only those are combined (`_search`): first those that lose next to nothing, then four times as
    much and so on, until no option that was left out could be part of anything better than what was found. (Dyer, Kayal &
    Walsh, 1984; Pisinger, "A minimal algorithm for the multiple-choice knapsack", 1995.)

    Args:
        costs: int64 [T, J], not falling along a row; option 0 costs and is worth nothing.
        values: float64 [T, J]; -inf where a class has fewer options.
        capacity: not negative.

    Returns:
        The choice; the same for the same input.
    """
    unit = int(np.gcd.reduce(costs, axis=None)) or 1
    costs, capacity = costs // unit, capacity // unit
    values = values / (float(values.max(axis=1).sum()) or 1.0)  # all add up to 1: below TOLERANCE is rounding
    price, start = _price(costs, values, capacity)
    if price == 0:
        return Choice(start, 0.0)
    changes = _changes(costs, values, start, price, capacity)
    best, least = start, changes.start_loss
    bound = float(values[np.arange(len(costs)), start].sum()) + least
    reach, states = price * int(costs[costs > 0].min()), _FEWEST_STATES
    while True:
        found = _search(changes, min(reach, least), states, TOLERANCE * bound)
        if found.loss < least:
            best, least = found.options, found.loss
        unseen = min(reach, found.dropped)  # nothing that was not looked at loses less
        if least <= unseen + TOLERANCE * bound:
            return Choice(best, 0.0)
        if found.dropped < reach:
            if 4 * states * found.size <= _MOST_WORK:
                states *= 4
            elif least <= reach:
                return Choice(best, (least - unseen) / (bound - unseen))
        reach *= 4


def _price(costs: np.ndarray, values: np.ndarray, capacity: int) -> tuple[float, np.ndarray]:
    """The price at which the classes' best options just about use the capacity up, and such options [T] that fit.

    Of two choices, one that fits and one that does not, take the price at which they are equally good. If no other choice is
    better at that price, it is the one; if one is, it replaces the one of the two on its side of the capacity.
    """
    rows = np.arange(len(costs))
    fits, over = np.zeros(len(costs), np.int64), values.argmax(axis=1)
    if costs[rows, over].sum() <= capacity:
        return 0.0, over
    while True:
        gained = float(values[rows, over].sum() - values[rows, fits].sum())
        price = gained / int(costs[rows, over].sum() - costs[rows, fits].sum())
        after_paying = values - price * costs
        best = after_paying.argmax(axis=1)
        if after_paying[rows, best].sum() - after_paying[rows, fits].sum() <= TOLERANCE:
            return price, fits
        if costs[rows, best].sum() <= capacity:
            fits = best
        else:
            over = best


@dataclass(frozen=True)
class _Changes:
    """What changes when a class takes another option than at the start.

    Attributes:
        start: int64 [T], the options at the start.
        more: int64 [T, J], cost above the start's; negative if it saves.
        gain: float64 [T, J], value above the start's.
        loss: float64 [T, J], what it loses against the class's best at the price.
        price: of a unit of cost.
        slack: what the start leaves of the capacity.
        start_loss: what the start loses, which is the price of the slack and the price's rounding.
    """

    start: np.ndarray
    more: np.ndarray
    gain: np.ndarray
    loss: np.ndarray
    price: float
    slack: int
    start_loss: float


def _changes(costs: np.ndarray, values: np.ndarray, start: np.ndarray, price: float, capacity: int) -> _Changes:
    rows = np.arange(len(costs))
    after_paying = values - price * costs
    loss = after_paying.max(axis=1, keepdims=True) - after_paying
    more, gain = costs - costs[rows, start][:, None], values - values[rows, start][:, None]
    slack = capacity - int(costs[rows, start].sum())
    return _Changes(start, more, gain, loss, price, slack, float(loss[rows, start].sum()) + price * slack)


@dataclass(frozen=True)
class _Found:
    """What a search came to.

    Attributes:
        options: int64 [T], the best choice it saw.
        loss: of that choice; inf if it saw none that fits.
        dropped: what the choices that it gave up for want of room lose at least.
        size: number of options it combined.
    """

    options: np.ndarray
    loss: float
    dropped: float
    size: int


def _search(changes: _Changes, reach: float, most_states: int, zero: float) -> _Found:
    """Combines the options that lose at most `reach`, class by class, those that change the cost most first.

    A state is a choice for the classes so far, the others staying at the start: what it leaves of the capacity (negative if
    it needs more), and what it loses with that unspent. One is given up when another loses no more and leaves no less, when
    it must end above `reach` even if options of the classes left could be taken in part (`_Relaxed`), and when there are more
    than `most_states`, those that must end highest first.
    """
    near = _near(changes, reach)
    classes = np.flatnonzero(near.any(axis=1))
    largest = np.where(near[classes], np.abs(changes.more[classes]), 0).max(axis=1)
    classes = classes[np.argsort(-largest, kind="stable")]
    relaxed = _Relaxed(changes, near, classes)
    slack, loss = np.array([changes.slack]), np.array([changes.start_loss])
    layers: list[tuple[np.ndarray, np.ndarray]] = []
    dropped = np.inf
    for depth, row in enumerate(classes):
        options = np.append(changes.start[row], np.flatnonzero(near[row] & (changes.loss[row] <= reach)))
        slack = (slack[:, None] - changes.more[row, options]).ravel()
        loss = (loss[:, None] - changes.gain[row, options]).ravel()
        reach = min(reach, max(loss[slack >= 0].min(initial=np.inf), 0.0))
        least = loss - changes.price * slack + relaxed.loss(slack, depth)
        alive = _undominated(slack, loss, np.flatnonzero(least <= reach + zero))
        if len(alive) > most_states:
            # A solution first; of those that must end as high, the ones that are nearest to spending everything.
            solution = (slack[alive] >= 0) & (loss[alive] <= reach)
            order = np.lexsort((np.abs(slack[alive]), np.where(solution, 0.0, np.maximum(least[alive], zero))))
            dropped = min(dropped, float(least[alive[order[most_states:]]].min()))
            alive = np.sort(alive[order[:most_states]])
        layers.append((alive // len(options), options[alive % len(options)]))
        slack, loss = slack[alive], loss[alive]
        if reach <= zero:
            break
    best = changes.start.copy()
    fitting = np.flatnonzero(slack >= 0)
    if not len(fitting):
        return _Found(best, np.inf, dropped, int(near.sum()))
    state = fitting[loss[fitting].argmin()]
    least_loss = max(float(loss[state]), 0.0)
    for row, (parents, options) in reversed(list(zip(classes, layers, strict=False))):
        best[row], state = options[state], parents[state]
    return _Found(best, least_loss, dropped, int(near.sum()))


def _near(changes: _Changes, reach: float) -> np.ndarray:
    """bool [T, J]: other options than the start's that lose at most `reach`, unless the next costs the same and is better."""
    near = changes.loss <= reach
    near[:, :-1] &= (changes.more[:, 1:] > changes.more[:, :-1]) | (changes.gain[:, 1:] <= changes.gain[:, :-1])
    near[np.arange(len(near)), changes.start] = False
    return near


def _undominated(slack: np.ndarray, loss: np.ndarray, states: np.ndarray) -> np.ndarray:
    """Those of `states` for which no other leaves as much and loses as little; in the order of what they leave, most first."""
    states = states[np.lexsort((loss[states], -slack[states]))]
    ahead = np.minimum.accumulate(np.append(np.inf, loss[states]))[:-1]
    return states[loss[states] < ahead]


class _Relaxed:
    """What a slack loses at least, as if options could be taken in part.

    Between neighbouring near options of a class is a step, of a cost and a loss. A slack is used up, and what is missing is
    saved, by the steps of the classes left that lose least for their cost, in any order and in part; what remains unspent
    loses the price. An option's loss is taken as the least of those from there on outwards, so that no step gains.
    """

    def __init__(self, changes: _Changes, near: np.ndarray, classes: np.ndarray) -> None:
        start, option = changes.start[classes][:, None], np.arange(near.shape[1])
        loss = np.where(near[classes], changes.loss[classes], np.inf)
        above = np.minimum.accumulate(loss[:, ::-1], axis=1)[:, ::-1]
        below = np.minimum.accumulate(loss, axis=1)
        loss = np.where(option > start, above, np.where(option < start, below, 0.0))
        stops = near[classes] | (option == start)
        depth, option = np.nonzero(stops)
        cost, rise = np.diff(changes.more[classes][stops]), np.diff(loss[stops])
        saves = option[:-1] < changes.start[classes[depth[:-1]]]
        steps = (depth[1:] == depth[:-1]) & (cost > 0) & (saves | (rise < changes.price * cost))
        depth, cost, rise, saves = depth[:-1][steps], cost[steps].astype(np.float64), rise[steps], saves[steps]
        # From the costliest saving up to none and on to the costliest spending: the loss as a function of the slack.
        order = np.lexsort((rise / cost, ~saves))
        self._depth, self._cost, self._rise = depth[order], cost[order], rise[order]
        self._zero = int(saves.sum())
        self._price = changes.price
        self._classes, self._renewal = len(classes), 0

    def loss(self, slack: np.ndarray, depth: int) -> np.ndarray:
        """The least losses [S] of slacks [S] with the classes behind `depth`; inf where too little can be saved.

        From call to call `depth` does not fall.
        """
        if depth >= self._renewal:
            # With many classes left it may be that of a few more, which is little lower.
            self._renewal = depth + 1 + (self._classes - depth) // 256
            self._cost[self._depth <= depth] = self._rise[self._depth <= depth] = 0.0
            slacks, losses = np.append(0.0, self._cost.cumsum()), np.append(0.0, self._rise.cumsum())
            self._slacks, self._losses = slacks - slacks[self._zero], losses - losses[self._zero]
        unspent = np.maximum(slack - self._slacks[-1], 0.0)
        return np.interp(slack, self._slacks, self._losses, left=np.inf) + self._price * unspent
