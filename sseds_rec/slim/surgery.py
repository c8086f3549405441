"""Swaps the EmbeddingBagCollections of a model for slim ones that look the same from outside."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection, get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from sseds_rec.distributed.managed import is_managed
from sseds_rec.distributed.tables import embedding_modules
from sseds_rec.errors import UserError
from sseds_rec.search.plan import DimensionPlan, TablePlan
from sseds_rec.search.rotation import Rotation
from sseds_rec.search.tap import plan_tables, qualified_tables
from sseds_rec.slim.alignment import Alignment, Init
from sseds_rec.slim.columns import row_conversion
from sseds_rec.slim.mass import MassColumns


class SlimEmbeddingBagCollection(nn.Module):
    """An EmbeddingBagCollection with fewer columns that returns the keys, order and widths of the original.

    Kept columns are aligned to the original width by a transform matrix per table (Eq. 13). Features of dropped tables are
    zeros, and of dropped rotated ones their mean.

    Its tables have the names of the original's in state dicts (`<path>.embedding_bags.<table>.weight`), so that what
    `slim_checkpoint` writes loads into it.

    Args:
        configs: the original tables.
        plans: original table name -> its plan.
        rotations: original table name -> its rotation, of those that are rotated.
        device: of the new tables; "meta" before `DistributedModelParallel`.
        init: "select" starts as the masked (rotated: projected) original, "random" as the paper.
        is_weighted: whether the original pools with per-id weights.

    Raises:
        UserError: the plan drops every table.
    """

    def __init__(
        self,
        configs: list[EmbeddingBagConfig],
        plans: Mapping[str, TablePlan],
        rotations: Mapping[str, Rotation],
        device: torch.device,
        init: Init,
        is_weighted: bool = False,
    ) -> None:
        super().__init__()
        kept = [config for config in configs if plans[config.name].kept]
        if not kept:
            raise UserError(
                f"the plan drops all tables of one EmbeddingBagCollection ({', '.join(plans)}); raise the budget or set min_dim"
            )
        self.embedding_bag_collection = EmbeddingBagCollection(
            tables=[dataclasses.replace(c, embedding_dim=plans[c.name].stored_dim) for c in kept],
            is_weighted=is_weighted,
            device=device,
        )
        names = dict(zip((c.name for c in configs), get_embedding_names_by_table(configs), strict=True))
        tables = {key: c.name for c in configs for key in names[c.name]}
        original = {key: c.embedding_dim for c in configs for key in names[c.name]}
        masses = MassColumns(
            {key: plans[tables[key]].embedding_dim for key in sorted(original, key=original.__getitem__)},
            {
                key: f
                for c in configs
                if c.name in rotations
                for key, f in zip(names[c.name], c.feature_names, strict=True)
            },
            {key: rotations[table].mean_length for key, table in tables.items() if table in rotations},
            [key for c in configs if c.pooling == PoolingType.MEAN for key in names[c.name]],
            is_weighted,
        )
        self.widening = _Widening(masses, original, tables)
        self.widening.to(torch.device("cpu") if device.type == "meta" else device)
        for alignment in self.widening.alignments.values():
            alignment.start(init, {name: own.kept for name, own in plans.items()}, rotations)  # type: ignore[operator]
        self.register_state_dict_post_hook(_hide_collection)
        self.register_load_state_dict_pre_hook(_restore_collection)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """KJT over at least the kept and the rotated features -> KeyedTensor [B, Σ original D], keys in the original order."""
        widened: KeyedTensor = self.widening(self.embedding_bag_collection(features), features)
        return widened


class _Widening(nn.Module):
    """Kept columns -> the original widths: all that is done after the lookup (a module of its own as `MassColumns` is).

    Args:
        masses: gives the columns to align, in the order of their keys' original widths.
        original: key -> D, in the original order.
        tables: key -> table.
    """

    def __init__(self, masses: MassColumns, original: Mapping[str, int], tables: Mapping[str, str]) -> None:
        super().__init__()
        self.masses = masses
        self.original = dict(original)
        # Aligned per original width, since tables of one collection may differ in it.
        self.keys = {width: list(keys) for width, keys in groupby(masses.dims, key=original.__getitem__)}
        self.sizes = [sum(masses.dims[key] for key in keys) for keys in self.keys.values()]
        self.alignments = nn.ModuleDict(
            {
                str(width): Alignment(
                    {key: masses.dims[key] for key in keys}, width, {key: tables[key] for key in keys}
                )
                for width, keys in self.keys.items()
            }
        )

    def forward(self, embeddings: KeyedTensor, features: KeyedJaggedTensor) -> KeyedTensor:
        columns = self.masses(embeddings, features).values()
        aligned: dict[str, Tensor] = {}
        groups = zip(self.keys.values(), self.alignments.values(), columns.split(self.sizes, dim=1), strict=True)
        for keys, alignment, group in groups:
            aligned |= zip(keys, alignment(group).unbind(1), strict=True)
        values = [
            aligned[key] if key in aligned else columns.new_zeros(columns.shape[0], d)
            for key, d in self.original.items()
        ]
        return KeyedTensor.from_tensor_list(list(self.original), values)


_COLLECTION = "embedding_bag_collection."


def _hide_collection(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in [name for name in state if name.startswith(prefix + _COLLECTION)]:
        state[prefix + name.removeprefix(prefix + _COLLECTION)] = state.pop(name)


def _restore_collection(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}embedding_bags.")]:
        state[prefix + _COLLECTION + name.removeprefix(prefix)] = state.pop(name)


def slim(model: nn.Module, plan: DimensionPlan, init: Init = "select") -> nn.Module:
    """A copy of a model whose EmbeddingBagCollections have the plan's columns; everything around them runs unchanged.

    Call it before `DistributedModelParallel`. Tables that hold values give their kept columns to the new ones; tables on the
    meta device stay there. Tables of the original are never copied whole.

    Args:
        model: any module tree with unsharded EmbeddingBagCollections.
        plan: made from the scores of this model, sharded or not.
        init: "select" makes the result equal to the model with the dropped columns set to zero or, of rotated tables, the
            dropped coordinates set to those of the mean; "random" draws the transform matrices, as the paper does before
            retraining.

    Raises:
        UserError: the model is sharded or has other embedding modules, or the plan is of another model (names the table).
    """
    modules = embedding_modules(model)
    for path, module in modules.items():
        if is_managed(module):
            raise UserError(
                f"{path}: slim() does not rebuild managed collision collections; build the slim one from "
                "plan.embedding_bag_configs(), and let it start from slim_checkpoint()"
            )
        if isinstance(module, (EmbeddingCollection, ShardedEmbeddingCollection)):
            raise UserError(
                f"{path}: slim() does not rebuild {type(module).__name__}; it rebuilds EmbeddingBagCollections"
            )
        if not isinstance(module, EmbeddingBagCollection):
            raise UserError(
                f"{path}: {type(module).__name__} is already sharded; call slim() before DistributedModelParallel"
            )
    check_plan(plan, model)
    names = qualified_tables(modules)
    memo: dict[int, nn.Module] = {}
    for path, module in modules.items():
        assert isinstance(module, EmbeddingBagCollection)
        configs = module.embedding_bag_configs()
        plans = {c.name: plan.tables[names[path, c.name]] for c in configs}
        rotations = {c.name: own for c in configs if (own := plan.rotations.get(names[path, c.name])) is not None}
        replacement = SlimEmbeddingBagCollection(configs, plans, rotations, module.device, init, module.is_weighted())
        if module.device.type != "meta":
            _copy_columns(module, replacement.embedding_bag_collection, plans, rotations)
        memo[id(module)] = replacement
    return copy.deepcopy(model, memo)


def check_plan(plan: DimensionPlan, model: nn.Module) -> None:
    """Refuses a plan that was not made for the model's tables.

    Raises:
        UserError: names the first table that is missing on either side, or whose rows or width differ.
    """
    tables = plan_tables(embedding_modules(model))
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


@torch.no_grad()
def _copy_columns(
    source: EmbeddingBagCollection,
    target: EmbeddingBagCollection,
    plans: Mapping[str, TablePlan],
    rotations: Mapping[str, Rotation],
) -> None:
    for table, bag in target.embedding_bags.items():
        conversion = row_conversion(plans[table], rotations.get(table))
        conversion.convert([(0, source.embedding_bags[table].weight)], bag.weight)
