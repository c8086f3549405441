"""DLRM (Naumov et al., Deep Learning Recommendation Model for Personalization and Recommendation Systems, 2019)."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedTensor

from sseds_rec.errors import UserError
from sseds_rec.models.fields import FieldEmbeddings
from sseds_rec.models.layers import mlp, pair_dots
from sseds_rec.models.registry import ModelConfig, OverArch, register
from sseds_rec.search.plan import DimensionPlan


@register("dlrm")
class DLRM(OverArch):
    """z = linear output of the top MLP over [dense vector, dots of all pairs of vectors].

    The vectors are the bottom MLP's output of the dense inputs, if there are any, and the aligned embeddings.

    Args:
        fields: the embedding side.
        num_dense: N, dense inputs.
        config: widths of the bottom and top MLP, dropout, batch norm.

    Raises:
        UserError: there is one field and no dense input, hence no pair.
    """

    aligns = True

    def __init__(self, fields: FieldEmbeddings, num_dense: int, config: ModelConfig) -> None:
        super().__init__()
        self.fields = fields
        vectors = bool(num_dense) + len(fields.names)
        if vectors < 2:
            raise UserError(
                f"model.name=dlrm: field {fields.names[0]} is alone, so that there is no pair to multiply; keep more fields "
                "(search.min_dim) or choose another model"
            )
        self.bottom: nn.Module | None = None
        if num_dense:
            widths = [*config.bottom_hidden, fields.aligned_dim]
            self.bottom = mlp(num_dense, widths, config.dropout, config.batch_norm)
        inputs = bool(num_dense) * fields.aligned_dim + vectors * (vectors - 1) // 2
        self.top = mlp(inputs, config.hidden, config.dropout, config.batch_norm)
        self.output = nn.Linear(config.hidden[-1], 1)

    def forward(self, dense: Tensor, embeddings: KeyedTensor) -> Tensor:
        """dense [B, N], embeddings over F fields -> logits [B]."""
        vectors = self.fields.align(self.fields.concatenate(embeddings))
        inputs: list[Tensor] = []
        if self.bottom is not None:
            inputs.append(self.bottom(dense))
            vectors = torch.cat([inputs[0].unsqueeze(1), vectors], dim=1)
        inputs.append(pair_dots(vectors))
        return self.output(self.top(torch.cat(inputs, dim=1))).squeeze(1)

    def kept_inputs(self, plan: DimensionPlan) -> dict[str, tuple[int, list[int]]]:
        """Of the top MLP's inputs: the whole dense vector, and the pairs of vectors that are both still there."""
        tables = list(plan.tables.values())
        has_dense = self.bottom is not None
        width = tables[0].original_dim if has_dense else 0
        there = [True] * has_dense + [bool(own.kept) or name in plan.rotations for name, own in plan.tables.items()]
        pairs = enumerate(combinations(there, 2))
        return {"top.0.weight": (1, [*range(width), *(width + n for n, (a, b) in pairs if a and b)])}
