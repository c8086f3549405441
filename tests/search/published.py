"""TorchRec's own models, small, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.datasets.utils import Batch
from torchrec.models.deepfm import SimpleDeepFMNN
from torchrec.models.dlrm import DLRM, DLRM_DCN, DLRMTrain
from torchrec.modules.mlp import MLP

D, DENSE, COUNT = 8, 3, 24
#: Feature -> rows of its table.
FEATURES = {"user": 40, "page": 24, "site": 24, "hour": 12}
TABLES = {"t_user": ["user"], "t_place": ["page", "site"], "t_hour": ["hour"]}
TYPES = dict(zip(TABLES, ["row_wise", "column_wise", "data_parallel"], strict=True))


def make_tables(names: list[str], device: str) -> EmbeddingBagCollection:
    configs = [
        EmbeddingBagConfig(
            name=name, num_embeddings=FEATURES[TABLES[name][0]], embedding_dim=D, feature_names=list(TABLES[name])
        )
        for name in names
    ]
    return EmbeddingBagCollection(tables=configs, device=torch.device(device))


class TwoTower(nn.Module):
    """Users and places in one space (as in TorchRec's retrieval example, with a collection for each)."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.query, self.candidate = make_tables(["t_user", "t_hour"], device), make_tables(["t_place"], device)
        self.query_over, self.candidate_over = MLP(2 * D, [8, 4]), MLP(2 * D, [8, 4])

    def forward(self, batch: Batch) -> Tensor:
        query = self.query_over(self.query(batch.sparse_features).values())
        found = self.candidate(batch.sparse_features)
        candidate = self.candidate_over(torch.cat([found["page"], found["site"]], dim=1))
        return (query * candidate).sum(dim=1)


def build(name: str, device: str = "cpu") -> nn.Module:
    if name == "two_tower":
        return TwoTower(device)
    tables = make_tables(list(TABLES), device)
    if name == "deepfm":
        return SimpleDeepFMNN(DENSE, tables, hidden_layer_size=8, deep_fm_dimension=5)
    arguments = (tables, DENSE, [8, D], [8, 1])
    if name == "dcn":
        return DLRMTrain(DLRM_DCN(*arguments, dcn_num_layers=2, dcn_low_rank_dim=4))
    return DLRMTrain(DLRM(*arguments))


def logits_of(name: str, model: Any, batch: Batch) -> Tensor:
    if name == "two_tower":
        return model(batch)
    if name == "deepfm":
        return torch.logit(model(batch.dense_features, batch.sparse_features)).squeeze(1)
    return model.model(batch.dense_features, batch.sparse_features).squeeze(1)


#: What the model needs beside its forward to be scored.
LOSSES: dict[str, Callable[[nn.Module, Any], Tensor] | None] = {
    "dlrm": None,
    "dcn": None,
    "deepfm": lambda model, batch: F.binary_cross_entropy(
        model(batch.dense_features, batch.sparse_features).squeeze(1), batch.labels
    ),
    "two_tower": lambda model, batch: F.binary_cross_entropy_with_logits(model(batch), batch.labels),
}


def make_batch(first: int = 0, last: int = COUNT) -> Batch:
    random = torch.Generator().manual_seed(2)
    lengths = torch.randint(0, 4, (len(FEATURES), COUNT), generator=random)
    bags = [
        [torch.randint(0, rows, (int(n),), generator=random) for n in own]
        for rows, own in zip(FEATURES.values(), lengths, strict=True)
    ]
    features = KeyedJaggedTensor(
        keys=list(FEATURES),
        values=torch.cat([ids for own in bags for ids in own[first:last]]),
        lengths=lengths[:, first:last].flatten().int(),
    )
    dense = torch.randn(COUNT, DENSE, generator=random)[first:last]
    labels = (torch.rand(COUNT, generator=random) > 0.5).float()[first:last]
    return Batch(dense_features=dense, sparse_features=features, labels=labels)


def weights_of(name: str) -> dict[str, Tensor]:
    torch.manual_seed(4)
    return {n: value.detach().clone() for n, value in build(name).state_dict().items()}
