"""Tables of raw 64-bit ids: TorchRec's managed collision gives each id that is seen often a row of its own.

A table of n rows holds the n - 1 ids counted most often (least frequently used are evicted); all other ids share its last
row. The table and the map from ids to rows are split over the ranks by id, and the map is part of the model's state; the
counts since the last round of admissions are not, so a run that resumes between two rounds begins to count anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.mc_embeddingbag import (
    ManagedCollisionEmbeddingBagCollectionSharder,
    ShardedManagedCollisionEmbeddingBagCollection,
)
from torchrec.distributed.types import ParameterSharding, ShardingEnv
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection
from torchrec.modules.mc_modules import LFU_EvictionPolicy, ManagedCollisionCollection, MCHManagedCollisionModule
from torchrec.sparse.jagged_tensor import JaggedTensor

from sseds_rec.errors import UserError

#: Training steps between two rounds in which counted ids get rows; each sorts the table's ids.
ADMISSION_STEPS = 10

#: Ids are spread over [0, 2^62): ranks own equal ranges of them, and int64's largest value marks a free row.
_ID_BITS = 62


def spread_ids(ids: Tensor) -> Tensor:
    """Any int64 ids -> ids spread evenly over [0, 2^62) (the finalizer of SplitMix64, Steele et al., OOPSLA 2014).

    Without it consecutive ids would all belong to one rank, and negative ones to none. Two of a billion ids meet with a
    probability of a tenth.
    """
    ids = (ids ^ _shifted(ids, 30)) * -0x40A7B892E31B1A47
    ids = (ids ^ _shifted(ids, 27)) * -0x6B2FB644ECCEEE15
    return (ids ^ _shifted(ids, 31)) & ((1 << _ID_BITS) - 1)


def _shifted(ids: Tensor, bits: int) -> Tensor:
    """Logical right shift, which torch has no other way to do on int64."""
    return (ids >> bits) & ((1 << (64 - bits)) - 1)


class IdTable(MCHManagedCollisionModule):
    """The ids of one table (of one rank, once sharded), and the row of each.

    Attributes:
        planned_ranks: of a cluster that is only planned for; None for the ranks that there are.
    """

    planned_ranks: int | None = None

    def buckets(self) -> int:
        """Ranges into which the ids are split: one a rank."""
        if self.planned_ranks is not None:
            return self.planned_ranks
        return dist.get_world_size() if dist.is_initialized() else 1

    def profile(self, features: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
        """Counts ids, in training only."""
        if self.training and not self._current_history_buffer_offset:
            self._input_history_buffer_size = -1  # made for this round's batches, not for the first there ever was
        return super().profile(features)

    def validate_state(self) -> None:
        """Refuses, when a checkpoint was loaded, ids that were split over another number of ranks.

        Raises:
            UserError: names the table.
        """
        stored = int((self._output_segments_tensor >= 0).sum()) - 1
        if stored != self._buckets:
            raise UserError(
                f"table {self._name}: its map of raw ids is in {stored} parts, one a rank, and cannot be divided anew; "
                f"start as many processes, not {self._buckets}"
            )


def managed_collection(
    tables: Sequence[EmbeddingBagConfig], is_weighted: bool
) -> ManagedCollisionEmbeddingBagCollection:
    """A collection on the meta device whose features hold ids from `spread_ids`."""
    meta = torch.device("meta")
    ids = {
        table.name: IdTable(
            zch_size=table.num_embeddings,
            device=meta,
            eviction_policy=LFU_EvictionPolicy(),
            eviction_interval=ADMISSION_STEPS,
            input_hash_size=1 << _ID_BITS,
            name=table.name,
        )
        for table in tables
    }
    configs = list(tables)
    return ManagedCollisionEmbeddingBagCollection(
        EmbeddingBagCollection(tables=configs, is_weighted=is_weighted, device=meta),
        ManagedCollisionCollection(ids, configs, need_preprocess=False),  # preprocessing loses the weights
    )


class ManagedSharder(ManagedCollisionEmbeddingBagCollectionSharder):
    """TorchRec's sharder, for collections that evict under every fused optimizer and on CPU as well."""

    def shard(
        self,
        module: ManagedCollisionEmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedManagedCollection:
        """Splits one collection by rows."""
        return ShardedManagedCollection(
            module,
            params,
            ebc_sharder=self._e_sharder,
            mc_sharder=self._mc_sharder,
            env=env,
            device=device or torch.device("cuda"),
        )


class ShardedManagedCollection(ShardedManagedCollisionEmbeddingBagCollection):
    """TorchRec's collection. Its own way to give a row to a new id lacks a CPU kernel, and resets row-wise Adagrad only."""

    @torch.no_grad()
    def _evict(self, evictions_per_table: dict[str, Tensor | None]) -> None:
        for table, rows in evictions_per_table.items():
            if rows is None or not len(rows):
                continue
            kernel, index = self._table_to_tbe_and_index[table]
            weight: Any = kernel.split_embedding_weights()[int(index)]
            weight[rows] = self._embedding_module._table_name_to_config[table].init_fn(weight[rows])
            states = kernel.split_optimizer_states()
            for state in states[int(index)] if states else []:  # SGD has none
                state[rows] = 0


def is_managed(module: nn.Module) -> bool:
    """Whether this is a managed collision collection, plain or sharded, over an EmbeddingBagCollection."""
    kinds = (ManagedCollisionEmbeddingBagCollection, ShardedManagedCollisionEmbeddingBagCollection)
    return isinstance(module, kinds)
