"""Clusters that need not be here: what a planner must know of them, from a name or from numbers."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from sseds_rec.errors import UserError

if TYPE_CHECKING:
    from torchrec.distributed.planner import Topology

KB, MB, GB, TB = 10**3, 10**6, 10**9, 10**12
GIB = 2**30

#: More devices than any job has; a planner's tables grow with them.
MOST_DEVICES = 4096

#: Share of a GPU's memory that is left to the CUDA context, NCCL's buffers and what the allocator loses to fragments: 4 GiB of
#: 80. The planner's own default, 15 %, also stands for the dense part, which we count.
MARGIN = 0.05


@dataclass(frozen=True)
class Device:
    """One GPU, or one process of a CPU job, with its share of the host.

    Bandwidths are in bytes/s and one direction, as a collective can use them. What is not given is the planner's own default.

    Attributes:
        name: as a user writes it.
        kind: "cuda" or "cpu".
        hbm: bytes of the GPU's memory that torch finds: what is on the label less what the driver and ECC keep. 0 of a CPU.
        ddr: bytes of host memory per device.
        hbm_bw, ddr_bw: of the memories.
        host_bw: between GPU and host.
        intra_bw: to the other devices of the node, per device.
        inter_bw: to other nodes, per device.
    """

    name: str
    kind: Literal["cuda", "cpu"] = "cuda"
    hbm: int = 0
    ddr: int = 128 * GIB
    hbm_bw: float = 897 * GIB
    ddr_bw: float = 51 * GIB
    host_bw: float = 32 * GIB
    intra_bw: float = 600 * GIB
    inter_bw: float = 12.5 * GIB

    @property
    def memory(self) -> int:
        """Bytes in which this device keeps tables."""
        return self.hbm if self.kind == "cuda" else self.ddr

    @property
    def margin(self) -> int:
        """Bytes of it that no table may take; of a CPU's, whose size a user chose, nothing is kept back."""
        return self.hbm - int((1 - MARGIN) * self.hbm)


def _gpu(name: str, hbm: float, hbm_bw: int, intra: int, host: int, inter: float, ddr: int) -> Device:
    """GiB of memory, then GB/s four times, then GB."""
    speed = {"hbm_bw": hbm_bw * GB, "intra_bw": intra * GB, "host_bw": host * GB, "inter_bw": inter * GB}
    return Device(name, "cuda", int(hbm * GIB), ddr * GB, **speed)


# Memory: `torch.cuda.get_device_properties(0).total_memory` of the card with ECC on, as torch's out-of-memory messages print
# it ("total capacity of 79.10 GiB"); where drivers differ, the smallest seen. Bandwidth of memory, NVLink (half of the two-way
# figure) and PCIe: NVIDIA's data sheets of the V100, T4, A100, A10, L4, L40S, H100 SXM, H200 SXM and DGX B200. Network and host
# memory, per GPU: DGX-1V, DGX A100, DGX H100, DGX H200, DGX B200; of T4, A10G, L4 and L40S, which have no NVLink, nodes of four
# (AWS g4dn, g5, g6, g6e .12xlarge).
_KNOWN = [
    _gpu("T4-16GB", 14.56, 320, 16, 16, 1.56, 48),
    _gpu("V100-16GB", 15.77, 900, 150, 16, 6.25, 64),
    _gpu("V100-32GB", 31.73, 900, 150, 16, 6.25, 64),
    _gpu("A10G-24GB", 21.98, 600, 32, 32, 1.25, 48),
    _gpu("L4-24GB", 21.95, 300, 32, 32, 1.25, 48),
    _gpu("L40S-48GB", 44.35, 864, 32, 32, 3.12, 96),
    _gpu("A100-40GB", 39.38, 1555, 300, 32, 25, 128),
    _gpu("A100-80GB", 79.14, 2039, 300, 32, 25, 256),
    _gpu("H100-80GB", 79.10, 3350, 450, 64, 50, 256),
    _gpu("H200-141GB", 139.72, 4800, 450, 64, 50, 256),
    _gpu("B200-180GB", 178.35, 8000, 900, 64, 50, 256),
]
DEVICES: dict[str, Device] = {device.name: device for device in _KNOWN}

