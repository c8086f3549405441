"""Which entries of a checkpoint belong to which table of a plan, and what becomes of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch

from sseds_rec.errors import UserError
from sseds_rec.search.plan import DimensionPlan
from sseds_rec.search.rotation import Rotation
from sseds_rec.slim.columns import KeepColumns, Product, RowConversion, coordinates

#: What TorchRec calls the tables of an EmbeddingBagCollection and of an EmbeddingCollection in state dicts.
KINDS = ("embedding_bags", "embeddings")

#: A collection inside a module that processes or remaps its ids, and the maps beside it.
_INNER = {"_embedding_module", "_embedding_bag_collection", "_embedding_collection", "_managed_collision_collection"}
_ID_MAPS = "_managed_collision_modules"

#: What an optimizer keeps of each weight: running means of gradients, and sums or running means of their squares.
_MEANS = {"exp_avg", "momentum_buffer"}
_SQUARES = {"exp_avg_sq", "max_exp_avg_sq", "sum", "square_avg"}


def entries_by_table(names: Iterable[str], plan: DimensionPlan) -> dict[str, str]:
    """Entry -> table of the plan, for every entry at or below a table's weight, and of its map of raw ids."""
    modules: dict[str, list[str]] = {}  # table without path -> paths of the modules that have one, longest first
    for table in plan.tables:
        module, _, own = table.rpartition(".")
        modules.setdefault(own, []).append(module)
    for paths in modules.values():
        paths.sort(key=len, reverse=True)
    found: dict[str, str] = {}
    for name in names:
        parts = name.split(".")
        for at, (kind, own) in enumerate(pairwise(parts)):
            if own not in modules or not (kind == _ID_MAPS or (kind in KINDS and parts[at + 2 : at + 3] == ["weight"])):
                continue
            holder = parts[: at - 1] if at and parts[at - 1] in _INNER else parts[:at]
            path = f".{'.'.join(holder)}"
            # A collection at a.b.ebc may stand beside one at ebc.
            fitting = [module for module in modules[own] if not module or path.endswith(f".{module}")]
            if fitting:
                found[name] = f"{fitting[0]}.{own}" if fitting[0] else own
    return found


def conversions(
    src: Path,
    shapes: Mapping[str, Sequence[int]],
    plan: DimensionPlan,
    column_shards: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, RowConversion | None]:
    """Entry -> what becomes of its rows, None if its table is dropped; entries that are not here stay what they are.

    Args:
        src: the checkpoint, for errors.
        shapes: entry -> shape, of all tensors of the checkpoint.
        plan: which columns stay.
        column_shards: weight -> widths of the shards it was trained in, in the order of their columns; by default one of all.

    Raises:
        UserError: the plan is of another model (names the table), or a rotated table has optimizer state of which it is not
            known how it turns (names it).
    """
    entries = entries_by_table(shapes, plan)
    weights = _weights(entries, shapes, plan)
    found: dict[str, RowConversion | None] = {}
    for name, table in entries.items():
        own, shape = plan.tables[table], tuple(shapes[name])
        if not own.kept:
            found[name] = None
        elif shape == (own.rows, own.original_dim):
            rotation = plan.rotations.get(table)
            if rotation is not None:
                found[name] = _rotated(src, name, shapes, rotation, own.stored_dim)
            elif own.kept != list(range(own.stored_dim)) or own.stored_dim != own.original_dim:
                found[name] = KeepColumns(own.kept, own.stored_dim)
        elif len(shape) == 1:
            # The state's own path can begin otherwise than the weight's (optimizer.state. and model.).
            for widths in ((column_shards or {}).get(weight, []) for weight in weights[table]):
                if len(widths) > 1 and shape[0] == own.rows * len(widths):
                    # Row-wise Adagrad sums mean squares, of a shard's columns: their weighted mean is that of all columns.
                    found[name] = Product(torch.tensor(widths)[:, None] / sum(widths))
    return found


def _weights(
    entries: Mapping[str, str], shapes: Mapping[str, Sequence[int]], plan: DimensionPlan
) -> dict[str, list[str]]:
    """Table -> its weights."""
    weights: dict[str, list[str]] = {table: [] for table in plan.tables}
    for name, table in entries.items():
        if name.endswith(".weight"):
            weights[table].append(name)
    for table, own in plan.tables.items():
        if not weights[table]:
            raise UserError(f"table {table} of the plan is not in the checkpoint; the plan is of another model")
        expected = [own.rows, own.original_dim]
        for name in weights[table]:
            if list(shapes[name]) != expected:
                raise UserError(
                    f"table {table}: the checkpoint holds {list(shapes[name])}, the plan expects {expected}; "
                    "the plan is of another model"
                )
    return weights


def _rotated(
    src: Path, name: str, shapes: Mapping[str, Sequence[int]], rotation: Rotation, width: int
) -> RowConversion:
    """Rows v become Tᵀ(v - μ). Gradients in the coordinates are Mᵀg, so their running means are multiplied by Mᵀ, which is
    exact, and their running squares by (M∘M)ᵀ, which E[(Mᵀg)²] is if the entries of g are independent."""
    path, _, state = name.rpartition(".")
    if state == "momentum1":  # FBGEMM's first state, of any optimizer
        state = "exp_avg" if f"{path}.exp_avg_sq" in shapes else "sum"
    if state == "weight":
        return coordinates(rotation, width)
    if state in _MEANS:
        return Product(rotation.inverse, width=width)
    if state in _SQUARES:
        return Product(rotation.inverse.double().square(), width=width)
    raise UserError(
        f"{src}: {name}: the plan rotates its table, and how {state} turns is not known; save the checkpoint without it"
    )
