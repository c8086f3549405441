"""The machine that this process runs on, as a planner must know it."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import torch

from sseds_rec.distributed.hardware import DEVICES, Cluster, Device
from sseds_rec.distributed.runtime import Runtime
from sseds_rec.errors import UserError

#: The most memory that a container's processes may have together, in version 2 and 1 of Linux's control groups.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def job_cluster(runtime: Runtime, device: str | None = None) -> Cluster:
    """The nodes of this job.

    Args:
        runtime: of this process.
        device: what each rank's device is to be taken for, as in `Cluster.parse`; what it is, if not given.

    Raises:
        UserError: no such device, or one of another kind than the job's.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", runtime.world_size))
    nodes = max(1, runtime.world_size // local)
    if device is None:
        return Cluster(nodes, local, this_device(runtime.device, local))
    try:
        found = Cluster.parse(f"{nodes}x{local}x{device}")
    except UserError as error:
        raise UserError(f"sharding.device={device}: {error}") from None
    if found.device.kind != runtime.device.type:
        raise UserError(
            f"sharding.device={device} is of kind {found.device.kind}, and this job runs on {runtime.device.type}; "
            "name another, or set device"
        )
    return found


def this_device(device: torch.device, local_world_size: int) -> Device:
    """This rank's device, and its share of the host's memory.

    Sizes are what the machine has. Bandwidths are those of the known GPU of this name, or the planner's own.
    """
    ddr = host_memory() // local_world_size
    if device.type != "cuda":
        return Device("CPU", "cpu", ddr=ddr)
    found = torch.cuda.get_device_properties(device)
    return replace(like(found.name, found.total_memory), name=found.name, hbm=found.total_memory, ddr=ddr)


def like(name: str, memory: int) -> Device:
    """The known GPU that the driver calls so ("NVIDIA A100-SXM4-80GB"), of the nearest memory; else one of no known speed."""
    words = re.split(r"[^A-Z0-9]+", name.upper())
    same = [known for known in DEVICES.values() if known.name.partition("-")[0] in words]
    return min(same, key=lambda known: abs(known.hbm - memory), default=Device(name))


def host_memory() -> int:
    """Bytes of memory that this machine, or the container in it, has."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in map(Path, _LIMITS):
        text = path.read_text().strip() if path.exists() else "max"
        found += [int(text)] if text.isdigit() else []
    return min(found)
