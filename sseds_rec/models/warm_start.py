"""A slim model of a new plan that starts from models in memory: as the trained slim one of an old plan, or as a ticket."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from sseds_rec.models.ticket import EMBEDDINGS, TABLE, TRANSFORMS, kept_weight
from sseds_rec.search.plan import DimensionPlan
from sseds_rec.search.rotation import Rotation
from sseds_rec.slim.columns import Product, row_conversion
from sseds_rec.slim.transfer import transfer


@torch.no_grad()
def warm_start(
    new: DistributedModelParallel,
    plan: DimensionPlan,
    old: DistributedModelParallel,
    old_plan: DimensionPlan,
    full: DistributedModelParallel,
    is_trained: bool = True,
) -> None:
    """Fills a sharded slim model: every weight is the winning ticket's, plus what the old model has learned since its own.

    With w(plan) the weight that `load_ticket` would take from the full model for a plan, it becomes
    w(plan) + L(w_old - w(old_plan)), where L carries coordinates of the old plan to those of the new. For an embedding e of the
    full model and the old coordinates t it says: ê = M t + μ stands for what the old model knows, e - MTᵀ(e - μ) - μ for what
    it has not, and their sum is cut by the new plan. So columns that both plans keep stay as they are, columns that return are
    the full model's, as are the weights that read them, and if the plan has not changed the new model is the old one.

    All ranks call it.

    Args:
        new: `CtrModel` with select transforms, sharded; as its plan makes it.
        plan: of `new`, its tables in the order of the full model's fields (`plan_for`).
        old: `CtrModel` of the old plan, sharded in any way.
        old_plan: of `old`.
        full: where columns that return come from.
        is_trained: whether `full` is a trained model. A new one's rows lie about 0, and are put about the old mean.
    """
    bases = {name: (_basis(old_plan, name), _basis(plan, name)) for name in plan.tables}
    _warm_tables(new, old, full, bases, is_trained)
    state, was, whole = new.state_dict(), old.state_dict(), full.state_dict()
    lifts = {name: _lift(*pair) for name, pair in bases.items()}
    for name, value in state.items():
        if name.startswith(EMBEDDINGS):
            continue
        if TRANSFORMS in name:
            if name in was:
                table = name.rsplit(".", 1)[1]
                before, _ = bases[table]
                value.add_(((_exact(was[name]) - before.start()) @ lifts[table]).to(value.device))
            continue
        inner = name.removeprefix("over.")
        tickets = [kept_weight(_exact(whole[name]), inner, new.module.over, own) for own in (plan, old_plan)]
        change = _exact(was[name]) - tickets[1]
        for pattern, axes in new.module.over.over_raw.items():
            if fnmatchcase(inner, pattern):
                for axis in axes:
                    change = _carried(change.movedim(axis, -1), list(lifts.values())).movedim(-1, axis)
        if inner in (others := new.module.over.kept_inputs(plan)):
            axis, positions = others[inner]
            _, earlier = new.module.over.kept_inputs(old_plan)[inner]
            moves = torch.tensor(earlier)[:, None] == torch.tensor(positions)
            change = (change.movedim(axis, -1) @ moves.double()).movedim(-1, axis)
        value.copy_(tickets[0] + change)
    new.load_state_dict(state)


@torch.no_grad()
def live_ticket(new: DistributedModelParallel, plan: DimensionPlan, full: DistributedModelParallel) -> None:
    """Fills a sharded slim model with what the plan leaves of a full one, as `load_ticket` does from a checkpoint.

    Args:
        new: `CtrModel` with select transforms, sharded; as its plan makes it.
        plan: of `new`, its tables in the order of the full model's fields (`plan_for`).
        full: sharded in any way. All ranks call it.
    """
    state, whole = new.state_dict(), full.state_dict()
    tables = {name: table for name, table in state.items() if TABLE in name}
    names = {name: name.split(".")[-2] for name in tables}
    rows = {name: row_conversion(plan.tables[own], plan.rotations.get(own)) for name, own in names.items()}
    transfer(whole, tables, rows, new._env.process_group, new.device)
    for name, value in state.items():
        if not name.startswith(EMBEDDINGS) and TRANSFORMS not in name:
            value.copy_(kept_weight(_exact(whole[name]), name.removeprefix("over."), new.module.over, plan))
    new.load_state_dict(state)


@dataclass(frozen=True)
class _Basis:
    """How a plan cuts a table: coordinates t = Tᵀ(e - μ), e ≈ M t + mass·μ.

    Attributes:
        rotation: T, M [D, d] and μ [D], in float64; rows of the identity and 0 where the table is not rotated.
        has_mass: whether the mass is a coordinate.
        reader: R [D, d] with Rᵀ M = I: what finds t in M t. It is T, but for the scale that a plan gives a table
            (`sseds_rec.rescale`), which the trained model has in its tables already.
    """

    rotation: Rotation
    has_mass: bool
    reader: Tensor

    def start(self) -> Tensor:
        """The transform matrix as the plan has it, [D, d] or with the mass [D, d + 1]."""
        return self.rotation.with_mean() if self.has_mass else self.rotation.inverse


def _basis(plan: DimensionPlan, table: str) -> _Basis:
    if (own := plan.rotations.get(table)) is not None:
        forward, inverse = own.forward.double(), own.inverse.double()
        return _Basis(Rotation(forward, inverse, own.mean.double()), True, forward / (forward * inverse).sum(dim=0))
    dim = plan.tables[table].original_dim
    columns = torch.eye(dim, dtype=torch.float64)[:, plan.tables[table].kept]
    return _Basis(Rotation(columns, columns, columns.new_zeros(dim)), False, columns)


def _lift(old: _Basis, new: _Basis) -> Tensor:
    """L: weights over old coordinates (and mass) times it are weights over the new ones (and mass).

    A mean of the old plan that the new one has no coordinate for, since it does not rotate the table, is cut with the rest.
    """
    before, after = old.rotation, new.rotation
    lift = torch.zeros(before.forward.shape[1] + old.has_mass, after.forward.shape[1] + new.has_mass).double()
    d, width = before.forward.shape[1], after.forward.shape[1]
    lift[:d, :width] = old.reader.T @ after.inverse
    if new.has_mass:
        lift[:d, -1] = old.reader.T @ (after.mean - before.mean) / after.mean_length
    if old.has_mass and new.has_mass:
        lift[-1, -1] = before.mean_length / after.mean_length
    return lift


def _carried(weight: Tensor, lifts: list[Tensor]) -> Tensor:
    """Weights [..., dense inputs, old coordinates of all fields] -> the same over the new ones."""
    widths = [len(lift) for lift in lifts]
    dense, *fields = weight.split([weight.shape[-1] - sum(widths), *widths], dim=-1)
    return torch.cat([dense, *(field @ lift for field, lift in zip(fields, lifts, strict=True))], dim=-1)


def _warm_tables(
    new: DistributedModelParallel,
    old: DistributedModelParallel,
    full: DistributedModelParallel,
    bases: dict[str, tuple[_Basis, _Basis]],
    is_trained: bool,
) -> None:
    """Rows Tₙᵀ(e - μₙ) + RₙᵀM (t - Tᵀ(e - μ)), from those of the old model t and of the full one e."""
    state, group = new.state_dict(), new._env.process_group
    of_old, of_full = {}, {}
    for name in (name for name in state if TABLE in name):
        old_basis, new_basis = bases[name.split(".")[-2]]
        before, after = old_basis.rotation, new_basis.rotation
        width = state[name].size()[1]
        carried = before.inverse.T @ new_basis.reader  # [d, d_new]
        returning = after.forward - before.forward @ carried  # [D, d_new]
        constant = -after.mean @ after.forward
        constant = constant + (before.mean @ before.forward @ carried if is_trained else before.mean @ after.forward)
        of_old[name] = Product(carried, width=width)
        of_full[name] = Product(returning, constant, width)
    tables = {name: state[name] for name in of_full}
    transfer(full.state_dict(), tables, of_full, group, new.device)
    from_full = {name: [part.clone() for part in _local(table)] for name, table in tables.items()}
    both = {name: table for name, table in tables.items() if name in old.state_dict()}
    transfer(old.state_dict(), both, of_old, group, new.device)
    for name, table in both.items():
        for part, other in zip(_local(table), from_full[name], strict=True):
            part.add_(other)


def _exact(weight: Tensor) -> Tensor:
    """In float64, on the CPU, where the plans' rotations are."""
    return weight.double().cpu()


def _local(table: Tensor | ShardedTensor) -> list[Tensor]:
    """What this rank has of a table."""
    return [shard.tensor for shard in table.local_shards()] if isinstance(table, ShardedTensor) else [table]
