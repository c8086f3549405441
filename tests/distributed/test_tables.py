"""Which embedding modules of a model are searched, under which names, and which are refused with what to do instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fbgemm_gpu.tbe.ssd import SSDTableBatchedEmbeddingBags
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.distributed.embedding_tower_sharding import ShardedEmbeddingTower
from torchrec.distributed.embeddingbag import ShardedEmbeddingBag
from torchrec.distributed.itep_embeddingbag import ShardedITEPEmbeddingBagCollection
from torchrec.distributed.quant_embeddingbag import ShardedQuantEmbeddingBagCollection
from torchrec.inference.modules import quantize_embeddings
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface
from torchrec.modules.embedding_tower import EmbeddingTower
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection, FusedEmbeddingCollection
from torchrec.modules.itep_embedding_modules import ITEPEmbeddingBagCollection, ITEPEmbeddingCollection
from torchrec.modules.itep_modules import GenericITEPModule
from torchrec.modules.pec_embedding_modules import PECEmbeddingCollection
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

import sseds_rec as sr
from sseds_rec.constants import stored_dim
from sseds_rec.distributed.tables import embedding_modules, training_kernels
from tests.ranks import run_ranks
from tests.search.placed import shard
from tests.search.zoo import TABLES, Case, build, make_batch

CPU = torch.device("cpu")
ROWS = {"t": 8}


def _bags() -> EmbeddingBagCollection:
    return EmbeddingBagCollection(
        tables=[EmbeddingBagConfig(name="t", num_embeddings=8, embedding_dim=4, feature_names=["f"])], device=CPU
    )


def _sequences() -> EmbeddingCollection:
    return EmbeddingCollection(
        tables=[EmbeddingConfig(name="t", num_embeddings=8, embedding_dim=4, feature_names=["f"])], device=CPU
    )


class _Own(EmbeddingBagCollectionInterface):
    """A collection that somebody wrote."""

    def forward(self, features: KeyedJaggedTensor) -> Any: ...

    def embedding_bag_configs(self) -> Any: ...

    def is_weighted(self) -> bool: ...


def _bare(kind: type[nn.Module]) -> nn.Module:
    """A module that only CUDA or several machines could really make."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    return module


MADE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "quantized": (
        lambda: quantize_embeddings(nn.ModuleList([_bags()]), torch.qint8, inplace=False)[0],
        "EmbeddingBagCollection cannot be searched: it is quantized, for inference; take the model it was made from",
    ),
    "sharded quantized": (lambda: _bare(ShardedQuantEmbeddingBagCollection), "it is quantized"),
    "pruned rows": (
        lambda: ITEPEmbeddingBagCollection(_bags(), GenericITEPModule(ROWS, enable_pruning=False)),
        "ITEPEmbeddingBagCollection cannot be searched: it prunes rows by the forward passes it counts",
    ),
    "pruned rows of sequences": (
        lambda: ITEPEmbeddingCollection(_sequences(), GenericITEPModule(ROWS, enable_pruning=False)),
        "ITEPEmbeddingCollection cannot be searched",
    ),
    "sharded pruned rows": (lambda: _bare(ShardedITEPEmbeddingBagCollection), "it prunes rows"),
    "sharded tower": (
        lambda: _bare(ShardedEmbeddingTower),
        "its embeddings never leave the tower's ranks; take the model before sharding",
    ),
    "fused": (
        lambda: FusedEmbeddingBagCollection(_bags().embedding_bag_configs(), RowWiseAdagrad, {"lr": 0.1}, device=CPU),
        "FusedEmbeddingBagCollection cannot be searched: unsharded, its kernels count steps that cannot be undone",
    ),
    "fused sequences": (
        lambda: FusedEmbeddingCollection(
            _sequences().embedding_configs(), RowWiseAdagrad, {"lr": 0.1}, device=torch.device("meta")
        ),
        "FusedEmbeddingCollection cannot be searched",
    ),
    "overlapping batches": (lambda: PECEmbeddingCollection(_sequences()), "it compares consecutive batches"),
    "sharded nn.EmbeddingBag": (lambda: _bare(ShardedEmbeddingBag), "use an EmbeddingBagCollection"),
    "somebody's own": (
        _Own,
        "_Own cannot be searched: only EmbeddingBagCollection, EmbeddingCollection and TorchRec's",
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_what_cannot_be_searched_is_refused_by_path_and_type(name: str) -> None:
    make, message = MADE[name]
    model = nn.ModuleDict({"plain": _bags(), "inner": nn.ModuleDict({"odd": make()})})
    with pytest.raises(sr.UserError, match=f"^inner.odd: .*{message}"):
        sr.score_dimensions(model, [])


def test_models_without_a_collection_are_refused() -> None:
    model = nn.ModuleList([nn.EmbeddingBag(8, 4), nn.Embedding(8, 4)])
    with pytest.raises(
        sr.UserError, match="ModuleList holds no EmbeddingBagCollection: there is nothing to be searched"
    ):
        sr.score_dimensions(model, [])


def test_an_unsharded_tower_is_its_collection() -> None:
    assert list(embedding_modules(EmbeddingTower(_bags(), nn.Identity()))) == ["embedding"]


def _refused_on_rank(rank: int, world_size: int) -> tuple[str, str, str]:
    model = shard(build(Case(), "meta"), dict.fromkeys(TABLES, "table_wise"))
    paths = list(embedding_modules(model))
    (kernel, *_) = training_kernels(model)
    kernel.timesteps_prefetched.append(1)
    with pytest.raises(sr.UserError) as prefetched:
        sr.score_dimensions(model, [make_batch(Case())])
    kernel.timesteps_prefetched.clear()
    kernel.add_module("ssd", _bare(SSDTableBatchedEmbeddingBags))
    with pytest.raises(sr.UserError) as stored:
        sr.score_dimensions(model, [make_batch(Case())])
    return paths[0], str(prefetched.value), str(stored.value)


def test_kernels_that_a_forward_pass_would_change_are_refused() -> None:
    ((path, prefetched, stored),) = run_ranks(1, _refused_on_rank)
    assert path == "embedding"
    assert prefetched.startswith("the training pipeline has prefetched embeddings of batches in flight")
    assert stored.startswith("embedding: tables on SSD or in a key-value store cannot be searched")


def test_widths_are_stored_in_fours() -> None:
    assert [stored_dim(d) for d in (0, 1, 4, 5, 8)] == [0, 4, 4, 8, 8]
