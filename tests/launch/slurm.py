"""A Slurm cluster on this machine: its own daemons, configuration, sockets and ports, in one folder, gone at the end.

Nothing that is installed under /etc or runs already is used or changed. All daemons run as the user who starts them, so that
user must be root (slurmd starts jobs as their owner).
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

DAEMONS = ["munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd"]

#: The names of the nodes are addresses of the loopback device: a job finds its first node by name, in whatever /etc/hosts.
NODES = ["127.0.0.1", "127.0.0.2"]


@contextmanager
def slurm_cluster(folder: Path, memory_mb: int = 8192) -> Iterator[dict[str, str]]:
    """Brings up munge, MariaDB, slurmdbd, slurmctld and two slurmd; stops all of them at the end.

    Args:
        folder: a new folder for configuration, state and logs.
        memory_mb: memory of a node as Slurm counts it, whatever the machine has.

    Yields:
        The environment in which sbatch, sacct and others talk to this cluster.

    Raises:
        RuntimeError: a daemon ended or did not answer in time; the message ends with the last lines of its log.
    """
    folder.mkdir(mode=0o700)
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    database, accounting, controller, *nodes = _free_ports(3 + len(NODES))
    running: list[subprocess.Popen[bytes]] = []

    def start(name: str, *command: object) -> subprocess.Popen[bytes]:
        with (folder / f"{name}.log").open("wb") as log:
            arguments = [str(part) for part in command]
            daemon = subprocess.Popen(arguments, stdout=log, stderr=log, env=environment, start_new_session=True)
        running.append(daemon)
        return daemon

    def wait(name: str, daemon: subprocess.Popen[bytes], ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not ready():
            if daemon.poll() is not None or time.monotonic() > deadline:
                lines = (folder / f"{name}.log").read_text().splitlines()[-5:]
                raise RuntimeError(f"{name} did not come up: " + " | ".join(lines))
            time.sleep(0.05)

    def answers(*command: str) -> bool:
        return subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0

    try:
        key, munge_socket = folder / "munge.key", folder / "munge.socket"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        own = [f"--{name}-file={folder / f'munge.{name}'}" for name in ("key", "pid", "log", "seed")]
        daemon = start("munged", "munged", "--foreground", "--force", "--num-threads=1", f"--socket={munge_socket}", *own)
        wait("munged", daemon, munge_socket.exists)

        password = secrets.token_hex()
        _configure(folder, munge_socket, database, accounting, controller, nodes, password, memory_mb)
        subprocess.run(
            ["mariadb-install-db", "--no-defaults", f"--datadir={folder / 'database'}", "--user=root"],
            check=True,
            capture_output=True,
        )
        sql = folder / "grant.sql"
        sql.touch(mode=0o600)
        sql.write_text(
            f"CREATE USER slurm@'127.0.0.1' IDENTIFIED BY '{password}';\nGRANT ALL ON slurm.* TO slurm@'127.0.0.1';\n"
        )
        daemon = start(
            "mariadbd",
            *["mariadbd", "--no-defaults", "--user=root", "--skip-name-resolve", "--bind-address=127.0.0.1"],
            *[f"--port={database}", f"--datadir={folder / 'database'}", f"--init-file={sql}"],
            *[f"--socket={folder / 'database.socket'}", f"--pid-file={folder / 'database.pid'}"],
        )
        wait("mariadbd", daemon, lambda: _listens(database))
        daemon = start("slurmdbd", "slurmdbd", "-D")
        wait("slurmdbd", daemon, lambda: _listens(accounting))
        daemon = start("slurmctld", "slurmctld", "-D", "-c")
        wait("slurmctld", daemon, lambda: answers("scontrol", "ping"))
        for name in NODES:
            daemon = start(f"slurmd-{name}", "slurmd", "-D", "-N", name)
            wait(f"slurmd-{name}", daemon, lambda name=name: _idle(name, environment))  # type: ignore[misc]
        yield environment
    finally:
        for daemon in reversed(running):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def missing() -> list[str]:
    """Names of the daemons that are not installed."""
    return [name for name in DAEMONS if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")]


def _configure(
    folder: Path,
    munge_socket: Path,
    database: int,
    accounting: int,
    controller: int,
    nodes: list[int],
    password: str,
    memory_mb: int,
) -> None:
    machine = socket.gethostname().partition(".")[0]
    (folder / "state").mkdir()
    common = f"""
AuthType=auth/munge
AuthInfo=socket={munge_socket}
SlurmUser=root
"""
    dbd = folder / "slurmdbd.conf"
    dbd.touch(mode=0o600)
    dbd.write_text(f"""{common}
DbdHost={machine}
DbdAddr=127.0.0.1
DbdPort={accounting}
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database}
StorageUser=slurm
StoragePass={password}
StorageLoc=slurm
""")
    lines = [
        f"NodeName={name} NodeHostname={machine} NodeAddr={name} Port={port} CPUs=4 RealMemory={memory_mb}"
        for name, port in zip(NODES, nodes, strict=True)
    ]
    (folder / "slurm.conf").write_text(f"""{common}
ClusterName=test
SlurmctldHost={machine}(127.0.0.1)
SlurmctldPort={controller}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdUser=root
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={accounting}
AccountingStoragePass={munge_socket}
ReturnToService=2
{chr(10).join(lines)}
PartitionName=main Nodes={",".join(NODES)} Default=YES MaxTime=60
""")


def _idle(node: str, environment: dict[str, str]) -> bool:
    command = ["sinfo", "--noheader", "--Node", "--nodes", node, "--format", "%t"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout.strip() == "idle"


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
