"""A small click model on TorchRec, and the same model in plain PyTorch with an explicit α: the reference for scores."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

#: Table -> (rows, columns, features); t2 serves two features.
TABLES = {"t0": (50, 8, ["f0"]), "t1": (70, 16, ["f1"]), "t2": (30, 8, ["f2", "f3"])}
FEATURES = ["f0", "f1", "f2", "f3"]
WIDTHS = {feature: columns for _, columns, features in TABLES.values() for feature in features}


class ClickModel(nn.Module):
    """(KJT, labels) -> (loss, logits), as a TorchRec training module."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.ebc = EmbeddingBagCollection(
            device=torch.device(device),
            tables=[
                EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=columns, feature_names=features)
                for name, (rows, columns, features) in TABLES.items()
            ],
        )
        self.over = nn.Sequential(nn.Linear(sum(WIDTHS.values()), 12), nn.Tanh(), nn.Dropout(0.5), nn.Linear(12, 1))

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        features, labels = batch
        pooled = self.ebc(features)
        logits = self.over(torch.cat([pooled[feature] for feature in FEATURES], dim=1)).squeeze(1)
        return F.binary_cross_entropy_with_logits(logits, labels), logits.detach()


def make_rows(count: int, seed: int) -> tuple[list[list[list[int]]], Tensor]:
    """Ids [row][feature] (none to three each), and labels [count]."""
    generator = torch.Generator().manual_seed(seed)
    rows_of = {feature: rows for rows, _, features in TABLES.values() for feature in features}
    ids = []
    for _ in range(count):
        lengths = torch.randint(0, 4, (len(FEATURES),), generator=generator).tolist()
        ids.append(
            [
                torch.randint(0, rows_of[f], (n,), generator=generator).tolist()
                for f, n in zip(FEATURES, lengths, strict=True)
            ]
        )
    return ids, (torch.rand(count, generator=generator) > 0.6).float()


def make_batch(rows: tuple[list[list[list[int]]], Tensor], first: int, last: int) -> tuple[KeyedJaggedTensor, Tensor]:
    """Rows [first, last) as the model takes them."""
    ids, labels = rows
    by_feature = [[row[index] for row in ids[first:last]] for index in range(len(FEATURES))]
    values = torch.tensor([value for bags in by_feature for bag in bags for value in bag], dtype=torch.int64)
    lengths = torch.tensor([len(bag) for bags in by_feature for bag in bags], dtype=torch.int32)
    return KeyedJaggedTensor(keys=FEATURES, values=values, lengths=lengths), labels[first:last]


def explicit_alpha(
    weights: dict[str, Tensor], rows: tuple[list[list[list[int]]], Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Per criterion, unnormalised scores by autograd in an α that multiplies the table's columns, in float64.

    Args:
        weights: the model's state dict.
        rows: all rows, of all ranks and batches.
    """
    tables = {name: weights[f"ebc.embedding_bags.{name}.weight"].double() for name in TABLES}
    alpha = {
        name: torch.ones(table.shape[1], dtype=torch.float64, requires_grad=True) for name, table in tables.items()
    }
    dense = {name: weight.double() for name, weight in weights.items() if name.startswith("over.")}

    def logit(row: list[list[int]]) -> Tensor:
        parts = []
        for feature, bag in zip(FEATURES, row, strict=True):
            name = next(table for table, (_, _, features) in TABLES.items() if feature in features)
            parts.append((tables[name][bag] * alpha[name]).sum(dim=0))
        hidden = torch.tanh(dense["over.0.weight"] @ torch.cat(parts) + dense["over.0.bias"])
        return (dense["over.3.weight"] @ hidden + dense["over.3.bias"]).squeeze()

    logits = torch.stack([logit(row) for row in rows[0]])
    loss = F.binary_cross_entropy_with_logits(logits, rows[1].double())
    gradient = torch.autograd.grad(loss, list(alpha.values()), retain_graph=True)
    ggn = [torch.zeros_like(g) for g in gradient]
    for z in logits:
        p = torch.sigmoid(z.detach())
        own = torch.autograd.grad(z, list(alpha.values()), retain_graph=True)
        ggn = [total + p * (1 - p) * g.square() / len(logits) for total, g in zip(ggn, own, strict=True)]
    return {
        "snip": dict(zip(alpha, [g.abs() for g in gradient], strict=True)),
        "ggn": dict(zip(alpha, ggn, strict=True)),
    }
