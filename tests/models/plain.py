"""What models and scores are compared with: every model in plain PyTorch, sum by sum, and scores by explicit α."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sseds_rec.models.registry import OverArch


def plain_fm(model: OverArch, dense: Tensor, fields: dict[str, Tensor]) -> Tensor:
    """z = <w, x> + b + Σ_{i<j} <ē_i, ē_j>, x = [dense, e_1, ..., e_m]."""
    return _linear(model, "first_order", _joined(dense, fields)) + _pairs(_aligned(model, fields))


def plain_wide_deep(model: OverArch, dense: Tensor, fields: dict[str, Tensor]) -> Tensor:
    """z = <w, x> + b + MLP(x)."""
    x = _joined(dense, fields)
    return _linear(model, "wide", x) + _linear(model, "output", _mlp(model, "deep", x))


def plain_deepfm(model: OverArch, dense: Tensor, fields: dict[str, Tensor]) -> Tensor:
    """z = <w, x> + b + Σ_{i<j} <ē_i, ē_j> + MLP(x)."""
    return plain_fm(model, dense, fields) + _linear(model, "output", _mlp(model, "deep", _joined(dense, fields)))


def plain_dnn(model: OverArch, dense: Tensor, fields: dict[str, Tensor]) -> Tensor:
    """z = MLP(x)."""
    return _linear(model, "output", _mlp(model, "deep", _joined(dense, fields)))


def plain_dlrm(model: OverArch, dense: Tensor, fields: dict[str, Tensor]) -> Tensor:
    """z = MLP([v_0, <v_0, v_1>, <v_0, v_2>, ..., <v_{m-1}, v_m>]), v_0 the bottom MLP of the dense inputs, v_i = ē_i."""
    vectors, inputs = _aligned(model, fields), []
    if dense.shape[1]:
        inputs = [_mlp(model, "bottom", dense)]
        vectors = [*inputs, *vectors]
    inputs += [(a * b).sum(dim=1, keepdim=True) for a, b in itertools.combinations(vectors, 2)]
    return _linear(model, "output", _mlp(model, "top", torch.cat(inputs, dim=1)))


def plain_dcnv2(model: OverArch, dense: Tensor, fields: dict[str, Tensor]) -> Tensor:
    """x_{l+1} = x_0 * (W_l x_l + b_l) + x_l, W_l = U_l V_l or full; z = MLP(x_L)."""
    weights = dict(model.named_parameters())
    x = x_0 = _joined(dense, fields)
    for layer in range(sum(name.startswith("cross.") and name.endswith(".bias") for name in weights)):
        own = {n.removeprefix(f"cross.{layer}."): w for n, w in weights.items() if n.startswith(f"cross.{layer}.")}
        matrix = own["w.weight"] if "w.weight" in own else own["u.weight"] @ own["v.weight"]
        x = x_0 * (torch.einsum("ij,bj->bi", matrix, x) + own["w.bias" if "w.bias" in own else "u.bias"]) + x
    return _linear(model, "output", _mlp(model, "deep", x))


#: Registered name -> the same model in plain PyTorch: (over-arch with the weights, dense [B, N], field -> e_i [B, d_i]) -> [B].
PLAIN: dict[str, Callable[[OverArch, Tensor, dict[str, Tensor]], Tensor]] = {
    "fm": plain_fm,
    "wide_deep": plain_wide_deep,
    "deepfm": plain_deepfm,
    "dnn": plain_dnn,
    "dlrm": plain_dlrm,
    "dcnv2": plain_dcnv2,
}


def _joined(dense: Tensor, fields: dict[str, Tensor]) -> Tensor:
    return torch.cat([dense, *fields.values()], dim=1)


def _aligned(model: OverArch, fields: dict[str, Tensor]) -> list[Tensor]:
    """ē_i = M_i e_i, in a model without transforms e_i; tables have their fields' names, but for dots."""
    transforms = {n.rpartition(".")[2]: w for n, w in model.named_parameters() if ".transforms." in n}
    return [e @ transforms[name.replace(".", "_")].T if transforms else e for name, e in fields.items()]


def _pairs(vectors: list[Tensor]) -> Tensor:
    dots = [(a * b).sum(dim=1) for a, b in itertools.combinations(vectors, 2)]
    return sum(dots, torch.zeros_like(vectors[0][:, 0]))


def _linear(model: OverArch, layer: str, x: Tensor) -> Tensor:
    weights = dict(model.named_parameters())
    logits = (x * weights[f"{layer}.weight"]).sum(dim=1)
    return logits + weights[f"{layer}.bias"] if f"{layer}.bias" in weights else logits


def _mlp(model: OverArch, layers: str, x: Tensor) -> Tensor:
    """Linear layers with ReLU after each, in the order of their numbers; no batch norm, no dropout."""
    weights = dict(model.named_parameters())
    numbers = sorted(int(n.split(".")[1]) for n in weights if n.startswith(f"{layers}.") and n.endswith(".weight"))
    for number in numbers:
        x = (x @ weights[f"{layers}.{number}.weight"].T + weights[f"{layers}.{number}.bias"]).clamp(min=0)
    return x


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
