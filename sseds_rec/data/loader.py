"""A data set to batches: sharded by rank, shuffled, resumable, read ahead in a thread."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from sseds_rec.data.ahead import read_ahead
from sseds_rec.data.batch import Batch
from sseds_rec.data.dataset import Dataset, PreparedSet
from sseds_rec.data.division import Segment, Taken, share_of
from sseds_rec.data.rows import Ragged, Rows
from sseds_rec.data.schema import SPLITS, SplitName
from sseds_rec.errors import UserError

SHUFFLE_ROWS = 1 << 18


class Loader:
    """Batches of one split for one rank.

    An epoch is the split's blocks (row groups, of a prepared set), one after the other, in an order drawn from seed and
    epoch if `shuffle`. Rank r of W takes rows r·N/W to (r+1)·N/W of that sequence, reads only the blocks they touch, and
    shuffles them within a buffer of a few blocks; no more is ever in memory. Every batch is a function of (seed, epoch,
    rank, position), which is what makes resuming exact.

    The rows of a prepared set lie in random order already. Where other tools left theirs in order, a buffer still mixes
    blocks from all over the files, but the rows of one block meet in one buffer.

    All ranks get the same number of batches, so that collectives meet. With `drop_last` all of them are full; without,
    a rank's rows are divided evenly, sizes differing by at most one row. (At batch size 1, a rank that has a row more
    than the others takes it with another row: it must not have a batch more.)

    An epoch that was interrupted may go on with another number of ranks that take as many rows together: see `division`.

    Args:
        dataset: See `open_dataset`; a path is the folder of a prepared set.
        split: `train`, `validation` or `test`.
        batch_size: Rows of a batch on each rank.
        rank: This process.
        world_size: All processes.
        seed: Of the shuffling.
        shuffle: Whether to shuffle.
        drop_last: Whether to leave out the rows that do not fill a batch.
        prefetch: Batches made ahead by a thread; 0 makes them in the caller's.
        pin_memory: Whether to make batches in page-locked memory, from which copies to a GPU are asynchronous.

    Raises:
        UserError: The set is missing or damaged, or has too few rows for the ranks and batch size.

    Example::

        loader = Loader("data/flights", "train", batch_size=2048, shuffle=True)
        for epoch in range(2):
            loader.set_epoch(epoch)
            for batch in loader:
                loss, _ = model(batch)
    """

    def __init__(
        self,
        dataset: Dataset | str | Path,
        split: SplitName,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = False,
        drop_last: bool = False,
        prefetch: int = 2,
        pin_memory: bool = False,
    ) -> None:
        if split not in SPLITS:
            raise UserError(f"split {split!r}: must be one of {', '.join(SPLITS)}")
        if batch_size < 1:
            raise UserError(f"batch size {batch_size}: must be at least 1")
        if isinstance(dataset, str | Path):
            dataset = PreparedSet(dataset)
        self.schema = dataset.schema
        self.batch_size = batch_size
        self._seed, self._shuffle, self._prefetch, self._pin_memory = seed, shuffle, prefetch, pin_memory
        self._blocks = dataset.blocks(split)

        self._rows = rows = sum(self._blocks.sizes)
        if rows < world_size:
            raise UserError(f"{dataset.path}: the {split} split has {rows} rows, fewer than the {world_size} processes")
        self._identity = {
            "split": split,
            "rows": rows,
            "batch_size": batch_size * world_size,
            "seed": seed,
            "shuffle": shuffle,
            "drop_last": drop_last,
        }
        self._drop_last, self._rank, self._world_size = drop_last, rank, world_size
        self._divide([])
        if len(self) == 0:
            raise UserError(
                f"{dataset.path}: batch size {batch_size} is more than a process's {rows // world_size} rows of {split}"
            )
        self._epoch = 0
        self._handed_out = 0  # batches of the epoch that the consumers have
        self._is_resuming = False  # whether the next iteration goes on from there

    def _divide(self, taken: Sequence[Taken]) -> None:
        """Takes this rank's share of what is left of an epoch."""
        batch_size = self.batch_size * self._world_size
        self._share = share_of(self._rank, self._world_size, self._rows, batch_size, self._drop_last, taken)
        self._taken = list(taken)
        self._first_batch = sum(batches for _, batches in taken)

    def __len__(self) -> int:
        """Batches of the epoch, those included that another number of ranks took; the same on all ranks."""
        return self._first_batch + len(self._share.starts) - 1

    def set_epoch(self, epoch: int) -> None:
        """Chooses the shuffle of the next iteration. A restored position stays if the epoch is the restored one."""
        if epoch != self._epoch:
            self._epoch, self._handed_out, self._is_resuming = epoch, 0, False
            self._divide([])

    def state_dict(self, trained: int | None = None) -> dict[str, object]:
        """The position, for `load_state_dict`; the same on all ranks.

        Args:
            trained: Batches of this epoch that are done. The default is the number handed out, of which a pipeline such
                as `TrainPipelineSparseDist` holds a few that it has not trained on yet.
        """
        return {
            **self._identity,
            "epoch": self._epoch,
            "batch": self._handed_out if trained is None else trained,
            "world_size": self._world_size,
            "taken": [list(taken) for taken in self._taken],  # before these ranks began
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Lets the next iteration go on after the state's last batch.

        With another number of ranks, the rows that are left are divided anew; with the same, the batches are those that an
        uninterrupted iteration would have had.

        Raises:
            UserError: The state is of another split, number of rows a step, seed or order: the rows not yet seen would
                not be the rows that follow.
        """
        for key, mine in self._identity.items():
            if state.get(key) != mine:
                raise UserError(f"loader state: {key} was {state.get(key)!r}, now {mine!r}; resume with the same value")
        epoch, batch = state["epoch"], state["batch"]
        taken = [Taken(*pair) for pair in state["taken"]]
        since = batch - sum(batches for _, batches in taken)
        if state["world_size"] != self._world_size and since:
            taken.append(Taken(state["world_size"], since))
        self._divide(taken)
        if not self._first_batch <= batch <= len(self):
            raise UserError(f"loader state: epoch {epoch}, batch {batch} is no position in {len(self)} batches")
        self._epoch, self._handed_out, self._is_resuming = epoch, batch, True

    def __iter__(self) -> Iterator[Batch]:
        if not self._is_resuming:
            self._handed_out = 0
            self._divide([])
        self._is_resuming = False
        make = functools.partial(self._batches, self._epoch, self._handed_out - self._first_batch)
        for batch in read_ahead(make, self._prefetch) if self._prefetch else make():
            self._handed_out += 1
            yield batch

    def _batches(self, epoch: int, batch: int) -> Iterator[Batch]:
        """Batches from number `batch` of the share on; a batch may take rows from two or more buffers."""
        starts, pieces = self._share.starts, []
        position = starts[batch]
        for rows in itertools.chain.from_iterable(self._buffers(epoch, s) for s in self._share.after(batch)):
            used = 0
            while used < len(rows) and batch + 1 < len(starts):
                stop = min(used + starts[batch + 1] - position, len(rows))
                pieces.append(rows.slice(used, stop))
                position, used = position + stop - used, stop
                if position == starts[batch + 1]:
                    yield self._collate(Rows.cat(pieces))
                    batch, pieces = batch + 1, []

    def _buffers(self, epoch: int, segment: Segment) -> Iterator[Rows]:
        """A segment's rows, a buffer of its stream at a time."""
        stream = segment.stream
        sizes = np.array(self._blocks.sizes)
        order = np.arange(len(sizes))
        if self._shuffle:
            order = np.random.default_rng([self._seed, epoch]).permutation(order)
        ends = sizes[order].cumsum()
        pieces: list[tuple[int, int, int]] = []  # block, first row, last row + 1
        first = held = 0
        for block, end in zip(order.tolist(), ends.tolist(), strict=True):
            begin = end - int(sizes[block])
            low, high = max(stream.first, begin), min(stream.last, end)
            if low < high:
                pieces.append((block, low - begin, high - begin))
                held += high - low
            is_full = held >= SHUFFLE_ROWS or not self._shuffle or end >= stream.last
            if not is_full or not pieces:
                continue
            if first + held > segment.first:
                rows = Rows.cat([self._blocks.read(block).slice(low, high) for block, low, high in pieces])
                if self._shuffle:
                    rows = rows.take(self._shuffled(epoch, stream.rank, first, held))
                yield rows.slice(max(segment.first - first, 0), min(segment.last - first, held))
            first, held, pieces = first + held, 0, []
            if first >= segment.last:
                return

    def _shuffled(self, epoch: int, rank: int, first: int, rows: int) -> Tensor:
        return torch.from_numpy(np.random.default_rng([self._seed, epoch, rank, first]).permutation(rows))

    def _collate(self, rows: Rows) -> Batch:
        sparse = KeyedJaggedTensor(keys=[field.name for field in self.schema.sparse_fields], **self._ids(rows))
        batch = Batch(rows.dense.to(torch.float32), sparse, rows.labels.to(torch.float32))
        return batch.pin_memory() if self._pin_memory else batch

    def _ids(self, rows: Rows) -> dict[str, Tensor]:
        """Values (int64), lengths (int32) and, in a weighted set, weights (float32) of all fields, one after the other."""
        ids = rows.ids.to(torch.int64)
        if not rows.ragged:
            return {"values": ids.reshape(-1), "lengths": torch.ones(ids.numel(), dtype=torch.int32)}
        single, ragged = iter(ids), iter(rows.ragged)
        values, lengths, weights = [], [], []
        for field in self.schema.sparse_fields:
            if field.is_single:
                values.append(next(single))
                lengths.append(torch.ones(len(rows), dtype=torch.int32))
                weights.append(torch.ones(len(rows)))
            else:
                several = next(ragged)
                values.append(several.values.to(torch.int64))
                lengths.append(several.lengths.to(torch.int32))
                weights.append(_mean_weights(several) if several.weights is None else several.weights)
        columns = {"values": torch.cat(values), "lengths": torch.cat(lengths)}
        return columns | {"weights": torch.cat(weights)} if self.schema.is_weighted else columns


def _mean_weights(field: Ragged) -> Tensor:
    """1/length for each id: their weighted sum is the mean."""
    return torch.repeat_interleave(field.lengths.to(torch.float32).reciprocal(), field.lengths)
