"""Slim collections back to plain ones of one width: transform matrices folded into the tables, and taken out again."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel, get_unwrapped_module
from torchrec.distributed.types import ShardedModule
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from sseds_rec.constants import KERNEL_MULTIPLE
from sseds_rec.distributed.tables import collection_of
from sseds_rec.errors import UserError
from sseds_rec.search.plan import DimensionPlan
from sseds_rec.search.rotation import Rotation
from sseds_rec.slim.collections import SlimEmbeddingBagCollection, SlimEmbeddingCollection, SlimModule
from sseds_rec.slim.columns import Product
from sseds_rec.slim.placement import Shard, check_shard, shard_alike
from sseds_rec.slim.rebuild import rebuild
from sseds_rec.slim.transfer import fill_rows, transfer
from sseds_rec.slim.widening import weights_of


def merge(model: nn.Module, shard: Shard | None = None) -> nn.Module:
    """A copy of a slim model with plain collections that return the same: rows v_i become M_i v_i (+ the bias of rotated ones).

    All tables have the width that the slim collections return, and dropped ones are there again, with rows of zeros (or of
    their mean): what serving systems take that know one width only. Pooling is linear, so nothing else changes.

    A `DistributedModelParallel` becomes another, as in `slim`; all ranks call it.

    Args:
        model: with collections that `slim` made, sharded or not; only read.
        shard: see `slim`.

    Raises:
        UserError: there is no such collection, one returns raw columns or a width that FBGEMM cannot store, or dropped tables
            had processing of their ids that is gone (names it).
    """
    slims = _slim_modules(model)
    parts = [part for own in slims.values() for part, _ in own.parts().values()]
    sharded = isinstance(model, DistributedModelParallel) or any(isinstance(part, ShardedModule) for part in parts)
    check_shard(model, sharded, shard, "merge")
    group = model._env.process_group if isinstance(model, DistributedModelParallel) else None
    memo: dict[int, nn.Module] = {}
    for path, own in slims.items():
        _check(path, own)
        memo[id(own)] = plain = _plain(own, torch.device("meta") if sharded else _device(own), group)
        if not sharded:
            _fill(own, plain)
    if not isinstance(model, DistributedModelParallel):
        return copy.deepcopy(model, memo)
    tree = copy.deepcopy(get_unwrapped_module(model), memo)
    merged = shard(tree) if shard is not None else shard_alike(model, tree)
    before, state = model.state_dict(), merged.state_dict()
    conversions = {
        name: product
        for path, own in slims.items()
        for table, product in _products(own).items()
        for name in state
        if name.startswith(f"{path}." if path else "") and name.endswith(f".{table}.weight")
    }
    transfer(before, state, conversions, group, model.device)
    for name in conversions.keys() - before.keys():
        fill_rows(state[name], conversions[name].constant)
    return merged


def unmerge_plan(model: nn.Module, plan: DimensionPlan) -> DimensionPlan:
    """A plan that takes a merged model apart again: `slim(merge(model), unmerge_plan(model, plan))` returns what `model` does.

    Its rotations are the trained transform matrices and biases, so it serves `slim_checkpoint` as well, and can be saved with
    what was merged. If the merged tables were trained on, their rows are projected to what the matrices span.

    Args:
        model: the slim model that is merged, sharded or not.
        plan: by which it was made.

    Raises:
        UserError: a collection returns embeddings per id, whose plans have no rotations, or see `merge`.
    """
    slims = _slim_modules(model)
    tables, rotations = {}, {}
    for path, own in slims.items():
        _check(path, own)
        if isinstance(own, SlimEmbeddingCollection):
            raise UserError(
                f"{path}: tables of an EmbeddingCollection cannot be rotated, nor taken apart; keep the slim model"
            )
        for table, product in _products(own).items():
            name = f"{path}.{table}" if len(slims) > 1 else table
            old, width = plan.tables[name], product.width
            matrix = product.matrix[: old.embedding_dim].T
            changes = {"original_dim": width, "kept": list(range(old.embedding_dim))}
            tables[name] = old.model_copy(update=changes)
            if old.kept or product.constant.any():
                rotations[name] = Rotation(torch.linalg.pinv(matrix).T, matrix, product.constant)
    return DimensionPlan(
        tables=tables, budget=plan.budget, reached=plan.reached, search=plan.search, rotations=rotations
    )


def _slim_modules(model: nn.Module) -> dict[str, SlimModule]:
    tree = get_unwrapped_module(model)
    found = {path: module for path, module in tree.named_modules() if isinstance(module, SlimModule)}
    if not found:
        raise UserError(f"{type(tree).__name__} holds no collection that slim() made")
    return found


def _check(path: str, module: SlimModule) -> None:
    if module.output.raw:
        raise UserError(f"{path}: it returns raw columns (raw=True), so there is nothing to fold into its tables")
    width = module.output.aligned_dim
    if width is not None and width % KERNEL_MULTIPLE:
        raise UserError(f"{path}: FBGEMM stores no tables of aligned_dim={width}, only multiples of {KERNEL_MULTIPLE}")
    dropped = [name for name, own in module.tables.plans.items() if not own.kept]
    parts = [part for part, _ in module.parts().values()]
    if dropped and any(collection_of(part) is not part for part in parts):
        raise UserError(
            f"{path}: what processed or remapped the ids of the dropped table {dropped[0]} is gone with it; "
            "keep the slim model, or give the table a min_dim"
        )


def _plain(module: SlimModule, device: torch.device, group: dist.ProcessGroup | None) -> nn.Module:
    """The original module once more, with tables as wide as what is returned."""
    width = module.output.aligned_dim
    configs = [copy.copy(config) for config in module.tables.configs]
    for config in configs:
        config.embedding_dim = width or config.embedding_dim
    parts = [part for part, _ in module.parts().values()]
    if parts:
        return rebuild(parts[0], configs, device, group)
    if isinstance(module, SlimEmbeddingBagCollection):
        return EmbeddingBagCollection(configs, module.is_weighted(), device)
    assert isinstance(module, SlimEmbeddingCollection)
    return EmbeddingCollection(configs, device, module.need_indices())


@torch.no_grad()
def _products(module: SlimModule) -> dict[str, Product]:
    """Table -> what its stored rows are multiplied by, and what is added to them."""
    transforms = module.widening.transforms()
    products = {}
    for config in module.tables.configs:
        own, rotation = module.tables.plans[config.name], module.tables.rotations.get(config.name)
        width = module.output.aligned_dim or config.embedding_dim
        matrix = torch.zeros(own.stored_dim, width, dtype=torch.float64)
        constant = torch.zeros(width, dtype=torch.float64)
        if config.name in transforms:
            columns = transforms[config.name].detach().double().cpu()
            matrix[: own.embedding_dim] = columns[:, : own.embedding_dim].T
            if rotation is not None:
                constant = columns[:, -1] * rotation.mean_length
        products[config.name] = Product(matrix, constant)
    return products


@torch.no_grad()
def _fill(module: SlimModule, plain: nn.Module) -> None:
    sources = {name: weight for part, _ in module.parts().values() for name, weight in weights_of(part).items()}
    products = _products(module)
    for name, weight in weights_of(plain).items():
        if name in sources:
            products[name].convert([(0, sources[name])], weight)
        else:
            fill_rows(weight, products[name].constant)


def _device(module: SlimModule) -> torch.device:
    weights = [weight for part, _ in module.parts().values() for weight in weights_of(part).values()]
    return next(iter(weights)).device if weights else torch.device("cpu")
