"""DCN V2 (Wang et al., WWW 2021), stacked: a cross network, then an MLP, as in MLPerf's recommendation benchmark."""

from __future__ import annotations

from collections import OrderedDict
from typing import ClassVar

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedTensor

from sseds_rec.models.fields import FieldEmbeddings
from sseds_rec.models.layers import join, mlp
from sseds_rec.models.registry import ModelConfig, OverArch, register


@register("dcnv2")
class DCNv2(OverArch):
    """z = linear output of an MLP over x_L; x_{l+1} = x_0 * (W_l x_l + b_l) + x_l, x_0 = [dense inputs, raw concatenation].

    An input that is zero in x_0 is zero in every x_l and adds nothing to the others, so a masked column can be cut from both
    sides of every W_l. Hence the cross network needs no common width: slim models have no transform matrices. But a product of
    two columns is none of two coordinates, so that tables cannot be rotated.

    Args:
        fields: the embedding side.
        num_dense: N, dense inputs.
        config: cross layers and their rank, hidden widths, dropout, batch norm.
    """

    rotates = False
    over_raw: ClassVar = {
        "cross.*.v.weight": (1,),
        "cross.*.u.weight": (0,),
        "cross.*.w.weight": (0, 1),
        "cross.*.bias": (0,),
        "deep.0.weight": (1,),
    }

    def __init__(self, fields: FieldEmbeddings, num_dense: int, config: ModelConfig) -> None:
        super().__init__()
        self.fields = fields
        inputs = num_dense + fields.raw_dim
        self.cross = nn.ModuleList(_cross_weight(inputs, config.cross_rank) for _ in range(config.cross_layers))
        self.deep = mlp(inputs, config.hidden, config.dropout, config.batch_norm)
        self.output = nn.Linear(config.hidden[-1], 1)

    def forward(self, dense: Tensor, embeddings: KeyedTensor) -> Tensor:
        """dense [B, N], embeddings over F fields -> logits [B]."""
        first = crossed = join(dense, self.fields.concatenate(embeddings))
        for weight in self.cross:
            crossed = torch.addcmul(crossed, first, weight(crossed))
        return self.output(self.deep(crossed)).squeeze(1)


def _cross_weight(inputs: int, rank: int | None) -> nn.Module:
    """x -> W x + b, with W = U V of a rank (Eq. 2) or full; started as TorchRec's cross networks are."""
    if rank is None:
        weight = nn.Sequential(OrderedDict(w=nn.Linear(inputs, inputs)))
    else:
        weight = nn.Sequential(OrderedDict(v=nn.Linear(inputs, rank, bias=False), u=nn.Linear(rank, inputs)))
    for name, parameter in weight.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.xavier_normal_(parameter)
    return weight
