"""Single elements of sharded embedding tables: counted, pruned and masked in the shards, wherever they lie.

Nothing is gathered. Ranks add up counts, and each writes to what it holds; a pruned element is an exact zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor

from sseds_rec.distributed.tables import embedding_modules
from sseds_rec.search.steps import device_of, sum_over_ranks
from sseds_rec.search.tap import qualified_tables

_VALUE_BYTES = 4  # float32
#: Elements looked at at once, which bounds what a look takes besides the tables.
_CHUNK = 1 << 22
#: A magnitude has 31 bits: its exponent and mantissa are ordered as it is.
_LOW_BITS = 16


@dataclass(frozen=True)
class Part:
    """What this rank holds of a table.

    Attributes:
        table: its name in plans.
        values: float32 [rows, columns], the memory that is trained.
        first_column: of the table's.
        replicated: whether every rank holds the same (data-parallel tables).
    """

    table: str
    values: Tensor
    first_column: int
    replicated: bool


@dataclass(frozen=True)
class Stored:
    """What a table of some zeros takes, float32, without optimizer states.

    Attributes:
        rows, columns: of the table.
        nonzeros: its elements that are not zero.
    """

    rows: int
    columns: int
    nonzeros: int

    @property
    def dense_bytes(self) -> int:
        """As it is stored: zeros take as much as any number."""
        return self.rows * self.columns * _VALUE_BYTES

    @property
    def csr_bytes(self) -> int:
        """As compressed sparse rows: a value and a column index for each nonzero, a pointer for each row and one more.

        Indices and pointers have 4 bytes, and 8 if there are 2^31 nonzeros or more, as in `scipy.sparse.csr_array`.
        """
        index = 4 if self.nonzeros < 2**31 else 8
        return self.nonzeros * (_VALUE_BYTES + index) + (self.rows + 1) * index

    def as_dict(self) -> dict[str, int]:
        """For plans and metrics."""
        return {"nonzeros": self.nonzeros, "dense_bytes": self.dense_bytes, "csr_bytes": self.csr_bytes}


class Elements:
    """The elements of all tables of a sharded model; all ranks call its methods.

    Args:
        model: sharded, its tables in the memory of their devices, float32.

    Attributes:
        parts: what this rank holds, replicated tables first.
        shapes: table -> its rows and columns.
        total: elements of all tables.
    """

    def __init__(self, model: nn.Module) -> None:
        names = qualified_tables(embedding_modules(model))
        parts: list[Part] = []
        self.shapes: dict[str, tuple[int, int]] = {}
        for key, value in model.state_dict().items():
            path, inside, table = f".{key.removesuffix('.weight')}".partition(".embedding_bags.")
            if not inside:
                continue
            name = names[path.removeprefix("."), table]
            rows, columns = value.size()
            self.shapes[name] = rows, columns
            if isinstance(value, ShardedTensor):
                shards = value.local_shards()
                parts += [Part(name, own.tensor, own.metadata.shard_offsets[1], False) for own in shards]
            else:
                parts.append(Part(name, value, 0, True))
        self.parts = sorted(parts, key=lambda part: not part.replicated)
        self.total = sum(rows * columns for rows, columns in self.shapes.values())
        self._device = device_of(model)

    def count(self, of: Callable[[Part], Tensor]) -> dict[str, int]:
        """Table -> the sum of `of` (one number a part) over the parts of all ranks, replicated tables once."""
        index = {name: position for position, name in enumerate(self.shapes)}
        counts = torch.zeros(len(index), dtype=torch.int64, device=self._device)
        for part in self._counted():
            counts[index[part.table]] += of(part)
        return dict(zip(index, sum_over_ranks(counts).tolist(), strict=True))

    def stored(self) -> dict[str, Stored]:
        """Table -> what it takes, its zeros counted in the tensors."""
        nonzeros = self.count(lambda part: part.values.count_nonzero())
        return {name: Stored(*shape, nonzeros[name]) for name, shape in self.shapes.items()}

    def keep_largest(self, count: int) -> None:
        """Zeros all but the `count` elements of largest magnitude, of all tables together.

        Of equal magnitudes, at the border, so many go that the number is exact: those of replicated tables first, then by rank
        and position.
        """
        pruned = self.total - count
        if pruned <= 0:
            return
        border, below = self._magnitude(pruned)
        ties = self._ties_to_prune(border, pruned - below)
        for part in self.parts:
            for values in _chunks(part.values):
                found = _bits(values)
                values.masked_fill_(found < border, 0)
                equal = (found == border).flatten().nonzero().flatten()[: ties[part.replicated]]
                values.view(-1)[equal] = 0
                ties[part.replicated] -= len(equal)

    def _magnitude(self, k: int) -> tuple[int, int]:
        """The bits of the k-th smallest magnitude (from 1), and how many are smaller: a radix selection in two passes."""
        high, below = self._bucket(lambda bits: bits >> _LOW_BITS, 1 << (31 - _LOW_BITS), k)
        mask = (1 << _LOW_BITS) - 1
        low, between = self._bucket(lambda bits: bits[bits >> _LOW_BITS == high] & mask, 1 << _LOW_BITS, k - below)
        return (high << _LOW_BITS) + low, below + between

    def _bucket(self, of: Callable[[Tensor], Tensor], buckets: int, k: int) -> tuple[int, int]:
        """The bucket that the k-th smallest falls into, and how many fall into those before it."""
        counts = torch.zeros(buckets, dtype=torch.int64, device=self._device)
        for part in self._counted():
            for values in _chunks(part.values):
                counts += torch.bincount(of(_bits(values).flatten()), minlength=buckets)
        upto = sum_over_ranks(counts).cumsum(0)
        found = int(torch.searchsorted(upto, k))
        return found, int(upto[found - 1]) if found else 0

    def _ties_to_prune(self, border: int, ties: int) -> dict[bool, int]:
        """How many elements of this magnitude this rank zeros: in replicated parts (True) and in its own (False)."""
        own = {True: 0, False: 0}
        for part in self.parts:
            own[part.replicated] += sum(int((_bits(values) == border).sum()) for values in _chunks(part.values))
        rank, world_size = _place()
        by_rank = torch.zeros(world_size, dtype=torch.int64, device=self._device)
        by_rank[rank] = own[False]
        before = int(sum_over_ranks(by_rank)[:rank].sum())
        replicated = min(ties, own[True])
        return {True: replicated, False: min(max(ties - replicated - before, 0), own[False])}

    def _counted(self) -> Iterator[Part]:
        """The parts that this rank counts: those that all have are the first rank's to count."""
        first = _place()[0] == 0
        return (part for part in self.parts if first or not part.replicated)


class Mask:
    """Keeps elements at zero that are zero now.

    Args:
        elements: of the model, whose weights may be others later. One byte for each element is kept.
    """

    def __init__(self, elements: Elements) -> None:
        self._pruned = [(part.values, part.values == 0) for part in elements.parts]

    def apply(self) -> None:
        """Zeros them again, in place."""
        for values, pruned in self._pruned:
            values.masked_fill_(pruned, 0)


def summary(stored: Mapping[str, Stored]) -> dict[str, Any]:
    """What all tables take together."""
    each = [table.as_dict() for table in stored.values()]
    return {key: sum(table[key] for table in each) for key in ("nonzeros", "dense_bytes", "csr_bytes")}


def _bits(values: Tensor) -> Tensor:
    """Magnitudes as int32 of the same order."""
    return values.abs().view(torch.int32)


def _chunks(values: Tensor) -> Iterator[Tensor]:
    """Some rows of a table at a time."""
    yield from values.split(max(1, _CHUNK // values.shape[1]))


def _place() -> tuple[int, int]:
    """Rank and number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
