"""The winning ticket: a slim model that starts from the trained full one (Section 3.2.3), or from parts of it (Table 2)."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from sseds_rec.distributed.checkpoint import load_checkpoint, stored_shapes
from sseds_rec.errors import UserError
from sseds_rec.models.ctr import TABLE_STD, CtrModel
from sseds_rec.models.registry import OverArch
from sseds_rec.search.plan import DimensionPlan

Tables = Literal["ticket", "random"]
Dense = Literal["kept", "fresh"]

EMBEDDINGS = ("embeddings.", "managed.")
TABLE = ".embedding_bags."
TRANSFORMS = ".alignment.transforms."


def load_ticket(
    checkpoint: Path,
    model: DistributedModelParallel,
    plan: DimensionPlan,
    tables: Tables = "ticket",
    dense: Dense = "kept",
) -> None:
    """Starts a sharded slim model from a slim checkpoint, whose dense weights are still those of the full model.

    Tables are taken as they are. Dense weights keep what runs over the kept columns (`OverArch.over_raw`) and other inputs that
    are still there (`OverArch.kept_inputs`), so that with `select` transforms the model equals the full one with masked or, where
    tables are rotated, projected embeddings. Transforms keep their own start, as do weights over aligned embeddings when these
    have another width than the full model's.

    Args:
        checkpoint: from `slim_checkpoint`.
        model: `CtrModel` built from the plan, sharded; its tables may be placed in any way.
        plan: of the checkpoint, its tables in the order of the full model's fields (`plan_for`).
        tables: "random" leaves tables as they were drawn when the model was sharded, but for padding, which is zero as in the
            checkpoint. The map of raw ids to rows is no weight and is taken over always.
        dense: "fresh" leaves dense weights and batch norm's statistics at the model's own start.

    Raises:
        UserError: a weight is missing or has a shape that cannot be taken over (names it).
    """
    module: CtrModel = model.module
    stored = stored_shapes(checkpoint)
    state = model.state_dict()
    wanted = {name: value for name, value in state.items() if _starts_from(name, tables, dense)}
    whole: dict[str, Tensor] = {}
    for name, value in wanted.items():
        if f"model.{name}" not in stored:
            raise UserError(f"{checkpoint}: holds no weight {name}; it is not of this model")
        whole[name] = value if name.startswith(EMBEDDINGS) else torch.empty(stored[f"model.{name}"], dtype=value.dtype)
    load_checkpoint({"model": whole}, checkpoint)
    fields, (table, *_) = module.over.fields, plan.tables.values()
    realigned = fields.alignment is not None and fields.aligned_dim != table.original_dim
    for name, value in wanted.items():
        if whole[name] is value:
            continue
        source = kept_weight(whole[name], name.removeprefix("over."), module.over, plan)
        if source.shape == value.shape:
            value.copy_(source)
        elif not realigned:
            raise UserError(f"{checkpoint}: {name} is {list(source.shape)}, the model's is {list(value.shape)}")
    model.load_state_dict(state)
    if tables == "random":
        start_anew(model, plan)


def start_anew(model: DistributedModelParallel, plan: DimensionPlan) -> None:
    """Leaves a sharded slim model's tables as they were drawn, but for padding, which is zero as in a slim checkpoint.

    Args:
        model: `CtrModel` built from the plan, sharded.
        plan: see `load_ticket`.
    """
    state = model.state_dict()
    for name, value in state.items():
        if TABLE in name:
            _clear_padding(value, plan.tables[name.split(".")[-2]].embedding_dim)
    model.load_state_dict(state)


def restart_tables(model: DistributedModelParallel, plan: DimensionPlan, tables: Collection[str], seed: int) -> None:
    """Draws some tables of a sharded slim model anew, as pretraining does; the others stay.

    Args:
        model: see `load_ticket`.
        plan: see `load_ticket`.
        tables: their names.
        seed: of the draw; data-parallel copies are the same on all ranks.
    """
    state = model.state_dict()
    numbers = {table: number for number, table in enumerate(plan.tables)}
    for name, value in state.items():
        table = name.split(".")[-2]
        if TABLE not in name or table not in tables:
            continue
        sharded = isinstance(value, ShardedTensor)
        shards = [(s.tensor, s.metadata.shard_offsets) for s in value.local_shards()] if sharded else [(value, [0, 0])]
        for part, offsets in shards:
            mixed = int(np.random.SeedSequence([seed, numbers[table], *offsets]).generate_state(1)[0])
            part.normal_(std=TABLE_STD, generator=torch.Generator(part.device).manual_seed(mixed))
        _clear_padding(value, plan.tables[table].embedding_dim)
    model.load_state_dict(state)


def _starts_from(name: str, tables: Tables, dense: Dense) -> bool:
    """Whether an entry of the model's state is taken from the checkpoint."""
    if name.startswith(EMBEDDINGS):
        return tables == "ticket" or TABLE not in name
    return dense == "kept" and TRANSFORMS not in name


def _clear_padding(table: Tensor | ShardedTensor, dim: int) -> None:
    """Zeros the stored columns from `dim` on, of a whole table or this rank's shards: the embeddings' L2 would count them."""
    if isinstance(table, ShardedTensor):
        for part in table.local_shards():
            part.tensor[:, max(dim - part.metadata.shard_offsets[1], 0) :] = 0
    else:
        table[:, dim:] = 0


def kept_weight(weight: Tensor, name: str, over: OverArch, plan: DimensionPlan) -> Tensor:
    """What is left of a dense weight of the full model."""
    for pattern, axes in over.over_raw.items():
        if fnmatchcase(name, pattern):
            for axis in axes:
                weight = _over_kept_columns(weight.movedim(axis, -1), plan).movedim(-1, axis)
    if name in (others := over.kept_inputs(plan)):
        axis, positions = others[name]
        weight = weight.index_select(axis, torch.tensor(positions))
    return weight


def _over_kept_columns(weight: Tensor, plan: DimensionPlan) -> Tensor:
    """W [..., dense inputs, concatenation of all original fields] -> the same over what is kept of them.

    A rotated field e = R [t; mass·|μ|] leaves W R, over its coordinates and its mass (`Rotation.with_mean`).
    """
    dims = [table.original_dim for table in plan.tables.values()]
    dense, *fields = weight.split([weight.shape[-1] - sum(dims), *dims], dim=-1)
    parts = [dense]
    for (name, table), field in zip(plan.tables.items(), fields, strict=True):
        if name in plan.rotations:
            parts.append((field.double() @ plan.rotations[name].with_mean().double()).to(weight.dtype))
        else:
            parts.append(field[..., table.kept])
    return torch.cat(parts, dim=-1)
