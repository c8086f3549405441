"""How large a cluster must be for a model's tables."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from sseds_rec.distributed.dry_plan import Placement, fits, margin_bytes, need, place
from sseds_rec.distributed.hardware import Cluster
from sseds_rec.distributed.workload import Workload


def place_in_more(workload: Workload, cluster: Cluster) -> Placement:
    """The plan for as many devices, of the smallest memory in which there is one (to 1 %): by how much `cluster` is too small.

    Its margin is that of the real device.
    """
    low, high = (
        cluster.device.memory,
        max(2 * cluster.device.memory, 2 * need(workload, cluster) // cluster.world_size),
    )
    while not fits(workload, _with_memory(cluster, high)):
        low, high = high, 2 * high
    while high > 1.01 * low:
        middle = math.isqrt(low * high)
        low, high = (low, middle) if fits(workload, _with_memory(cluster, middle)) else (middle, high)
    found = place(workload, _with_memory(cluster, high))
    assert found is not None, "it fits"
    margin = np.full(cluster.world_size, margin_bytes(cluster.device))
    return replace(found, cluster=cluster, memory={**found.memory, "margin": margin})


def smallest_cluster(workload: Workload, like: Cluster, most_nodes: int) -> Cluster | None:
    """The fewest devices of this kind that the workload fits: 1, 2, 4, ... of one node, then whole nodes.

    Takes it that what fits some nodes fits more.

    Args:
        workload: what is to be trained.
        like: its device, and how many a node has at most.
        most_nodes: where the search ends.

    Returns:
        The cluster, or None if even `most_nodes` do not hold it.
    """
    for devices in [1 << power for power in range((like.per_node - 1).bit_length())]:
        alone = replace(like, nodes=1, per_node=devices)
        if fits(workload, alone):
            return alone
    low, high = 0, 1
    while not fits(workload, replace(like, nodes=high)):
        if high >= most_nodes:
            return None
        low, high = high, min(2 * high, most_nodes)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(workload, replace(like, nodes=middle)) else (middle, high)
    return replace(like, nodes=high)


def _with_memory(cluster: Cluster, memory: int) -> Cluster:
    device = cluster.device
    return replace(
        cluster, device=replace(device, hbm=memory) if device.kind == "cuda" else replace(device, ddr=memory)
    )
