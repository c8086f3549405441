"""What a job takes its machine for: its memory, never a default, and the known GPU of the driver's name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sseds_rec.distributed import machine
from sseds_rec.distributed.hardware import DEVICES, GIB
from sseds_rec.distributed.machine import host_memory, job_cluster, like
from sseds_rec.distributed.runtime import Runtime
from sseds_rec.errors import UserError

CPU = torch.device("cpu")


def _total() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemTotal:")))


def test_ranks_share_the_memory_of_their_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_LIMITS", ())
    assert host_memory() == pytest.approx(_total(), rel=0.01)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    cluster = job_cluster(Runtime(0, 8, CPU))
    assert (cluster.nodes, cluster.per_node) == (4, 2)
    where = cluster.topology()
    assert [device.storage.ddr for device in where.devices] == [host_memory() // 2] * 8
    assert {device.storage.hbm for device in where.devices} == {0}


def test_a_container_has_what_it_is_allowed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(f"{GIB}\n")
    monkeypatch.setattr(machine, "_LIMITS", (str(tmp_path / "memory.max"), str(tmp_path / "none")))
    assert host_memory() == GIB
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory() == pytest.approx(_total(), rel=0.01)


@pytest.mark.parametrize(
    ("name", "gib", "known"),
    [
        ("NVIDIA H100 80GB HBM3", 79.1, "H100-80GB"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", 79.1, "A100-80GB"),
        ("Tesla V100-SXM2-32GB", 31.7, "V100-32GB"),
        ("NVIDIA L4", 22.0, "L4-24GB"),
        ("NVIDIA L40S", 44.4, "L40S-48GB"),
        ("Tesla T4", 14.6, "T4-16GB"),
    ],
)
def test_the_drivers_name_is_of_a_known_gpu(name: str, gib: float, known: str) -> None:
    assert like(name, int(gib * GIB)) == DEVICES[known]


def test_an_unknown_gpu_has_no_name_of_a_known_one() -> None:
    assert like("NVIDIA GeForce RTX 4090", 24 * GIB).name == "NVIDIA GeForce RTX 4090"


def test_a_config_may_name_the_device() -> None:
    cluster = job_cluster(Runtime(0, 2, CPU), "CPU-3GB")
    assert {device.storage.ddr for device in cluster.topology().devices} == {3 * 10**9}
    with pytest.raises(UserError, match="sharding.device=H100-80GB is of kind cuda, and this job runs on cpu"):
        job_cluster(Runtime(0, 2, CPU), "H100-80GB")
    with pytest.raises(UserError, match="sharding.device=H1: "):
        job_cluster(Runtime(0, 2, CPU), "H1")
