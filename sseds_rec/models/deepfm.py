"""DeepFM (Guo et al., IJCAI 2017): first-order, FM and deep parts over one set of embeddings."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedTensor

from sseds_rec.models.fields import FieldEmbeddings
from sseds_rec.models.layers import join, mlp
from sseds_rec.models.registry import ModelConfig, OverArch, register


@register("deepfm")
class DeepFM(OverArch):
    """z = first order + FM over aligned embeddings + MLP over the raw concatenation; the bias is the first order's.

    The first-order weight of id x in field i is <u_i, e_ix>, a linear read-out of its embedding (the field-wise linear
    vectors of Pan et al., Field-weighted Factorization Machines, WWW 2018), and not a table of its own: FBGEMM has no
    width-1 tables, and a width-4 table for one weight would quadruple it. So first-order weights shrink with the tables,
    and are counted with the dense parameters.

    Args:
        fields: the embedding side.
        num_dense: N, dense inputs.
        config: hidden widths, dropout, batch norm.
    """

    aligns = True
    over_raw: ClassVar = {"first_order.weight": (1,), "deep.0.weight": (1,)}

    def __init__(self, fields: FieldEmbeddings, num_dense: int, config: ModelConfig) -> None:
        super().__init__()
        self.fields = fields
        inputs = num_dense + fields.raw_dim
        self.first_order = nn.Linear(inputs, 1)
        self.deep = mlp(inputs, config.hidden, config.dropout, config.batch_norm)
        self.output = nn.Linear(config.hidden[-1], 1, bias=False)

    def forward(self, dense: Tensor, embeddings: KeyedTensor) -> Tensor:
        """dense [B, N], embeddings over F fields -> logits [B]."""
        raw = self.fields.concatenate(embeddings)
        deep = self.output(self.deep(join(dense, raw))).squeeze(1)
        return self.fields.fm(dense, raw, self.first_order) + deep
