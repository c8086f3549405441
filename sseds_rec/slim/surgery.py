"""Swaps the EmbeddingBagCollections of a model for slim ones that look the same from outside."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from sseds_rec.distributed.managed import is_managed
from sseds_rec.distributed.tables import embedding_modules
from sseds_rec.errors import UserError
from sseds_rec.search.plan import DimensionPlan, TablePlan
from sseds_rec.search.tap import plan_tables, qualified_tables
from sseds_rec.slim.alignment import Alignment, Init, columns_of


class SlimEmbeddingBagCollection(nn.Module):
    """An EmbeddingBagCollection with fewer columns that returns the keys, order and widths of the original.

    Kept columns are aligned to the original width by a transform matrix per table (Eq. 13); features of dropped tables are
    zeros.

    Its tables have the names of the original's in state dicts (`<path>.embedding_bags.<table>.weight`), so that what
    `slim_checkpoint` writes loads into it.

    Args:
        configs: the original tables.
        plans: original table name -> its plan.
        device: of the new tables; "meta" before `DistributedModelParallel`.
        init: "select" starts as the masked original, "random" as the paper.
        is_weighted: whether the original pools with per-id weights.

    Raises:
        UserError: the plan drops every table.
    """

    def __init__(
        self,
        configs: list[EmbeddingBagConfig],
        plans: dict[str, TablePlan],
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
        names = dict(zip((c.name for c in configs), get_embedding_names_by_table(configs), strict=True))
        self.embedding_bag_collection = EmbeddingBagCollection(
            tables=[dataclasses.replace(c, embedding_dim=plans[c.name].stored_dim) for c in kept],
            is_weighted=is_weighted,
            device=device,
        )
        # Aligned per original width, since tables of one collection may differ in it.
        self.original = {key: c.embedding_dim for c in configs for key in names[c.name]}
        self.stored = {key: plans[c.name].embedding_dim for c in kept for key in names[c.name]}
        tables = {key: c.name for c in kept for key in names[c.name]}
        weights_device = torch.device("cpu") if device.type == "meta" else device
        self.alignments = nn.ModuleDict()
        for width in sorted({self.original[key] for key in self.stored}):
            keys = [key for key in self.stored if self.original[key] == width]
            alignment = Alignment({k: self.stored[k] for k in keys}, width, {k: tables[k] for k in keys}).to(
                weights_device
            )
            if init == "select":
                alignment.select({tables[k]: plans[tables[k]].kept for k in keys})
            self.alignments[str(width)] = alignment
        self.register_state_dict_post_hook(_hide_collection)
        self.register_load_state_dict_pre_hook(_restore_collection)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """KJT over at least the kept features -> KeyedTensor [B, Σ original D], keys in the original order."""
        columns = columns_of(self.embedding_bag_collection(features), self.stored)
        aligned: dict[str, Tensor] = {}
        for width, alignment in self.alignments.items():
            keys = [key for key in self.stored if self.original[key] == int(width)]
            aligned |= zip(keys, alignment(torch.cat([columns[k] for k in keys], dim=1)).unbind(1), strict=True)
        any_column = next(iter(columns.values()))
        values = [
            aligned[k] if k in aligned else any_column.new_zeros(any_column.shape[0], d)
            for k, d in self.original.items()
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
        init: "select" makes the result equal to the model with the dropped columns set to zero; "random" draws the
            transform matrices, as the paper does before retraining.

    Raises:
        UserError: the model is sharded, or the plan is of another model (names the table).
    """
    modules = embedding_modules(model)
    for path, module in modules.items():
        if is_managed(module):
            raise UserError(
                f"{path}: slim() does not rebuild managed collision collections; build the slim one from "
                "plan.embedding_bag_configs(), and let it start from slim_checkpoint()"
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
        replacement = SlimEmbeddingBagCollection(configs, plans, module.device, init, module.is_weighted())
        if module.device.type != "meta":
            _copy_columns(module, replacement.embedding_bag_collection, plans)
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
def _copy_columns(source: EmbeddingBagCollection, target: EmbeddingBagCollection, plans: dict[str, TablePlan]) -> None:
    for table, bag in target.embedding_bags.items():
        kept = plans[table].kept
        weight = source.embedding_bags[table].weight
        bag.weight[:, : len(kept)] = weight.index_select(1, torch.tensor(kept, device=weight.device))
        bag.weight[:, len(kept) :] = 0
