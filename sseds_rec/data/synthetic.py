"""The recipe `synthetic`: rows shaped like click logs, whose labels come from a known model. See `truth`."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from sseds_rec.data.chunk import Chunk
from sseds_rec.data.planted import MAX_VALUES, plant
from sseds_rec.data.prepare import prepare_source
from sseds_rec.data.schema import SPLITS, Schema
from sseds_rec.data.splits import SplitSpec
from sseds_rec.data.transforms import FieldSpec
from sseds_rec.data.truth import Floats, Ints, Truth, probability
from sseds_rec.data.zipf import Zipf
from sseds_rec.errors import UserError

MAX_RANK = 1024
MAX_ZIPF = 4  # beyond, all values but a few are too rare to have an effect
BLOCK_ROWS = 1 << 18  # drawn at once, from a seed sequence of their own
_TABLE_NUMBERS = 1 << 19  # of contributions that are kept, for the most popular values of each field
_AUC_BINS = 1 << 16  # of equal probability: rows within one are told apart by chance only


def prepare_synthetic(
    output: str | Path,
    *,
    rows: int = 1_000_000,
    fields: int = 39,
    cardinality: str | Sequence[int] = "10:1000000",
    zipf: float = 1.05,
    ranks: str | Sequence[int] = "0,1,2,4,8",
    duplicates: int = 3,
    signal: float = 1.5,
    positive_rate: float = 0.25,
    split: Sequence[float] = (0.8, 0.1, 0.1),
    min_count: int = 10,
    seed: int = 0,
    overwrite: bool = False,
) -> Schema:
    """Prepares rows whose labels come from a planted model, and writes the truth beside them.

    Fields are called f01, f02, ...; their values are numbers below 2^32 in no order, drawn independently from Zipf's law. The
    last fields are the duplicates: each tells the value of an earlier one under another name. `truth.json` and `truth.npz`
    in the folder hold the truth; `Truth.load` reads them.

    Args:
        output: Folder to make.
        rows: In all splits.
        fields: Duplicates included.
        cardinality: LOW:HIGH, spaced evenly in the logarithm over the fields that are no duplicates, or one number for each.
        zipf: Exponent; 0 makes all values of a field equally likely.
        ranks: Of the fields that are no duplicates, repeated as often as needed. 0 is a field without effect.
        duplicates: How many fields are duplicates.
        signal: Standard deviation of the true logit. More makes a higher AUC possible.
        positive_rate: Mean of the true probability.
        split: Fractions of train, validation and test.
        min_count: Values seen less often in the train split share one id.
        seed: Of everything. Fewer rows with the same seed are the first of more.
        overwrite: Replace an earlier prepared set.

    Raises:
        UserError: An argument is bad; the line begins with its name. Nothing is left in `output`.
    """
    _check_range("rows", rows, 1, math.inf)
    _check_range("fields", fields, 1, math.inf)
    _check_range("duplicates", duplicates, 0, fields - 1)
    _check_range("zipf", zipf, 0, MAX_ZIPF)
    if not (0 < signal < math.inf):
        raise UserError(f"signal {signal:g}: must be above 0")
    if not (0 < positive_rate < 1):
        raise UserError(f"positive-rate {positive_rate:g}: must be between 0 and 1")
    splits = SplitSpec("column:split", split, seed)
    own = fields - duplicates
    cycle = _numbers("ranks", ranks, 0, MAX_RANK)
    truth = plant(
        _cardinalities(cardinality, own),
        [cycle[index % len(cycle)] for index in range(own)],
        duplicates,
        zipf=zipf,
        signal=signal,
        positive_rate=positive_rate,
        seed=seed,
    )
    source = SyntheticRows(truth, rows, split)
    return prepare_source(
        source,
        output,
        label="label",
        fields=[FieldSpec(planted.name, min_count=min_count) for planted in truth.fields],
        splits=splits,
        origin={"recipe": "synthetic", "inputs": [], "seed": seed, "truth": "truth.json"},
        overwrite=overwrite,
        beside=lambda folder: replace(truth, best=measure_truth(source)).save(folder),
    )


class SyntheticRows:
    """A `Source`: the rows of a truth, drawn anew in every pass, always the same, in the memory of one block.

    Columns: the fields, `label`, and what a model must not see: `split` (train, validation or test, in exact
    fractions) and `probability` (of the label being 1).

    Args:
        truth: The planted model.
        rows: In all.
        split: Fractions of train, validation and test.
    """

    def __init__(self, truth: Truth, rows: int, split: Sequence[float] = (0.8, 0.1, 0.1)) -> None:
        self.name = "synthetic rows"
        self.truth, self.rows = truth, rows
        self.columns = ["label", "split", "probability", *(one.name for one in truth.fields)]
        self._ends = np.cumsum(split)[:2]
        self._tables = {
            planted.name: _Table(truth, planted.name, planted.cardinality) for planted in truth.fields if planted.rank
        }

    def chunks(self, columns: Iterable[str]) -> Iterator[Chunk]:
        wanted = list(columns)
        for block, first in enumerate(range(0, self.rows, BLOCK_ROWS)):
            size = min(BLOCK_ROWS, self.rows - first)
            frame = pl.DataFrame({name: column[:size] for name, column in self._draw(block, wanted).items()})
            yield Chunk(frame, self.name, first + 1, done=(first + size) / self.rows)

    def _draw(self, block: int, wanted: list[str]) -> dict[str, Any]:
        truth, seed = self.truth, self.truth.seed
        columns: dict[str, Any] = dict.fromkeys(wanted)
        total: npt.NDArray[np.float32] | None = None
        if "label" in columns or "probability" in columns:
            total = np.zeros((BLOCK_ROWS, next(iter(self._tables.values())).width), np.float32)
        for index, planted in enumerate(truth.fields):
            copies = [other.name for other in truth.fields if other.duplicate_of == planted.name]
            names = [name for name in (planted.name, *copies) if name in columns]
            has_effect = total is not None and planted.rank > 0
            if planted.duplicate_of or not (names or has_effect):
                continue
            popularity = Zipf(planted.cardinality, truth.zipf).draw(
                np.random.default_rng([seed, 2, block, index]), BLOCK_ROWS
            )
            for name in names:
                columns[name] = truth.values(name, popularity)
            if total is not None and planted.rank:
                self._tables[planted.name].add(popularity, total)
        if total is not None:
            true = probability(truth.add_up(total))
            drawn = np.random.default_rng([seed, 3, block]).random(BLOCK_ROWS) < true
            columns |= {
                name: values
                for name, values in (("probability", true), ("label", drawn.astype(np.int8)))
                if name in columns
            }
        if "split" in columns:
            columns["split"] = self._split(block)
        return columns

    def _split(self, block: int) -> pl.Series:
        """Names of splits: at random within the block, the blocks together in the exact fractions."""
        first = block * BLOCK_ROWS
        size = min(BLOCK_ROWS, self.rows - first)
        cuts = np.round((first + size) * self._ends) - np.round(first * self._ends)
        places = np.random.default_rng([self.truth.seed, 4, block]).permutation(size)
        return pl.Series(SPLITS).gather(np.searchsorted(cuts, places, side="right"))


class _Table:
    """Contributions of one field's values: of the most popular ones kept, of the others computed."""

    def __init__(self, truth: Truth, name: str, cardinality: int) -> None:
        self.truth, self.name = truth, name
        self.width = len(truth.effects[name].embedding) + 1
        self.kept = min(cardinality, max(_TABLE_NUMBERS // self.width, 1))
        self.all_kept = self.kept == cardinality
        self.table = truth.contributions(name, np.arange(self.kept)).astype(np.float32)

    def add(self, popularity: Ints, total: npt.NDArray[np.float32]) -> None:
        """Adds the contributions [B, K+1] of values to `total`."""
        if self.all_kept:
            total += self.table[popularity]
            return
        rows = self.table[np.minimum(popularity, self.kept - 1)]
        rare = np.flatnonzero(popularity >= self.kept)
        rows[rare] = self.truth.contributions(self.name, popularity[rare])
        total += rows


def measure_truth(source: SyntheticRows) -> dict[str, dict[str, Any]]:
    """`Truth.best`: what no model can beat but by luck, from one pass."""
    counts = np.zeros((len(SPLITS), 2, _AUC_BINS))
    loss = np.zeros(len(SPLITS))
    for chunk in source.chunks(["label", "split", "probability"]):
        label, true = chunk.frame["label"].to_numpy(), chunk.frame["probability"].to_numpy()
        bins = np.minimum((true * _AUC_BINS).astype(np.int64), _AUC_BINS - 1)
        for index, split in enumerate(SPLITS):
            mine = (chunk.frame["split"] == split).to_numpy()
            for outcome in (0, 1):
                counts[index, outcome] += np.bincount(bins[mine & (label == outcome)], minlength=_AUC_BINS)
            loss[index] -= np.log(np.where(label == 1, true, 1 - true)[mine]).sum()
    return {
        split: {
            "rows": int(counts[index].sum()),
            "positives": int(counts[index, 1].sum()),
            "auc": _auc(counts[index]),
            "logloss": float(loss[index] / counts[index].sum()) if counts[index].any() else None,
        }
        for index, split in enumerate(SPLITS)
    }


def _auc(counts: Floats) -> float | None:
    """Of binned scores [2, bins], negatives first; a tie counts half."""
    negatives, positives = counts
    pairs = negatives.sum() * positives.sum()
    below = np.cumsum(negatives) - 0.5 * negatives
    return float(positives @ below / pairs) if pairs else None


def _cardinalities(cardinality: str | Sequence[int], count: int) -> list[int]:
    """LOW:HIGH or a list -> one for each field."""
    if isinstance(cardinality, str) and ":" in cardinality:
        low, *high = _numbers("cardinality", cardinality.replace(":", ","), 1, MAX_VALUES)
        if len(high) != 1 or low > high[0]:
            raise UserError(f"cardinality {cardinality}: give LOW:HIGH, as in 10:1000000")
        return [round(number) for number in np.geomspace(low, high[0], count)]
    numbers = _numbers("cardinality", cardinality, 1, MAX_VALUES)
    if len(numbers) != count:
        raise UserError(
            f"cardinality: {len(numbers)} numbers for {count} fields (duplicates have those of their originals); "
            "give one for each, or LOW:HIGH"
        )
    return numbers


def _numbers(option: str, given: str | Sequence[int], least: int, most: int) -> list[int]:
    try:
        numbers = [int(part) for part in (given.split(",") if isinstance(given, str) else given)]
    except ValueError:
        raise UserError(f"{option} {given!r}: give whole numbers, as in 1,2,4") from None
    if not numbers:
        raise UserError(f"{option}: is empty; give whole numbers, as in 1,2,4")
    for number in numbers:
        _check_range(option, number, least, most)
    return numbers


def _check_range(option: str, value: float, least: float, most: float) -> None:
    """Refuses a value outside [least, most], and NaN."""
    if not least <= value <= most:
        bounds = f"at least {least:g}" + (f" and at most {most:.12g}" if most < math.inf else "")
        raise UserError(f"{option} {value:.12g}: must be {bounds}")