_UNITS = {"": 1, "K": KB, "M": MB, "G": GB, "T": TB, "Ki": 2**10, "Mi": 2**20, "Gi": GIB, "Ti": 2**40}
_SHOWN = [("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10), ("B", 1)]
_EXAMPLE = "4x8xH100-80GB or 2x8xhbm=96GB,hbm_bw=4000GB/s,ddr=256GB"


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal devices.

    Example::

        Cluster.parse("4x8xH100-80GB").topology()              # 32 GPUs for TorchRec's planner
        Cluster.parse("4x8xH100,inter_bw=25GB/s,ddr=128GB")     # with another network and other hosts
        Cluster.parse("2x8xhbm=96GB,hbm_bw=4000GB/s")          # any device, by numbers
        Cluster.parse("1x2xCPU-24GB")                           # two processes of 24 GB each
    """

    nodes: int
    per_node: int
    device: Device

    @classmethod
    def parse(cls, text: str) -> Cluster:
        """Reads NODES x DEVICES x DEVICE.

        DEVICE is a known name (`DEVICES`), the beginning of just one of them, CPU-<memory of a process>, or `hbm=...` for any
        other GPU; then, after commas, what differs: `ddr`, `hbm_bw`, `ddr_bw`, `host_bw`, `intra_bw`, `inter_bw`. GB are 10^9
        bytes and GiB 2^30, GB/s bytes and Gbit/s bits a second.

        Raises:
            UserError: it is not of that form, has more than `MOST_DEVICES`, names no device (says the nearest), or a value is no
                size.
        """
        found = re.fullmatch(r"\s*(\d+)\s*x\s*(\d+)\s*x\s*(\S.*?)\s*", text, re.IGNORECASE)
        if not found or not int(found[1]) or not int(found[2]):
            raise UserError(f"cluster {text!r}: write NODES x DEVICES PER NODE x DEVICE, as in {_EXAMPLE}")
        nodes, per_node = int(found[1]), int(found[2])
        if nodes * per_node > MOST_DEVICES:
            raise UserError(f"cluster {text!r}: it is of more than {MOST_DEVICES:,} devices; take fewer")
        try:
            return cls(nodes, per_node, _device(found[3]))
        except UserError as error:
            raise UserError(f"cluster {text!r}: {error}") from None

    def __str__(self) -> str:
        return f"{self.nodes}x{self.per_node}x{self.device.name}"

    @property
    def world_size(self) -> int:
        return self.nodes * self.per_node

    @property
    def usable(self) -> int:
        """Bytes of all devices together that tables can take, at the very most."""
        return self.world_size * (self.device.memory - self.device.margin)

    def topology(self) -> Topology:
        """This cluster as TorchRec's planner sees it, bandwidths and all."""
        from torchrec.distributed.planner.types import HardwareConfig, KernelConfig, TopologyFactory, TrainerConfig

        device = self.device
        hardware = HardwareConfig(
            hbm_cap_bytes=device.hbm,
            ddr_cap_bytes=device.ddr,
            # bytes/ms, the planner's unit
            hbm_mem_bw=device.hbm_bw / 1000,
            ddr_mem_bw=device.ddr_bw / 1000,
            hbm_to_ddr_mem_bw=device.host_bw / 1000,
            intra_host_bw=device.intra_bw / 1000,
            inter_host_bw=device.inter_bw / 1000,
        )
        kernel = KernelConfig(compute_device=device.kind, use_hardware_based_bandwidth=True)
        trainer = TrainerConfig(world_size=self.world_size, local_world_size=self.per_node)
        return TopologyFactory.create_topology(trainer, hardware, kernel)


def _device(text: str) -> Device:
    head, *settings = [part.strip() for part in text.split(",")]
    if "=" in head:
        settings.insert(0, head)
        device = Device(text)
    elif memory := re.fullmatch(r"CPU-(.+)", head, re.IGNORECASE):
        device = Device(text, "cpu", ddr=int(_size(memory[1], head)))
    else:
        device = replace(_known(head), name=",".join([_known(head).name, *settings]))
    changes: dict[str, Any] = {}
    keys = [field.name for field in fields(Device) if field.name not in ("name", "kind")]
    for setting in settings:
        key, _, value = (part.strip() for part in setting.partition("="))
        if key not in keys:
            raise UserError(f"{setting!r} sets none of {', '.join(keys)}{_near(key, keys)}")
        size = _size(value, setting, rate=key.endswith("_bw"))
        changes[key] = size if key.endswith("_bw") else int(size)
    device = replace(device, **changes)
    if not device.memory:
        raise UserError("a GPU by numbers needs its memory, as in hbm=96GB")
    if device.kind == "cpu" and device.hbm:
        raise UserError(f"{head} is a CPU and has no hbm")
    return device


def _known(name: str) -> Device:
    exact = [known for known in DEVICES if known.lower() == name.lower()]
    found = exact or [known for known in DEVICES if known.lower().startswith(f"{name.lower()}-")]
    if not found:
        raise UserError(
            f"no device named {name!r}{_near(name, list(DEVICES))}; known are {', '.join(DEVICES)} and CPU-<memory>, "
            "any other GPU is hbm=...,hbm_bw=..."
        )
    if len(found) > 1:
        raise UserError(f"{name} is {' or '.join(found)}; say which")
    return DEVICES[found[0]]


def _size(text: str, where: str, rate: bool = False) -> float:
    """Bytes, or bytes/s."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?(B|bit)(/s)?", text)
    if not found or bool(found[4]) != rate or (found[3] == "bit" and not rate) or not float(found[1]):
        wanted = "a bandwidth, as in 50GB/s or 400Gbit/s" if rate else "a size, as in 96GB or 90GiB"
        raise UserError(f"{where!r}: {text!r} is not {wanted}")
    return float(found[1]) * _UNITS[found[2] or ""] / (8 if found[3] == "bit" else 1)


def _near(word: str, known: list[str]) -> str:
    lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=0.4)
    return f", did you mean {lower[near[0]]}?" if near else ""


def binary_unit(size: float) -> tuple[str, int]:
    """The largest of B, KiB, MiB and GiB that a size reaches, and its bytes."""
    return next(((name, unit) for name, unit in _SHOWN if size >= unit), _SHOWN[-1])


def show_size(size: float) -> str:
    """Bytes as people read them: 57.91 GiB, 7.25 KiB."""
    name, unit = binary_unit(size)
    return f"{size / unit:,.{0 if unit == 1 else 2}f} {name}"
