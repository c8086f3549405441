"""Full models that become slim ones on several ranks: from shard to shard, and through a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultLoadPlanner
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

import sseds_rec as sr
from sseds_rec.distributed.tables import embedding_modules
from sseds_rec.search.plan import TablePlan
from sseds_rec.search.tap import plan_tables

Make = Callable[[nn.Module], DistributedModelParallel]


def plan_keeping(model: nn.Module, kept: Mapping[str, Sequence[int]]) -> sr.DimensionPlan:
    """A plan of a model's tables, as they are named in scores."""
    tables = {
        name: TablePlan(
            rows=own.rows,
            original_dim=own.dim,
            kept=list(kept[name]),
            embedding_dim=len(kept[name]),
            stored_dim=-(-len(kept[name]) // 4) * 4,
            feature_names=list(own.feature_names),
        )
        for name, own in plan_tables(embedding_modules(model)).items()
    }
    return sr.DimensionPlan(tables=tables, budget={}, reached={})


def mask(model: nn.Module, kept: Mapping[str, Sequence[int]]) -> None:
    """Sets the dropped columns of an unsharded model to zero; table names are without path."""
    for module in model.modules():
        if isinstance(module, (EmbeddingBagCollection, EmbeddingCollection)):
            tables = module.embedding_bags if isinstance(module, EmbeddingBagCollection) else module.embeddings
            for name, table in tables.items():
                dropped = [c for c in range(table.weight.shape[1]) if c not in kept[name]]
                table.weight.data[:, dropped] = 0


def save(model: DistributedModelParallel, folder: str) -> None:
    """As a job saves its weights and optimizers; all ranks call it."""
    dcp.save({"model": model.state_dict(), "optimizer": model.fused_optimizer.state_dict()}, checkpoint_id=folder)


def load(model: DistributedModelParallel, folder: str) -> None:
    """As a slim job loads them: transform matrices are not in the checkpoint, optimizer states are."""
    state = {"model": model.state_dict(), "optimizer": model.fused_optimizer.state_dict()}
    dcp.load(state, checkpoint_id=folder, planner=DefaultLoadPlanner(allow_partial_load=True))
    model.load_state_dict(state["model"])
    model.fused_optimizer.load_state_dict(state["optimizer"])


def convert(folder: str, plan: sr.DimensionPlan) -> str:
    """Slims a checkpoint on rank 0; all ranks call it."""
    slim = f"{folder}-slim"
    if dist.get_rank() == 0:
        sr.slim_checkpoint(folder, slim, plan)
    dist.barrier()
    return slim


def train(model: DistributedModelParallel, loss_of: Callable[[], Tensor], steps: int = 3) -> list[float]:
    """Losses of some steps of SGD on the dense part, and of what tables were given."""
    dense = [p for name, p in model.named_parameters() if ".embedding_bags." not in name and ".embeddings." not in name]
    optimizer = torch.optim.SGD(dense, lr=0.05)
    model.eval()  # no dropout, so that losses fall
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def shards(state: Mapping[str, Any]) -> Iterable[tuple[str, Tensor]]:
    """What this rank holds of a state dict, by names that say which part it is."""
    for name, value in state.items():
        if hasattr(value, "local_shards"):
            for part in value.local_shards():
                yield f"{name}{list(part.metadata.shard_offsets)}", part.tensor
        else:
            yield name, value


def folder_in(path: Path, name: str) -> str:
    return str(path / name)
