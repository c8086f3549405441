"""Taps: every embedding module's pooled output becomes a leaf of the autograd graph, and the model does not notice.

The graph then ends at the pooled outputs. No gradient reaches a table, so a fused optimizer has nothing to apply, no
embedding backward is paid, and no parameter's `.grad` or DDP hook is touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed.types import LazyAwaitable
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import KeyedTensor

from sseds_rec.distributed.tables import embedding_modules, kernels_uncounted, table_configs
from sseds_rec.search.scores import Table


@dataclass
class Tap:
    """One embedding module of the model and what it returned since the last `clear`.

    Attributes:
        path: where the module sits in the model, without the distributed wrappers.
        configs: its tables.
        outputs: per call, (leaf [B, ΣD], feature key -> (first column, width)).
    """

    path: str
    module: nn.Module
    configs: list[EmbeddingBagConfig]
    outputs: list[tuple[Tensor, dict[str, tuple[int, int]]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        names = get_embedding_names_by_table(self.configs)
        self.keys_by_table = {config.name: keys for config, keys in zip(self.configs, names, strict=True)}

    def hook(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook: replaces the output by one with the same keys and values, cut off from the tables.

        Managed collision collections return (output, remapped ids).
        """
        if isinstance(output, tuple):
            return (self.hook(module, args, output[0]), *output[1:])
        pooled = output.wait() if isinstance(output, LazyAwaitable) else output
        leaf = pooled.values().detach().requires_grad_()
        columns, start = {}, 0
        for key, width in zip(pooled.keys(), pooled.length_per_key(), strict=True):
            columns[key] = (start, width)
            start += width
        self.outputs.append((leaf, columns))
        return KeyedTensor(pooled.keys(), pooled.length_per_key(), leaf)

    def contributions(self, gradients: list[Tensor]) -> dict[str, Tensor]:
        """Per table, Σ over its features and over the module's calls of e ⊙ ∂f/∂e [B, D]: all share one α.

        Args:
            gradients: ∂f/∂leaf [B, ΣD] of each call, in the order of `outputs`.
        """
        products = [leaf.detach() * gradient for (leaf, _), gradient in zip(self.outputs, gradients, strict=True)]
        total = {}
        for table, keys in self.keys_by_table.items():
            parts = [
                product.narrow(1, *columns[key])
                for product, (_, columns) in zip(products, self.outputs, strict=True)
                for key in keys
            ]
            total[table] = parts[0] if len(parts) == 1 else torch.stack(parts).sum(dim=0)
        return total


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
    return {names[path, c.name]: Table.of(c) for path, module in modules.items() for c in table_configs(module)}


@contextmanager
def tapped(model: nn.Module) -> Iterator[list[Tap]]:
    """Taps every embedding module, in eval mode; on exit modes, RNG and the kernels' step counters are as before."""
    taps = [Tap(path, module, table_configs(module)) for path, module in embedding_modules(model).items()]
    modes = [(module, module.training) for module in model.modules()]
    handles = [tap.module.register_forward_hook(tap.hook) for tap in taps]
    model.eval()
    try:
        with kernels_uncounted(model), torch.random.fork_rng(devices=_cuda_devices(model)):
            yield taps
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
