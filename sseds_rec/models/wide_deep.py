"""Wide & Deep (Cheng et al., DLRS 2016)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedTensor

from sseds_rec.models.fields import FieldEmbeddings
from sseds_rec.models.layers import join, mlp
from sseds_rec.models.registry import ModelConfig, OverArch, register


@register("wide_deep")
class WideDeep(OverArch):
    """z = wide (first order) + MLP over the raw concatenation; the bias is the wide part's.

    Wide weights are a linear read-out of the embeddings, as the first order of `DeepFM`, which says why. Crosses of fields
    are not made here: prepare them as fields of their own.

    Args:
        fields: the embedding side.
        num_dense: N, dense inputs.
        config: hidden widths, dropout, batch norm.
    """

    over_raw: ClassVar = {"wide.weight": (1,), "deep.0.weight": (1,)}

    def __init__(self, fields: FieldEmbeddings, num_dense: int, config: ModelConfig) -> None:
        super().__init__()
        self.fields = fields
        inputs = num_dense + fields.raw_dim
        self.wide = nn.Linear(inputs, 1)
        self.deep = mlp(inputs, config.hidden, config.dropout, config.batch_norm)
        self.output = nn.Linear(config.hidden[-1], 1, bias=False)

    def forward(self, dense: Tensor, embeddings: KeyedTensor) -> Tensor:
        """dense [B, N], embeddings over F fields -> logits [B]."""
        inputs = join(dense, self.fields.concatenate(embeddings))
        return (self.wide(inputs) + self.output(self.deep(inputs))).squeeze(1)
