"""Modules that prune rows (ITEP), sharded: through checkpoints, and not live.

FBGEMM has their operators for CUDA only, and its CPU build does not even declare them. What is needed of them here is small, and
written out below: buckets of ids that are looked up in `address_lookup`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.itep_embedding_modules import ITEPEmbeddingBagCollection
from torchrec.modules.itep_modules import GenericITEPModule

import sseds_rec as sr
from tests.ranks import run_ranks
from tests.search import placed
from tests.slim.moves import convert, load, mask, plan_keeping, save
from tests.slim.shared import CUTS, Wrapped, make_features, make_share, pooled

#: Table -> ids before pruning, of 9 rows after it. All are pruned: TorchRec needs CUDA on a rank that has no such table.
SIZES = {"first": 30, "second": 25, "third": 20}


@cache
def _declare_operators() -> torch.library.Library:
    library = torch.library.Library("fbgemm", "FRAGMENT")
    library.define("init_address_lookup(Tensor(a!) lookup, Tensor offsets, Tensor sizes) -> ()")
    library.define(
        "remap_indices_update_utils(int step, Tensor buffers, Tensor lengths, Tensor starts, Tensor ids, Tensor lookup, "
        "Tensor(a!) use, Tensor offsets, *, Tensor[]? full_values_list=None, bool? update_util=None) -> Tensor"
    )
    library.impl("init_address_lookup", lambda lookup, offsets, sizes: None, "CPU")
    library.impl("remap_indices_update_utils", _remap, "CPU")
    return library


def _remap(
    step: int,
    buffers: Tensor,
    lengths: Tensor,
    starts: Tensor,
    ids: Tensor,
    lookup: Tensor,
    use: Tensor,
    offsets: Tensor,
    **options: Any,
) -> Tensor:
    remapped = ids.clone()
    for buffer, length, start in zip(buffers.tolist(), lengths.tolist(), starts.tolist(), strict=True):
        remapped[start : start + length] = lookup[offsets[buffer] + ids[start : start + length]]
    return remapped


def _rows(table: str) -> Tensor:
    """Id -> row."""
    return torch.randint(0, 9, (SIZES[table],), generator=torch.Generator().manual_seed(SIZES[table]))


def _model(device: str = "cpu") -> Wrapped:
    return Wrapped(ITEPEmbeddingBagCollection(pooled(device=device).embedding, GenericITEPModule(SIZES)))  # type: ignore[arg-type]


def _shard(model: Any, kind: str) -> DistributedModelParallel:
    _declare_operators()
    return placed.shard(model, dict.fromkeys(("first", "second", "third"), kind))


def _slimmed(
    rank: int, world_size: int, kept: dict[str, list[int]], folder: str
) -> tuple[Tensor, str, dict[str, Tensor]]:
    full = _shard(_model("meta"), "table_wise")
    placed.load(full, {name: own for name, own in _model().named_parameters()})
    for name, value in full.state_dict().items():
        table = name.rpartition(".")[2].partition("_itp_")[0]
        if name.endswith("_itp_address_lookup"):
            value.copy_(_rows(table))
        elif name.endswith("_itp_row_util"):
            value.fill_(SIZES[table])
        elif name.endswith("_iter"):
            value.fill_(11)
    try:
        sr.slim(full, plan_keeping(pooled(), kept))
        refusal = ""
    except sr.UserError as error:
        refusal = str(error)
    save(full, folder)
    slim = _shard(sr.slim(_model("meta"), plan_keeping(pooled(), kept)), "table_wise")
    load(slim, convert(folder, plan_keeping(pooled(), kept)))
    buffers = {name: value for name, value in slim.state_dict().items() if "_itp_" in name or name.endswith("_iter")}
    buffers = {name: value.clone() for name, value in buffers.items()}
    return slim.eval()(make_share(rank, world_size)).values(), refusal, buffers


@pytest.mark.parametrize("kept", CUTS[:2])
def test_row_pruned_tables_through_a_checkpoint(kept: dict[str, list[int]], tmp_path: Path) -> None:
    answers = run_ranks(2, _slimmed, kept, str(tmp_path / "full"))
    masked, features = pooled(), make_features()
    mask(masked, kept)
    found = torch.cat([values for values, *_ in answers])
    columns = found.split([8] * 4, dim=1)
    for key, own in zip(("a@first", "b", "a@second", "c"), columns, strict=True):
        table = {"a@first": "first", "b": "first", "a@second": "second", "c": "third"}[key]
        rows = _rows(table)
        ids = [rows[one] for one in features[key[0]].to_dense()]
        weight = masked.embedding.embedding_bags[table].weight
        torch.testing.assert_close(own, torch.stack([weight[one].sum(dim=0) for one in ids]), rtol=0, atol=1e-6)
    buffers: dict[str, Tensor] = {}
    for _, refusal, own in answers:
        assert refusal.startswith("embedding: ShardedITEPEmbeddingBagCollection cannot be slimmed: it prunes rows")
        assert refusal.endswith("to slim it, convert its checkpoint") and "\n" not in refusal
        buffers |= own
    assert {int(value) for name, value in buffers.items() if name.endswith("_iter")} == {11}
    for table in SIZES:
        if not kept[table]:
            continue
        (lookup,) = (own for name, own in buffers.items() if name.endswith(f"{table}_itp_address_lookup"))
        (use,) = (own for name, own in buffers.items() if name.endswith(f"{table}_itp_row_util"))
        assert torch.equal(lookup, _rows(table)) and (use == SIZES[table]).all()
