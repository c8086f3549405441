"""DeepFM in plain PyTorch, pair by pair."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

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
