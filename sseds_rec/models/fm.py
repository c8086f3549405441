"""FM (Rendle, Factorization Machines, ICDM 2010)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedTensor

from sseds_rec.models.fields import FieldEmbeddings
from sseds_rec.models.registry import ModelConfig, OverArch, register


@register("fm")
class FM(OverArch):
    """z = bias + first order + Σ_{i<j} <ē_i, ē_j> over aligned embeddings; dense inputs have a first order only.

    First-order weights are a linear read-out of the embeddings, as in `DeepFM`, which says why.

    Args:
        fields: the embedding side.
        num_dense: N, dense inputs.
        config: not read: the model has no hidden layers.
    """

    aligns = True
    over_raw: ClassVar = {"first_order.weight": (1,)}

    def __init__(self, fields: FieldEmbeddings, num_dense: int, config: ModelConfig) -> None:
        super().__init__()
        self.fields = fields
        self.first_order = nn.Linear(num_dense + fields.raw_dim, 1)

    def forward(self, dense: Tensor, embeddings: KeyedTensor) -> Tensor:
        """dense [B, N], embeddings over F fields -> logits [B]."""
        raw = self.fields.concatenate(embeddings)
        return self.fields.fm(dense, raw, self.first_order)
