"""How large a cluster must be for a model's tables."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sseds_rec.distributed.dry_plan import Placement, fits, need, place
from sseds_rec.distributed.hardware import MOST_DEVICES, Cluster
from sseds_rec.distributed.workload import Workload
from sseds_rec.errors import UserError

#: Where the search for the smallest cluster ends, unless a larger one is known to do.
MOST_NODES = 64


@dataclass(frozen=True)
class Forecast:
    """What to expect of a model on a cluster.

    Attributes:
        weight_bytes, optimizer_bytes: of all tables, once.
        tables: how many.
        batch_size: rows a step of each rank.
        fits: whether the planner finds a plan.
        placement: that plan, or if there is none the one for as many devices of the smallest memory that would do.
        smallest: the fewest devices of the kind that do, in nodes as large at most; None if `largest_cluster` does not.
    """

    weight_bytes: int
    optimizer_bytes: int
    tables: int
    batch_size: int
    fits: bool
    placement: Placement
    smallest: Cluster | None

    @property
    def over(self) -> int:
        """Bytes by which the fullest rank is above its device's memory; 0 if the model fits."""
        return max(0, int(self.placement.used.max()) - self.placement.cluster.device.memory)

    def as_dict(self) -> dict[str, Any]:
        """For machines: sizes in bytes, times in ms."""
        placement = self.placement
        ranks = {"memory": placement.used, "ddr": placement.ddr, **placement.memory}
        return {
            "fits": self.fits,
            "over_bytes": self.over,
            "tables": self.tables,
            "weight_bytes": self.weight_bytes,
            "optimizer_bytes": self.optimizer_bytes,
            "batch_size_per_rank": self.batch_size,
            "bytes_per_rank": {
                name: {"min": int(sizes.min()), "mean": float(sizes.mean()), "max": int(sizes.max())}
                for name, sizes in ranks.items()
            },
            "step_ms": {**placement.step, "total": sum(placement.step.values())},
            "sharding_types": placement.sharding_types,
            "kernels": placement.kernels,
            "smallest_cluster": str(self.smallest) if self.smallest else None,
            "smallest_devices": self.smallest.world_size if self.smallest else None,
        }


def forecast(workload: Workload, cluster: Cluster) -> Forecast:
    """Plans a workload for a cluster, and finds the smallest one.

    Raises:
        UserError: the planner has no plan however large the memory.
    """
    placement = place(workload, cluster)
    return Forecast(
        weight_bytes=workload.weight_bytes,
        optimizer_bytes=workload.optimizer_bytes,
        tables=len(list(workload.tables())),
        batch_size=workload.rows(cluster.world_size),
        fits=placement is not None,
        placement=placement or place_in_more(workload, cluster),
        smallest=smallest_cluster(workload, cluster, holds=placement is not None),
    )


def place_in_more(workload: Workload, cluster: Cluster) -> Placement:
    """The plan for as many devices, of the smallest memory in which there is one (to 1 %): by how much `cluster` is too small.

    Its margin is that of the real device.

    Raises:
        UserError: there is none however large the memory.
    """
    low, high = (
        cluster.device.memory,
        max(2 * cluster.device.memory, 2 * need(workload, cluster) // cluster.world_size),
    )
    while not fits(workload, _with_memory(cluster, high)):
        low, high = high, 2 * high
        if high > need(workload, cluster) * 2**10:
            raise UserError(
                f"the planner has no plan for {cluster}, however large its memory; give it more to choose from in sharding"
            )
    while high > 1.01 * low:
        middle = math.isqrt(low * high)
        low, high = (low, middle) if fits(workload, _with_memory(cluster, middle)) else (middle, high)
    found = place(workload, _with_memory(cluster, high))
    assert found is not None, "it fits"
    margin = np.full(cluster.world_size, cluster.device.margin)
    return replace(found, cluster=cluster, memory={**found.memory, "margin": margin})


def largest_cluster(like: Cluster) -> Cluster:
    """The largest of this kind that the search for the smallest tries."""
    return replace(like, nodes=min(MOST_NODES, MOST_DEVICES // like.per_node))


def smallest_cluster(workload: Workload, like: Cluster, holds: bool = False) -> Cluster | None:
    """The fewest devices of this kind that the workload fits: 1, 2, 4, ... of one node, then whole nodes.

    Takes it that what fits some nodes fits more.

    Args:
        workload: what is to be trained.
        like: its device, and how many a node has at most.
        holds: whether `like` itself is known to do: then none larger is tried.

    Returns:
        The cluster, or None if `largest_cluster` does not hold it.
    """
    most = like.nodes if holds else largest_cluster(like).nodes
    for devices in [1 << power for power in range((like.per_node - 1).bit_length())]:
        alone = replace(like, nodes=1, per_node=devices)
        if _can(workload, alone):
            return alone
    low, high = 0, 1
    while not (holds and high == most) and not _can(workload, replace(like, nodes=high)):
        if high >= most:
            return None
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _can(workload, replace(like, nodes=middle)) else (middle, high)
    return replace(like, nodes=high)


def _can(workload: Workload, cluster: Cluster) -> bool:
    """Whether there is a plan; no, if a table cannot be split over so many ranks at all."""
    try:
        return fits(workload, cluster)
    except UserError:
        return False


def _with_memory(cluster: Cluster, memory: int) -> Cluster:
    device = cluster.device
    return replace(
        cluster, device=replace(device, hbm=memory) if device.kind == "cuda" else replace(device, ddr=memory)
    )
