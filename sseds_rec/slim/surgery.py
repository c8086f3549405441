"""Swaps the embedding collections of a model for slim ones that look the same from outside."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import DistributedModelParallel, DMPCollection, get_unwrapped_module
from torchrec.distributed.types import ShardedModule, ShardedTensor

from sseds_rec.distributed.tables import (
    collection_of,
    embedding_modules,
    is_sequence,
    table_configs,
)
from sseds_rec.errors import UserError
from sseds_rec.search.plan import DimensionPlan
from sseds_rec.search.scores import Table
from sseds_rec.search.tap import plan_tables, qualified_tables
from sseds_rec.slim.alignment import Init
from sseds_rec.slim.collections import SlimEmbeddingBagCollection, SlimEmbeddingCollection, SlimModule
from sseds_rec.slim.columns import row_conversion
from sseds_rec.slim.offline.entries import conversions
from sseds_rec.slim.placement import Shard, check_shard, shard_alike
from sseds_rec.slim.rebuild import MANAGED, PROCESSED, ROW_PRUNED, rebuild
from sseds_rec.slim.transfer import transfer
from sseds_rec.slim.widening import Output, Tables, weights_of


def slim(
    model: nn.Module,
    plan: DimensionPlan,
    init: Init = "select",
    aligned_dim: int | None = None,
    raw: bool = False,
    shard: Shard | None = None,
) -> nn.Module:
    """A copy of a model whose embedding collections have the plan's columns; everything around them runs unchanged.

    EmbeddingBagCollections and EmbeddingCollections are replaced wherever they are in the module tree, and so are the modules
    that process or remap ids before they look them up: feature processors, managed collision and (unsharded) row-pruning
    collections, with the state they have. Optimizers given to tables by `apply_optimizer_in_backward` are given to the new ones.

    Before sharding, tables that hold values give their kept columns to the new ones; tables on the meta device stay there, and
    `slim_checkpoint`'s result can be loaded once they are sharded. Tables of the original are never copied whole.

    A `DistributedModelParallel` becomes another, sharded by a plan of its own, and its columns go from shard to shard, some
    megabytes at a time; all ranks call it. Optimizer state begins anew (`slim_checkpoint` keeps it).

    Args:
        model: any module tree, sharded or not; only read.
        plan: made from the scores of this model, sharded or not.
        init: "select" makes the result equal to the model with the dropped columns set to zero or, of rotated tables, the
            dropped coordinates set to those of the mean; "random" draws the transform matrices, as the paper does before
            retraining.
        aligned_dim: width of all embeddings that the collections return, for models built for another one; by default the
            original widths. Needs init="random" if it differs from them.
        raw: return the kept columns as they are, d_i wide and without transform matrices, and no dropped features: for models
            that concatenate. An embedding of a rotated table then has its mass as last column (see `MassColumns`).
        shard: makes the slim model, on the meta device, a sharded one, as the job makes its model one; by default every table
            is split as its original is, with the sharders, process group and device that `model` was made with.

    Raises:
        UserError: the plan is of another model (names the table), a module cannot be rebuilt or its tables not be rotated
            (names it), or options exclude each other.
    """
    output = Output(init, aligned_dim, raw)
    modules = embedding_modules(model, ROW_PRUNED, "slimmed")
    _check(model, modules, plan, output, shard)
    names = qualified_tables(modules)
    sharded = any(isinstance(module, ShardedModule) for module in modules.values())
    group = model._env.process_group if isinstance(model, DistributedModelParallel) else None
    memo: dict[int, nn.Module] = {}
    for path, module in modules.items():
        configs = table_configs(module)
        tables = Tables(
            configs,
            {c.name: plan.tables[names[path, c.name]] for c in configs},
            {c.name: own for c in configs if (own := plan.rotations.get(names[path, c.name])) is not None},
            _order(module),
        )
        on = torch.device("meta") if sharded else next(iter(weights_of(module).values())).device
        memo[id(module)] = replacement = _replacement(module, tables, output, on, group)
        if on.type != "meta":
            _fill(module, replacement, tables)
    if not isinstance(model, DistributedModelParallel) or not sharded:
        return copy.deepcopy(model, memo)
    tree = copy.deepcopy(get_unwrapped_module(model), memo)
    slimmed = shard(tree) if shard is not None else shard_alike(model, tree)
    slimmed.training = model.training
    state = model.state_dict()
    shapes = {name: value.size() for name, value in state.items() if isinstance(value, (Tensor, ShardedTensor))}
    transfer(
        state,
        _once(slimmed),
        conversions(Path("the model"), shapes, plan),
        group,
        model.device,
    )
    return slimmed


def _order(module: nn.Module) -> list[str]:
    """Keys as a sharded module orders them, by its sharding plan; none of others, which go by their tables."""
    collection: Any = collection_of(module)
    return list(collection._embedding_names) if isinstance(collection, ShardedEmbeddingBagCollection) else []


def _once(model: nn.Module) -> dict[str, Any]:
    """The state of a model without what it has at a second path."""
    seen: set[int] = set()
    again = []
    for path, module in get_unwrapped_module(model).named_modules(remove_duplicate=False):
        if id(module) in seen:
            again.append(f"{path}.")
        seen.add(id(module))
    return {name: value for name, value in model.state_dict().items() if not name.startswith(tuple(again))}


def check_plan(plan: DimensionPlan, model: nn.Module) -> None:
    """Refuses a plan that was not made for the model's tables.

    Raises:
        UserError: names the first table that is missing on either side, or whose rows or width differ.
    """
    _check_tables(plan, plan_tables(embedding_modules(model, ROW_PRUNED, "slimmed")))


def _check_tables(plan: DimensionPlan, tables: Mapping[str, Table]) -> None:
    for name in [*tables, *plan.tables]:
        if name not in plan.tables or name not in tables:
            raise UserError(
                f"table {name} is in the {'model' if name in tables else 'plan'} only; the plan is of another model"
            )
        asked, own = plan.tables[name], tables[name]
        if (asked.rows, asked.original_dim) != (own.rows, own.dim):
            raise UserError(
                f"table {name} has {own.rows} rows x {own.dim} columns, "
                f"the plan says {asked.rows} x {asked.original_dim}; the plan is of another model"
            )


def _check(
    model: nn.Module, modules: Mapping[str, nn.Module], plan: DimensionPlan, output: Output, shard: Shard | None
) -> None:
    _check_tables(plan, plan_tables(dict(modules)))
    names = qualified_tables(dict(modules))
    if output.init not in get_args(Init):
        raise UserError(f"init={output.init!r}: choose one of {', '.join(get_args(Init))}")
    if output.aligned_dim is not None and output.aligned_dim < 1:
        raise UserError(f"aligned_dim={output.aligned_dim}: embeddings have a column at least")
    if output.raw and output.aligned_dim is not None:
        raise UserError(f"raw=True returns the kept columns, aligned_dim={output.aligned_dim} aligns them; choose one")
    for path, module in modules.items():
        where = path or type(model).__name__
        for config in table_configs(module):
            name = names[path, config.name]
            if output.aligned_dim not in (None, config.embedding_dim) and output.init == "select":
                raise UserError(
                    f"table {name}: init='select' puts columns back to where they were, in {config.embedding_dim}, "
                    f"not aligned_dim={output.aligned_dim}; choose init='random'"
                )
            if name in plan.rotations and (is_sequence(module) or isinstance(module, (*PROCESSED, *MANAGED))):
                raise UserError(
                    f"{where}: the plan rotates table {name}, which is possible in a plain EmbeddingBagCollection only; "
                    "search with criterion='ggn'"
                )
    check_shard(model, any(isinstance(module, ShardedModule) for module in modules.values()), shard, "slim")
    if isinstance(model, DMPCollection):
        raise UserError(f"{type(model).__name__} replicates tables over groups of ranks; slim its checkpoint instead")


def _replacement(
    module: nn.Module, tables: Tables, output: Output, on: torch.device, group: dist.ProcessGroup | None
) -> SlimModule:
    kept = [
        dataclasses.replace(config, embedding_dim=tables.plans[config.name].stored_dim)
        for config in tables.configs
        if tables.plans[config.name].kept
    ]
    collection: Any = collection_of(module)
    remaps = isinstance(module, MANAGED)
    replacement: SlimModule
    if is_sequence(module):
        widths = sorted({config.embedding_dim for config in kept})
        parts = {width: rebuild(module, [c for c in kept if c.embedding_dim == width], on, group) for width in widths}
        replacement = SlimEmbeddingCollection(parts, tables, output, collection._need_indices, remaps)
    else:
        rebuilt = rebuild(module, kept, on, group) if kept else None
        replacement = SlimEmbeddingBagCollection(rebuilt, tables, output, collection._is_weighted, remaps)
    replacement.widening.to(torch.device("cpu") if on.type == "meta" else on)
    return replacement.train(module.training)


@torch.no_grad()
def _fill(module: nn.Module, replacement: SlimModule, tables: Tables) -> None:
    sources = weights_of(module)
    for part, _ in replacement.parts().values():
        for table, weight in weights_of(part).items():
            conversion = row_conversion(tables.plans[table], tables.rotations.get(table))
            conversion.convert([(0, sources[table])], weight)
