"""What models and scores are compared with: DeepFM in plain PyTorch, pair by pair, and scores by explicit α."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sseds_rec.models.deepfm import DeepFM


def plain_deepfm(model: DeepFM, dense: Tensor, fields: dict[str, Tensor]) -> Tensor:
    """z = <w, x> + b + Σ_{i<j} <ē_i, ē_j> + MLP(x), x = [dense, e_1, ..., e_m], pair by pair."""
    weights = dict(model.named_parameters())
    x = torch.cat([dense, *fields.values()], dim=1)
    linear = (x * weights["first_order.weight"]).sum(dim=1) + weights["first_order.bias"]
    aligned = [
        e if model.fields.alignment is None else e @ model.fields.alignment.transforms[name].T
        for name, e in fields.items()
    ]
    pairs = sum((a * b).sum(dim=1) for a, b in itertools.combinations(aligned, 2))
    hidden = F.relu(x @ weights["deep.0.weight"].T + weights["deep.0.bias"])
    hidden = F.relu(hidden @ weights["deep.2.weight"].T + weights["deep.2.bias"])
    return linear + pairs + (hidden @ weights["output.weight"].T).squeeze(1)


def explicit_scores(logits: Tensor, labels: Tensor, alpha: dict[str, Tensor], criterion: str) -> dict[str, Tensor]:
    """Field -> scores [D], all of which sum to 1, from logits [B] that hang on α [D] of each field, sample by sample for ggn."""
    if criterion == "snip":
        loss = F.binary_cross_entropy_with_logits(logits, labels)
        raw = [g.abs() for g in torch.autograd.grad(loss, list(alpha.values()), retain_graph=True)]
    else:
        own = [torch.autograd.grad(z, list(alpha.values()), retain_graph=True) for z in logits]
        p = logits.sigmoid().detach()
        raw = [
            torch.stack([p[b] * (1 - p[b]) * own[b][t].square() for b in range(len(p))]).sum(dim=0)
            for t in range(len(alpha))
        ]
    total = sum(float(values.sum()) for values in raw)
    return {name: values / total for name, values in zip(alpha, raw, strict=True)}


def fill_tables(model: nn.Module, tables: dict[str, Tensor]) -> None:
    """Gives this rank's parts of a sharded model's tables [n, D] their values; a data-parallel one is whole on every rank."""
    for name, value in model.state_dict().items():
        if not name.startswith("embeddings."):
            continue
        table = tables[name.split(".")[-2]]
        for part in value.local_shards() if hasattr(value, "local_shards") else []:
            (row, column), (rows, columns) = part.metadata.shard_offsets, part.metadata.shard_sizes
            part.tensor.copy_(table[row : row + rows, column : column + columns])
        if not hasattr(value, "local_shards"):
            value.copy_(table)
