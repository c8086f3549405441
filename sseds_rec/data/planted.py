"""Draws the planted model of a synthetic set; what the model is, and why its ranks are true, is told in `truth`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sseds_rec.data.counters import normals
from sseds_rec.data.truth import Effect, Floats, PlantedField, Truth, keys, probability
from sseds_rec.data.zipf import Zipf
from sseds_rec.errors import UserError

FIRST_ORDER = 0.5  # share of the logit's variance; the interactions have the rest
MAX_VALUES = 1 << 32
_PILOT_ROWS = 1 << 17  # over which the bias is chosen
_BLOCK = 1 << 16
_WHITENED = 1 << 18  # most popular values over which mean and covariance are computed


def plant(
    cardinalities: Sequence[int],
    ranks: Sequence[int],
    duplicates: int,
    *,
    zipf: float,
    signal: float,
    positive_rate: float,
    seed: int,
) -> Truth:
    """Draws a planted model.

    Args:
        cardinalities: Of the fields that are no duplicates, which come first.
        ranks: Of the same fields.
        duplicates: Fields to add, each of another original among those with an effect.
        zipf: Exponent of every field's popularity.
        signal: Standard deviation of the logit over the rows.
        positive_rate: Mean of the probability over the rows.
        seed: Of everything.

    Raises:
        UserError: Ranks that the fields cannot have, or too many duplicates.
    """
    count = len(cardinalities) + duplicates
    names = [f"f{number:0{max(2, len(str(count)))}}" for number in range(1, count + 1)]
    _check(names, cardinalities, ranks, duplicates)
    generator = np.random.default_rng([seed, 0])
    effects = {}
    for index, (name, cardinality, rank) in enumerate(zip(names, cardinalities, ranks, strict=False)):
        if rank:
            embedding, _ = np.linalg.qr(generator.standard_normal((max(ranks), rank)))
            direction = generator.standard_normal(rank)
            direction *= np.sqrt(rank) / np.linalg.norm(direction)
            mean, whitening = _whiten(Zipf(cardinality, zipf), keys(seed, index)[1], rank)
            effects[name] = Effect(mean, whitening, embedding, direction)
    effects = _scale(effects, signal)

    planted = [
        PlantedField(name, cardinality, rank, **_worth(effects, name, signal))
        for name, cardinality, rank in zip(names, cardinalities, ranks, strict=False)
    ]
    originals = generator.choice([one.name for one in planted if one.rank], duplicates, replace=False)
    for name, original in zip(names[len(planted) :], sorted(originals.tolist()), strict=True):
        planted.append(PlantedField(name, cardinalities[names.index(original)], duplicate_of=original))

    truth = Truth(seed, zipf, signal, positive_rate, 0.0, planted, effects)
    return replace(truth, bias=_bias(truth, generator))


def _check(names: list[str], cardinalities: Sequence[int], ranks: Sequence[int], duplicates: int) -> None:
    informative = sum(rank > 0 for rank in ranks)
    if not informative:
        raise UserError("ranks: all are 0; at least one field must have an effect")
    for name, cardinality, rank in zip(names, cardinalities, ranks, strict=False):
        others = sum(ranks) - rank
        if rank >= cardinality:
            raise UserError(f"ranks: {name} has {cardinality} values, too few for rank {rank}; raise cardinality")
        if rank > others + 1:
            raise UserError(
                f"ranks: {name} cannot show rank {rank} where the other fields' ranks add up to {others}; "
                "lower it or add fields"
            )
    if duplicates > informative:
        raise UserError(f"duplicates {duplicates}: only {informative} fields have an effect that can be duplicated")


def _whiten(popularity: Zipf, key: np.uint64, rank: int) -> tuple[Floats, Floats]:
    """`Effect.mean` and `Effect.whitening`. Of very many values the rarest count as N(0, I), from which they are drawn."""
    head = min(popularity.values, _WHITENED)
    rest, mean, square = 1.0, np.zeros(rank), np.zeros((rank, rank))
    for first in range(0, head, _BLOCK):
        stop = min(first + _BLOCK, head)
        probabilities = popularity.probabilities(first, stop)
        raw = normals(key, np.arange(first, stop), rank)
        rest -= probabilities.sum()
        mean += probabilities @ raw
        square += raw.T @ (raw * probabilities[:, None])
    if head < popularity.values:
        square += rest * np.eye(rank)
    return mean, np.linalg.inv(np.linalg.cholesky(square - np.outer(mean, mean))).T


def _scale(effects: dict[str, Effect], signal: float) -> dict[str, Effect]:
    """Gives the first order and the interactions their parts of the variance. A lone field has no interactions."""
    first = sum(np.square(effect.first_order).sum() for effect in effects.values())
    pairs = 0.5 * sum(np.trace(_interactions(effects, name)) for name in effects)
    share = FIRST_ORDER if len(effects) > 1 else 1.0
    weight = signal * np.sqrt(share / first)
    length = (signal**2 * (1 - share) / pairs) ** 0.25 if len(effects) > 1 else 1.0
    return {
        name: replace(effect, first_order=effect.first_order * weight, embedding=effect.embedding * length)
        for name, effect in effects.items()
    }


def _interactions(effects: dict[str, Effect], name: str) -> Floats:
    """Σ_{j≠i} E_iᵀ E_j E_jᵀ E_i [r, r] of field i."""
    own = effects[name].embedding
    products = [own.T @ effect.embedding for other, effect in effects.items() if other != name]
    return np.sum([product @ product.T for product in products], axis=0) if products else np.zeros((own.shape[1],) * 2)


def _worth(effects: dict[str, Effect], name: str, signal: float) -> dict[str, Any]:
    """`share` and `spectrum` of a field."""
    if name not in effects:
        return {}
    first, pairs = effects[name].first_order, _interactions(effects, name)
    spectrum = np.linalg.eigvalsh(np.outer(first, first) + pairs)[::-1] / signal**2
    share = (np.square(first).sum() + 0.5 * np.trace(pairs)) / signal**2
    return {"share": float(share), "spectrum": spectrum.tolist()}


def _bias(truth: Truth, generator: np.random.Generator) -> float:
    """The bias at which the mean probability is the one asked for, by bisection."""
    logits = truth.logits_at(
        (one.name, Zipf(one.cardinality, truth.zipf).draw(generator, _PILOT_ROWS)) for one in truth.fields if one.rank
    )
    middle = np.log(truth.positive_rate / (1 - truth.positive_rate))
    low, high = middle - logits.max(), middle - logits.min()
    while high - low > 1e-9:
        bias = (low + high) / 2
        low, high = (bias, high) if probability(logits + bias).mean() < truth.positive_rate else (low, bias)
    return float(low)
