"""Clusters by name and by numbers, and what the planner is told of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sseds_rec.distributed.hardware import DEVICES, MARGIN, Cluster, show_size
from sseds_rec.errors import UserError


@pytest.mark.parametrize("device", DEVICES)
def test_what_a_card_holds_is_a_little_less_than_what_its_name_says(device: str) -> None:
    cluster = Cluster.parse(f"2x4x{device}")
    label = int(device.rsplit("-", 1)[1].removesuffix("GB"))
    assert 0.9 * label * 2**30 < cluster.device.hbm < label * 2**30
    assert (cluster.nodes, cluster.per_node, cluster.world_size) == (2, 4, 8)
    assert str(cluster) == f"2x4x{device}"
    assert cluster.device.margin == pytest.approx(MARGIN * cluster.device.hbm, abs=1)
    assert cluster.usable == 8 * (cluster.device.hbm - cluster.device.margin)


def test_topology_has_the_devices_numbers_in_the_planners_units() -> None:
    text = "3x2xhbm=96GB,hbm_bw=4TB/s,ddr=100GiB,host_bw=60GB/s,intra_bw=0.5TB/s,inter_bw=400Gbit/s"
    where = Cluster.parse(text).topology()
    assert (where.world_size, where.local_world_size, where.compute_device) == (6, 2, "cuda")
    assert {device.storage.hbm for device in where.devices} == {96 * 10**9}
    assert {device.storage.ddr for device in where.devices} == {100 * 2**30}
    # bytes a millisecond
    assert (where.hbm_mem_bw, where.hbm_to_ddr_mem_bw) == (4e9, 60e6)
    assert (where.intra_host_bw, where.inter_host_bw) == (500e6, 50e6)


def test_a_known_device_with_another_network() -> None:
    plain, changed = Cluster.parse("4x8xh100"), Cluster.parse("4x8xH100-80GB,inter_bw=25GB/s")
    assert plain.device == DEVICES["H100-80GB"]
    assert changed.topology().inter_host_bw == plain.topology().inter_host_bw / 2
    assert changed.topology().hbm_mem_bw == plain.topology().hbm_mem_bw
    assert Cluster.parse(str(changed)) == changed


def test_processes_on_cpus() -> None:
    cluster = Cluster.parse("1x2xCPU-24GB")
    where = cluster.topology()
    assert (where.compute_device, where.world_size) == ("cpu", 2)
    assert [(device.storage.hbm, device.storage.ddr) for device in where.devices] == [(0, 24 * 10**9)] * 2
    assert cluster.usable == 2 * 24 * 10**9


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("H100-80GB", "write NODES x DEVICES PER NODE x DEVICE, as in 4x8xH100-80GB"),
        ("0x8xH100", "write NODES x DEVICES"),
        ("8xH100", "write NODES x DEVICES"),
        ("99999999x8xH100", "it is of more than 4,096 devices"),
        ("1x4097xH100", "it is of more than 4,096 devices"),
        ("1x8xA100", "A100 is A100-40GB or A100-80GB; say which"),
        ("1x8xH10-80GB", "no device named 'H10-80GB', did you mean H100-80GB?"),
        ("1x8xH100,intr_bw=4GB/s", "did you mean intra_bw?"),
        ("1x8xhbm=96", "'96' is not a size, as in 96GB or 90GiB"),
        ("1x8xhbm=0GB", "'0GB' is not a size"),
        ("1x8xhbm=96GB/s", "'96GB/s' is not a size"),
        ("1x8xhbm=96GB,hbm_bw=4TB", "'4TB' is not a bandwidth, as in 50GB/s or 400Gbit/s"),
        ("1x8xhbm_bw=4TB/s", "needs its memory, as in hbm=96GB"),
        ("1x8xCPU-24", "'24' is not a size"),
        ("1x8xCPU-24GB,hbm=2GB", "is a CPU and has no hbm"),
        ("1x8xH100,", "'' sets none of"),
    ],
)
def test_what_is_unknown_is_one_line(text: str, says: str) -> None:
    with pytest.raises(UserError) as refused:
        Cluster.parse(text)
    message = str(refused.value)
    assert says in message and repr(text) in message and "\n" not in message


def test_sizes_in_words() -> None:
    sizes = [0, 1023, 1024, 7424, 5 * 2**20, 2**30, 1500 * 2**40]
    shown = ["0 B", "1,023 B", "1.00 KiB", "7.25 KiB", "5.00 MiB", "1.00 GiB", "1,536,000.00 GiB"]
    assert [show_size(size) for size in sizes] == shown


@given(st.text(alphabet="0123456789xGBHhbm10=,./ sCPU-Tit", max_size=30))
def test_any_text_is_a_cluster_or_refused(text: str) -> None:
    try:
        cluster = Cluster.parse(text)
    except UserError:
        return
    assert 1 <= cluster.world_size <= 4096 and cluster.device.memory > 0
