"""A plain deep network over the embeddings."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedTensor

from sseds_rec.models.fields import FieldEmbeddings
from sseds_rec.models.layers import join, mlp
from sseds_rec.models.registry import ModelConfig, OverArch, register


@register("dnn")
class DNN(OverArch):
    """z = linear output of an MLP over the raw concatenation.

    Args:
        fields: the embedding side.
        num_dense: N, dense inputs.
        config: hidden widths, dropout, batch norm.
    """

    over_raw: ClassVar = {"deep.0.weight": (1,)}

    def __init__(self, fields: FieldEmbeddings, num_dense: int, config: ModelConfig) -> None:
        super().__init__()
        self.fields = fields
        self.deep = mlp(num_dense + fields.raw_dim, config.hidden, config.dropout, config.batch_norm)
        self.output = nn.Linear(config.hidden[-1], 1)

    def forward(self, dense: Tensor, embeddings: KeyedTensor) -> Tensor:
        """dense [B, N], embeddings over F fields -> logits [B]."""
        inputs = join(dense, self.fields.concatenate(embeddings))
        return self.output(self.deep(inputs)).squeeze(1)
