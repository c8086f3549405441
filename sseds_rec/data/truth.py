"""The truth about a synthetic set: which fields matter, in how many dimensions, and the logit of any row.

Field i has rank r_i. Its value x has a latent z_i(x) of r_i numbers, with mean 0 and covariance I over the rows. With
u_i = E_i z_i, E_i [K, r_i], K = max r_i,

    logit = bias + Σ_i <w_i, z_i> + Σ_{i<j} <u_i, u_j>:

a factorisation machine whose first-order part reads the same latents. Fields are independent of each other. The columns of
an E_i are orthogonal, all E_i have the same length per column, and directions are random.

Why r_i is the number of embedding columns that field i needs. Its part of the logit is <z_i(x), g_i> with
g_i = w_i + E_iᵀ Σ_{j≠i} u_j, which depends on the rest of the row only. As a matrix (values x rests of the row) this has
rank r_i, if there are more than r_i values and if the other fields' ranks add up to r_i - 1 or more, so that g_i spans
R^{r_i}; `plant` refuses anything else. A model to which the field gives an embedding that acts linearly on the logit (an FM,
anything with a transform matrix per field) writes that matrix as a product of inner size d: d = r_i is enough, and d < r_i
loses something, also where the field's mean goes to a bias. How much is known too: since z_i has covariance I, the best d
columns keep, of the logit's variance, the d largest eigenvalues of E[g_i g_iᵀ] = w_i w_iᵀ + Σ_{j≠i} E_iᵀ E_j E_jᵀ E_i. These
are the field's `spectrum`. A trained table may spread its r_i dimensions over more columns: a common rotation of
all tables leaves an FM as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from sseds_rec.data.counters import gather, normals, scatter
from sseds_rec.errors import UserError
from sseds_rec.files import join, open_file, read_json, write_atomic, write_json

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

FILE_NAME, ARRAYS_NAME = "truth.json", "truth.npz"


@dataclass(frozen=True)
class PlantedField:
    """What is known of one field.

    Attributes:
        name: Column name.
        cardinality: Values there are, seen in the rows or not.
        rank: Embedding columns that its own effect needs; 0 for noise and for duplicates.
        duplicate_of: The field whose value this one tells under another name, so that a model may use either of them.
        share: Of the logit's variance, an interaction's halved between its two fields: all shares add up to 1.
        spectrum: The part of the logit's variance that is lost with each of its dimensions, largest first: `rank` numbers.
            They count an interaction whole, for either field.
    """

    name: str
    cardinality: int
    rank: int = 0
    duplicate_of: str | None = None
    share: float = 0.0
    spectrum: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Effect:
    """The arrays of a field of rank r > 0.

    Attributes:
        mean: [r], of the raw latents (standard normals) over the rows.
        whitening: [r, r]; z = (raw - mean) @ whitening.
        embedding: E [K, r].
        first_order: w [r].
    """

    mean: Floats
    whitening: Floats
    embedding: Floats
    first_order: Floats


@dataclass(frozen=True)
class Truth:
    """The planted model of a synthetic set.

    Attributes:
        seed: Of latents and of the names of values.
        zipf: Exponent of every field's popularity.
        signal: Standard deviation of the logit.
        positive_rate: Mean of the probability.
        bias: Mean of the logit.
        fields: In order.
        effects: The arrays of the fields of rank > 0.
        best: Split -> rows, positives, and auc and logloss of the true probabilities (None where undefined).
    """

    seed: int
    zipf: float
    signal: float
    positive_rate: float
    bias: float
    fields: list[PlantedField]
    effects: dict[str, Effect]
    best: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: str | Path) -> Truth:
        """Reads what `save` wrote.

        Raises:
            UserError: The folder holds no truth, or one of another version.
        """
        content = read_json(join(folder, FILE_NAME))
        if not isinstance(content, dict) or content.pop("version", None) != 1:
            raise UserError(f"{join(folder, FILE_NAME)}: is not of version 1; prepare the data set again")
        planted = [PlantedField(**values) for values in content.pop("fields")]
        with open_file(join(folder, ARRAYS_NAME)) as stream, np.load(stream) as arrays:
            effects = {
                one.name: Effect(*(arrays[f"{one.name}.{part.name}"] for part in fields(Effect)))
                for one in planted
                if one.rank
            }
        return cls(fields=planted, effects=effects, **content)

    def save(self, folder: str | Path) -> None:
        """Writes `truth.npz` (the effects) and then `truth.json` (all else)."""
        content = {"version": 1, **asdict(self)}
        effects = content.pop("effects")
        arrays = {f"{name}.{part}": array for name, parts in effects.items() for part, array in parts.items()}

        def write(file: Path) -> None:
            with open(file, "wb") as stream:  # numpy would add a suffix to the name
                np.savez(stream, **arrays)

        write_atomic(Path(folder) / ARRAYS_NAME, write)
        write_json(Path(folder) / FILE_NAME, content)

    def popularity(self, name: str, values: Iterable[int] | Iterable[str]) -> Ints:
        """Values of a field, as numbers or text -> their places in its popularity, from 0.

        Raises:
            ValueError: A value that the field does not have.
        """
        index = self._index(name)
        numbers = pl.Series(values).cast(pl.Int64).to_numpy()
        places = gather(numbers, keys(self.seed, index)[0])
        if len(alien := numbers[places >= self.fields[index].cardinality]):
            raise ValueError(f"field {name!r} has no value {alien[0]}")
        return places

    def values(self, name: str, popularity: Ints) -> Ints:
        """The inverse of `popularity`: numbers below 2^32."""
        return scatter(popularity, keys(self.seed, self._index(name))[0])

    def latents(self, name: str, popularity: Ints) -> Floats:
        """z [n, rank] of the values at these places in the popularity of a field of rank > 0."""
        effect = self.effects[name]
        raw = normals(keys(self.seed, self._index(name))[1], popularity, len(effect.mean))
        return (raw - effect.mean) @ effect.whitening

    def contributions(self, name: str, popularity: Ints) -> Floats:
        """What these values add to a row: u, and then <w, z> - |u|²/2: [n, K+1]."""
        effect, z = self.effects[name], self.latents(name, popularity)
        u = z @ effect.embedding.T
        return np.column_stack([u, z @ effect.first_order - 0.5 * np.square(u).sum(axis=1)])

    def add_up(self, contributions: Any) -> Floats:
        """Contributions summed over the fields [B, K+1] -> logits [B], by Σ_{i<j} <u_i, u_j> = (|Σu|² - Σ|u|²)/2."""
        total = np.asarray(contributions, np.float64)
        return self.bias + 0.5 * np.square(total[:, :-1]).sum(axis=1) + total[:, -1]

    def logits(self, rows: pl.DataFrame) -> Floats:
        """True logits [B] of rows that hold the values, no nulls, of at least the fields that have an effect."""
        return self.logits_at((name, self.popularity(name, rows[name])) for name in self.effects)

    def logits_at(self, columns: Iterable[tuple[str, Ints]]) -> Floats:
        """The same, of the names and places in the popularity of all fields that have an effect."""
        return self.add_up(sum(self.contributions(name, places) for name, places in columns))

    def _index(self, name: str) -> int:
        return [planted.name for planted in self.fields].index(name)


def keys(seed: int, index: int) -> tuple[np.uint32, np.uint64]:
    """The keys of the names of a field's values, and of its latents."""
    names, latents = np.random.SeedSequence([seed, 1, index]).generate_state(2, np.uint64)
    return names.astype(np.uint32), latents


def probability(logits: Floats) -> Floats:
    """1 / (1 + e^-x), without overflow."""
    return 0.5 + 0.5 * np.tanh(0.5 * logits)
