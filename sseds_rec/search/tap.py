"""Taps: every embedding module's output becomes a leaf of the autograd graph, and the model does not notice.

The graph then ends at the embeddings. No gradient reaches a table, so a fused optimizer has nothing to apply, no embedding
backward is paid, and no parameter's `.grad` or DDP hook is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.types import LazyAwaitable, LazyNoWait
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor
from torchrec.sparse.tensor_dict import maybe_td_to_kjt

from sseds_rec.distributed.tables import embedding_modules, is_sequence, table_configs
from sseds_rec.distributed.undisturbed import undisturbed
from sseds_rec.errors import UserError
from sseds_rec.search.samples import Lookup, Sample
from sseds_rec.search.scores import Table

T = TypeVar("T")

#: (outputs [B, D] of one feature, mass [B] or None) -> outputs as the model shall see them. Sequences: [ids, D] and None.
Edit = Callable[[Tensor, Tensor | None], Tensor]


@dataclass
class _Call:
    """One call of a module with some features: per key its outputs, and the columns of the leaf that stand for them."""

    features: Any
    outputs: dict[str, Tensor] = field(default_factory=dict)
    lengths: dict[str, Tensor] = field(default_factory=dict)
    leaves: list[Tensor] = field(default_factory=list)
    columns: dict[str, tuple[int, int, int]] = field(default_factory=dict)  # key -> leaf, first column, width

    def add_leaf(self, values: Tensor, copied: bool) -> Tensor:
        """What the model sees of a new leaf: the leaf, or a copy, since a leaf can't be changed in place, as embeddings can.

        A model that looks up without gradients could change it, and `outputs`, unseen.
        """
        copied |= not torch.is_grad_enabled()
        self.leaves.append(values.requires_grad_())
        with torch.enable_grad():
            return values.clone() if copied else values

    def rows(self) -> set[int]:
        return {one.shape[0] for one in (self.lengths or self.outputs).values()}

    def looked_up(self, key: str, gradients: list[Tensor | None] | None, mass: Callable[[], Tensor]) -> Lookup:
        output, gradient = self.outputs[key], None
        if gradients is not None:
            leaf, start, width = self.columns[key]
            found = gradients[leaf]
            gradient = torch.zeros_like(output) if found is None else found.narrow(1, start, width)
        return Lookup(output, gradient, self.lengths.get(key), mass)


class _Tap:
    """One embedding module of the model and its calls in the last forward."""

    def __init__(self, path: str, module: nn.Module, names: dict[str, str], edits: dict[str, Edit]) -> None:
        self.path = path
        self.module = module
        self.names = names  # table -> name in scores and plans
        self.edits = edits
        self.copied = False
        self.calls: list[_Call] = []
        configs = table_configs(module)
        keys = get_embedding_names_by_table(configs)
        self.keys = {config.name: own for config, own in zip(configs, keys, strict=True)}
        #: key -> its table and feature.
        self.sources: dict[str, tuple[EmbeddingBagConfig, str]] = {
            key: (config, feature)
            for config, own in zip(configs, keys, strict=True)
            for key, feature in zip(own, config.feature_names, strict=True)
        }

    def hook(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Forward hook: replaces the output by one of the same kind, keys and values, cut off from the tables.

        Managed collision collections return (output, remapped ids).
        """
        if isinstance(output, tuple):
            return (self.hook(module, args, kwargs, output[0]), *output[1:])
        is_lazy = isinstance(output, LazyAwaitable)
        found = output.wait() if is_lazy else output
        call = _Call(args[0] if args else next(iter(kwargs.values())))
        seen = self._pooled(call, found) if isinstance(found, KeyedTensor) else self._sequences(call, found)
        self.calls.append(call)
        return LazyNoWait(seen) if is_lazy else seen

    def _pooled(self, call: _Call, found: KeyedTensor) -> KeyedTensor:
        values = found.values().detach()
        start = 0
        for key, width in zip(found.keys(), found.length_per_key(), strict=True):
            call.columns[key] = (0, start, width)
            call.outputs[key] = values.narrow(1, start, width)
            start += width
        edited = [key for key in call.columns if self._edit(key)]
        # Without edits it shares the memory of `outputs`, which themselves don't become part of the graph.
        leaf = values.clone() if edited else values.detach()
        for key in edited:
            _, start, width = call.columns[key]
            leaf.narrow(1, start, width).copy_(self._edited(call, key))
        return KeyedTensor(found.keys(), found.length_per_key(), call.add_leaf(leaf, self.copied))

    def _sequences(self, call: _Call, found: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
        seen = {}
        for index, (key, jagged) in enumerate(found.items()):
            values = jagged.values().detach()
            call.outputs[key], call.lengths[key] = values, jagged.lengths()
            call.columns[key] = (index, 0, values.shape[1])
            leaf = self._edited(call, key).to(values.dtype) if self._edit(key) else values.detach()
            seen[key] = JaggedTensor(
                call.add_leaf(leaf, self.copied), jagged.weights_or_none(), jagged.lengths(), jagged.offsets_or_none()
            )
        return seen

    def _edit(self, key: str) -> Edit | None:
        return self.edits.get(self.names[self.sources[key][0].name])

    def _edited(self, call: _Call, key: str) -> Tensor:
        edit = self._edit(key)
        assert edit is not None
        with torch.no_grad():
            return edit(call.outputs[key], self.mass(call, key) if self._has_mass() else None)

    def _has_mass(self) -> bool:
        return isinstance(self.module, (EmbeddingBagCollection, ShardedEmbeddingBagCollection))

    def mass(self, call: _Call, key: str) -> Tensor:
        """See `Lookup`."""
        if not self._has_mass():
            raise UserError(
                f"{self.path or 'the model'}: rotated search needs an EmbeddingBagCollection, "
                f"not {type(self.module).__name__}"
            )
        config, feature = self.sources[key]
        self._check_mean_pooling(config)
        features: KeyedJaggedTensor = maybe_td_to_kjt(call.features, None)
        bags = features[feature]
        lengths = bags.lengths()
        mass = lengths.double()
        if self.module._is_weighted:
            mass = torch.segment_reduce(bags.weights().double(), "sum", lengths=lengths.long(), initial=0, unsafe=True)
        if config.pooling == PoolingType.MEAN:
            mass = mass / lengths.clamp_min(1)
        if features.variable_stride_per_key():  # rows that repeat are looked up once
            keys, inverse = features.inverse_indices()
            mass = mass[inverse[keys.index(feature)]]
        return mass

    def _check_mean_pooling(self, config: EmbeddingBagConfig) -> None:
        """Refuses what TorchRec does not pool as it does unsharded.

        To make means of row-wise sums it divides a collection's whole output (`_create_mean_pooling_divisor`): tables that
        are not row-wise a second time, and weighted ones by the sum of their weights.
        """
        row_wise = getattr(self.module, "_pooling_type_to_rs_features", {})
        if PoolingType.MEAN.value not in row_wise:
            return
        done_by_row = {feature for features in row_wise.values() for feature in features}
        if self.module._is_weighted or not done_by_row.issuperset(config.feature_names):
            raise UserError(
                f"table {self.names[config.name]}: TorchRec pools it wrongly, since its collection has row-wise tables with "
                "mean pooling, and others or weights; shard no table of it row-wise"
            )


class Taps:
    """The tapped outputs of a model's last forward.

    Attributes:
        modules: path -> embedding module, as `embedding_modules`.
        tables: name in scores and plans -> facts about the table; with several modules prefixed with the path.
        edits: table name -> what to do to its outputs before the model sees them; set it between forwards.
            Contributions are of the outputs before the edit and the gradients after it, so that a masked column still has
            a score.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = embedding_modules(model)
        self.tables = plan_tables(self.modules)
        self.edits: dict[str, Edit] = {}
        names = qualified_tables(self.modules)
        self._taps = [
            _Tap(path, module, {table: name for (of, table), name in names.items() if of == path}, self.edits)
            for path, module in self.modules.items()
        ]

    def clear(self) -> None:
        """Forgets the last forward."""
        for tap in self._taps:
            tap.calls.clear()

    def run(self, forward: Callable[[], T]) -> T:
        """Runs a forward; once more, with copies of the embeddings, if the model changes them in place."""
        self.clear()
        try:
            return forward()
        except RuntimeError as error:
            if "a leaf Variable that requires grad" not in str(error) or any(tap.copied for tap in self._taps):
                raise
        for tap in self._taps:
            tap.copied = True
        return self.run(forward)

    def rows(self) -> int:
        """B of the last forward.

        Raises:
            UserError: no embedding module was called, or they saw batches of different sizes.
        """
        sizes = {rows for tap in self._taps for call in tap.calls for rows in call.rows()}
        if not sizes:
            raise UserError(f"the model's forward calls none of its embedding modules ({', '.join(self.modules)})")
        if len(sizes) > 1:
            raise UserError(
                f"the embedding modules saw batches of different sizes ({sorted(sizes)}); they cannot be scored together"
            )
        return sizes.pop()

    def leaves(self) -> list[Tensor]:
        """What to differentiate in; the order stays until `clear`."""
        return [leaf for tap in self._taps for call in tap.calls for leaf in call.leaves]

    def samples(self, gradients: Sequence[Tensor | None] | None) -> Iterator[tuple[str, Sample]]:
        """(name, sample) of every table of every module that was called.

        Args:
            gradients: of `leaves()`, as `torch.autograd.grad` returns them; None for the outputs alone.
        """
        found = None if gradients is None else iter(gradients)
        for tap in self._taps:
            own = [None if found is None else list(islice(found, len(call.leaves))) for call in tap.calls]
            for table, keys in tap.keys.items() if tap.calls else ():
                looked_up = [
                    call.looked_up(key, of_call, partial(tap.mass, call, key))
                    for call, of_call in zip(tap.calls, own, strict=True)
                    for key in keys
                ]
                yield tap.names[table], Sample(looked_up)


def qualified_tables(modules: dict[str, nn.Module]) -> dict[tuple[str, str], str]:
    """(module path, table) -> the name used in scores and plans: prefixed with the path when there are several modules."""
    several = len(modules) > 1
    return {
        (path, config.name): f"{path}.{config.name}" if several else config.name
        for path, module in modules.items()
        for config in table_configs(module)
    }


def plan_tables(modules: dict[str, nn.Module]) -> dict[str, Table]:
    """Name used in scores and plans -> facts about the table."""
    names = qualified_tables(modules)
    return {
        names[path, c.name]: Table(
            c.num_embeddings,
            c.embedding_dim,
            tuple(c.feature_names),
            "NONE" if is_sequence(module) else c.pooling.name,
        )
        for path, module in modules.items()
        for c in table_configs(module)
    }


@contextmanager
def tapped(model: nn.Module) -> Iterator[Taps]:
    """Taps every embedding module, in eval mode.

    On exit modes, RNG, the kernels' step counters, pipelined forwards and batches in flight are as before.

    Raises:
        UserError: the model has no embedding module, or one that cannot be searched (named).
    """
    taps = Taps(model)
    handles = [tap.module.register_forward_hook(tap.hook, with_kwargs=True) for tap in taps._taps]
    try:
        with undisturbed(model), torch.random.fork_rng(devices=_cuda_devices(model)):
            yield taps
    finally:
        for handle in handles:
            handle.remove()
        taps.clear()


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
