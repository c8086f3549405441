"""A Slurm cluster on this machine: its own daemons, configuration, sockets and ports, in one folder, gone at the end.

Nothing under /etc and no daemon that runs already is used or changed. It runs the jobs of the user who starts it.
"""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ["munged", "mariadbd", "mariadb-install-db", "slurmdbd", "slurmctld", "slurmd", "sbatch"]
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"

#: Nodes are named by addresses of the loopback device, so that jobs find the first one whatever /etc/hosts says.
NODES = ["127.0.0.1", "127.0.0.2"]


def missing() -> list[str]:
    """Programs of the cluster that are not installed."""
    return [name for name in PROGRAMS if not shutil.which(name, path=PATH)]


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Brings up munge, MariaDB, slurmdbd, slurmctld and a slurmd for each node; at the end stops jobs and daemons.

    Args:
        folder: a new folder for configuration, state and logs; its path is short, since it holds sockets.

    Yields:
        What to add to the environment so that sbatch, sacct and the others talk to this cluster.

    Raises:
        RuntimeError: a daemon ended or did not answer in time; the message ends with the last lines of its log.
    """
    folder.mkdir(mode=0o700)
    variables = {"SLURM_CONF": str(folder / "slurm.conf")}
    daemons = _Daemons(folder, {**os.environ, **variables, "PATH": PATH})
    database, accounting, controller, *nodes = _free_ports(3 + len(NODES))
    munge = folder / "munge.socket"
    try:
        _private(folder / "munge.key", secrets.token_bytes(128))
        own = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        daemons.start(["munged", "--foreground", "--force", f"--socket={munge}", *own], munge.exists)

        password = secrets.token_hex()
        _start_database(daemons, folder, database, password)
        _configure(folder, munge, database, password, accounting, controller, nodes)
        daemons.start(["slurmdbd", "-D"], lambda: _listens(accounting))
        daemons.start(["slurmctld", "-D"], lambda: daemons.ask("scontrol", "ping") is not None)
        for name in NODES:
            state = ["sinfo", "--noheader", "--Node", "--nodes", name, "--format", "%t"]
            daemons.start(["slurmd", "-D", "-N", name], lambda state=state: daemons.ask(*state) == "idle")
        yield variables
    finally:
        daemons.ask("scancel", "--user", getpass.getuser())  # a job outlives its slurmd
        deadline = time.monotonic() + 20
        while daemons.ask("squeue", "--noheader") and time.monotonic() < deadline:
            time.sleep(0.1)
        daemons.stop()


class _Daemons:
    """Processes that are started one after another, each when the one before answers, and stopped in reverse."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = environment
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self, command: list[str], ready: Callable[[], bool]) -> None:
        log = self.folder / f"{command[0]}{len(self.running)}.log"
        with log.open("wb") as file:
            daemon = subprocess.Popen(command, stdout=file, stderr=file, env=self.environment, start_new_session=True)
        self.running.append(daemon)
        deadline = time.monotonic() + 60
        while not ready():
            if daemon.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} did not come up: " + " | ".join(log.read_text().splitlines()[-5:]))
            time.sleep(0.05)

    def ask(self, *command: str) -> str | None:
        """What a client prints; None if it fails."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    def stop(self) -> None:
        for daemon in reversed(self.running):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _start_database(daemons: _Daemons, folder: Path, port: int, password: str) -> None:
    data, user = folder / "database", f"--user={getpass.getuser()}"
    install = ["mariadb-install-db", "--no-defaults", f"--datadir={data}", user]
    subprocess.run(install, env=daemons.environment, check=True, capture_output=True)
    grant = folder / "grant.sql"
    statements = [
        f"CREATE USER slurm@'127.0.0.1' IDENTIFIED BY '{password}';",
        "GRANT ALL ON slurm.* TO slurm@'127.0.0.1';",
    ]
    _private(grant, "\n".join(statements).encode())
    own = [f"--datadir={data}", f"--socket={folder}/database.socket", f"--pid-file={folder}/database.pid"]
    network = ["--skip-name-resolve", "--bind-address=127.0.0.1", f"--port={port}"]
    daemons.start(["mariadbd", "--no-defaults", user, *own, *network, f"--init-file={grant}"], lambda: _listens(port))


def _configure(
    folder: Path, munge: Path, database: int, password: str, accounting: int, controller: int, nodes: list[int]
) -> None:
    machine = socket.gethostname().partition(".")[0]
    user = getpass.getuser()
    # A job that is put back in the queue waits until its credentials have expired: 120 seconds by default.
    common = f"AuthType=auth/munge\nAuthInfo=socket={munge},cred_expire=5\nSlurmUser={user}\n"
    dbd = f"""{common}
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
"""
    _private(folder / "slurmdbd.conf", dbd.encode())
    (folder / "state").mkdir()
    lines = "\n".join(
        f"NodeName={name} NodeHostname={machine} NodeAddr={name} Port={port} CPUs=4 RealMemory=8192"
        for name, port in zip(NODES, nodes, strict=True)
    )
    conf = f"""{common}
ClusterName=test
SlurmctldHost={machine}(127.0.0.1)
SlurmctldPort={controller}
SlurmctldPidFile={folder}/slurmctld.pid
StateSaveLocation={folder}/state
SlurmdUser={user}
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=bf_interval=1,sched_interval=1
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={accounting}
AccountingStoragePass={munge}
ReturnToService=2
KillWait=2
{lines}
PartitionName=main Nodes={",".join(NODES)} Default=YES MaxTime=60
"""
    (folder / "slurm.conf").write_text(conf)


def _private(path: Path, content: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(content)


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
