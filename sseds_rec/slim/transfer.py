"""Columns from the shards of one model to those of another: any placement to any other, and no table whole anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor

from sseds_rec.errors import UserError
from sseds_rec.slim.columns import KeepColumns, RowConversion

#: Bytes of a table that are on their way at once.
_BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class _Shard:
    """A part of a tensor [rows, columns].

    Attributes:
        rank: whose it is; None if every rank has it.
        row, rows, column, columns: which part it is.
        values: [rows, columns], where they are.
    """

    rank: int | None
    row: int
    rows: int
    column: int
    columns: int
    values: Tensor | None


@dataclass(frozen=True)
class _Piece:
    """Rows [start, stop) of a shard's needed columns, on their way to a rank's shard."""

    sender: int
    receiver: int
    source: _Shard
    target: _Shard
    start: int
    stop: int


@torch.no_grad()
def transfer(
    source: Mapping[str, Any],
    target: Mapping[str, Any],
    conversions: Mapping[str, RowConversion | None],
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> None:
    """Fills the tensors of a sharded model's state with those of another's; all ranks call it.

    Args:
        source: state dict of the other model.
        target: state dict; its tensors are changed in place. Those that the source does not have keep their values.
        conversions: name -> what becomes of its rows; other tensors are copied.
        group: of the ranks that hold the shards; None for one process.
        device: where this rank's shards are.

    Raises:
        UserError: a tensor is a DTensor, or has another size than it would get (names it).
    """
    for name, value in [*source.items(), *target.items()]:
        if isinstance(value, DTensor):
            raise UserError(f"{name} is a DTensor; slim() moves TorchRec's ShardedTensors: use slim_checkpoint")
    for name, new in target.items():
        old = source.get(name)
        if not isinstance(old, (Tensor, ShardedTensor)):
            continue
        conversion = conversions.get(name) or _unchanged(old)
        expected = torch.Size([old.size()[0], conversion.width]) if len(old.size()) == 2 else old.size()
        if new.size() != expected:
            raise UserError(
                f"{name} is {list(new.size())} in the slim model, and would be filled with {list(expected)}"
            )
        if len(expected) == 0 or not (isinstance(old, ShardedTensor) or isinstance(new, ShardedTensor)):
            _copy(old, new, conversion)
        else:
            _Transfer(_shards(old), _shards(new), conversion, group, _dtype(old), device).run()


@torch.no_grad()
def fill_rows(target: Tensor | ShardedTensor, row: Tensor) -> None:
    """Gives every row of a tensor [rows, columns] the same values [columns]."""
    for shard in _shards(target):
        if shard.values is not None:
            shard.values[:] = row[shard.column : shard.column + shard.columns].to(shard.values)


def _dtype(tensor: Tensor | ShardedTensor) -> torch.dtype:
    return tensor.metadata().tensor_properties.dtype if isinstance(tensor, ShardedTensor) else tensor.dtype


def _unchanged(tensor: Tensor | ShardedTensor) -> RowConversion:
    width = tensor.size()[1] if len(tensor.size()) == 2 else 1
    return KeepColumns(range(width), width)


def _copy(old: Tensor, new: Tensor, conversion: RowConversion) -> None:
    """From a tensor that every rank has to another."""
    if old.dim() == 2:
        conversion.convert([(0, old)], new)
    else:
        new.copy_(old)


class _Transfer:
    """One tensor's way, block by block of its rows.

    Every rank knows who holds what, and so which pieces go from whom to whom; their columns go as bytes, since not every
    process group sends every kind of number.
    """

    def __init__(
        self,
        sources: list[_Shard],
        targets: list[_Shard],
        conversion: RowConversion,
        group: dist.ProcessGroup | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.sources, self.targets, self.conversion, self.group = sources, targets, conversion, group
        self.rank, self.ranks = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
        self.rows = max(shard.row + shard.rows for shard in sources)
        self.dtype, self.device = dtype, device
        # (where in the needed columns, which of the shard's)
        self.columns = {id(s): conversion.part(s.column, s.column + s.columns) for s in sources}

    def run(self) -> None:
        width = max(len(self.conversion.needs), self.conversion.width) * self.dtype.itemsize
        step = max(1, _BLOCK_BYTES // width)
        for start in range(0, self.rows, step):
            stop = min(start + step, self.rows)
            pieces = list(self._pieces(start, stop))
            received = self._exchange([piece for piece in pieces if piece.sender != piece.receiver])
            for shard in self.targets:
                if shard.rank in (None, self.rank):
                    own = [p for p in pieces if p.receiver == self.rank and p.target is shard]
                    self._fill(shard, own, received, start, stop)

    def _pieces(self, start: int, stop: int) -> Iterator[_Piece]:
        for target in self.targets:
            first, last = max(start, target.row), min(stop, target.row + target.rows)
            for receiver in range(self.ranks) if target.rank is None else (target.rank,):
                for source in self.sources:
                    begin, end = max(first, source.row), min(last, source.row + source.rows)
                    if begin < end and len(self.columns[id(source)][1]):
                        sender = receiver if source.rank is None else source.rank
                        yield _Piece(sender, receiver, source, target, begin, end)

    def _exchange(self, pieces: list[_Piece]) -> dict[int, Tensor]:
        """Sends this rank's pieces; returns those it gets, by the identity of the piece."""
        if not pieces:  # on no rank
            return {}
        outgoing = sorted((p for p in pieces if p.sender == self.rank), key=lambda p: p.receiver)
        incoming = sorted((p for p in pieces if p.receiver == self.rank), key=lambda p: p.sender)
        out_sizes = [sum(self._bytes(p) for p in outgoing if p.receiver == rank) for rank in range(self.ranks)]
        in_sizes = [sum(self._bytes(p) for p in incoming if p.sender == rank) for rank in range(self.ranks)]
        empty = torch.empty(0, dtype=torch.uint8, device=self.device)
        sent = torch.cat([empty, *(self._read(p).view(torch.uint8).flatten() for p in outgoing)])
        got = empty.new_empty(sum(in_sizes))
        dist.all_to_all_single(got, sent, in_sizes, out_sizes, group=self.group)
        parts = got.split([self._bytes(p) for p in incoming])
        return {
            id(p): part.view(self.dtype).view(p.stop - p.start, -1) for p, part in zip(incoming, parts, strict=True)
        }

    def _bytes(self, piece: _Piece) -> int:
        return (piece.stop - piece.start) * len(self.columns[id(piece.source)][1]) * self.dtype.itemsize

    def _read(self, piece: _Piece) -> Tensor:
        values, columns = piece.source.values, self.columns[id(piece.source)][1]
        assert values is not None, "the sender has them"
        rows = values[piece.start - piece.source.row : piece.stop - piece.source.row]
        return rows.to(self.device).index_select(1, columns.to(self.device))

    def _fill(self, shard: _Shard, pieces: list[_Piece], received: Mapping[int, Tensor], start: int, stop: int) -> None:
        first, last = max(start, shard.row), min(stop, shard.row + shard.rows)
        if first >= last:
            return
        rows = torch.empty(last - first, self.conversion.width, dtype=self.dtype, device=self.device)
        gathered = self.conversion.room(rows)
        for piece in pieces:
            values = received[id(piece)] if piece.sender != self.rank else self._read(piece)
            gathered[piece.start - first : piece.stop - first, self.columns[id(piece.source)][0]] = values
        self.conversion.finish(gathered, rows)
        assert shard.values is not None
        shard.values[first - shard.row : last - shard.row] = rows[:, shard.column : shard.column + shard.columns]


def _shards(value: Tensor | ShardedTensor) -> list[_Shard]:
    """Who holds which part of a tensor of one or two dimensions."""
    if not isinstance(value, ShardedTensor):
        whole = value if value.dim() == 2 else value[:, None]
        return [_Shard(None, 0, len(whole), 0, whole.shape[1], whole)]
    local = {tuple(shard.metadata.shard_offsets): shard.tensor for shard in value.local_shards()}
    shards = []
    for part in value.metadata().shards_metadata:
        offsets, sizes = tuple(part.shard_offsets), [*part.shard_sizes, 1][:2]
        values = local.get(offsets)
        if values is not None and values.dim() == 1:
            values = values[:, None]
        row, column = [*offsets, 0][:2]
        assert part.placement is not None, "TorchRec places every shard"
        shards.append(_Shard(part.placement.rank(), row, sizes[0], column, sizes[1], values))
    return shards
