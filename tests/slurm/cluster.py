"""A SLURM cluster on this machine: munged, slurmctld and a slurmd for each node, as root.

Everything it writes is in a folder of its own, it listens on ports that were free, and on leaving
whatever it started is gone.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

#: Seconds that anything may take. It ends hangs only.
LIMIT = 180.0
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scancel", "scontrol", "squeue")

CONFIG = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
SwitchType=switch/none
MpiDefault=none
SlurmdTimeout={limit:.0f}
MessageTimeout=60
KillWait={limit:.0f}
"""


def why_not() -> str:
    """Why there can be no cluster here, or nothing."""
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    if missing:
        return f"SLURM is not installed ({missing[0]}): apt install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "slurmd needs root"


def wait_for(what: str, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, f"waited {LIMIT:g} s for {what}"
        time.sleep(0.05)


class Cluster:
    """Partitions with so many nodes each; nodes are n1, n2, …"""

    def __init__(self, **partitions: int) -> None:
        self.partitions = partitions
        self.nodes = [f"n{index + 1}" for index in range(sum(partitions.values()))]
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        self.folder = Path(
            tempfile.mkdtemp(prefix="slurm-", dir="/tmp")
        )  # a socket's path is short
        self.environ = os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}
        for name in [name for name in self.environ if name.startswith(("SLURM_", "SBATCH_"))]:
            if name != "SLURM_CONF":
                del self.environ[name]
        try:
            self._configure()
            self._start_munge()
            self._start("slurmctld", ["-D", "-c"])
            for node in self.nodes:
                self._start("slurmd", ["-D", "-N", node], node)
            idle = ["sinfo", "-h", "-N", "-t", "idle", "-o", "%N"]
            wait_for("idle nodes", lambda: len(self.try_(*idle).split()) == len(self.nodes))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for daemon in self.daemons.values():
            daemon.kill()
            daemon.wait()
        while pids := list(self._processes()):  # steps and tasks, which are no children of ours
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *words: str | Path, **variables: str) -> str:
        """What a command prints; it must succeed."""
        done = subprocess.run(
            list(map(str, words)),
            env=self.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT,
        )
        assert done.returncode == 0, (words, done.stdout)
        return done.stdout.strip()

    def try_(self, *words: str) -> str:
        """What a command prints, or nothing if it fails."""
        with suppress(AssertionError):
            return self.run(*words)
        return ""

    def job(self, job: str) -> dict[str, str]:
        """What SLURM knows of a job."""
        words = self.run("scontrol", "show", "job", "-o", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def lose(self, node: str) -> None:
        """End everything of a node at once, as if it lost its power."""
        for pid in self._processes(node):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.daemons[node].wait()

    def _configure(self) -> None:
        ports = _free_ports(len(self.nodes) + 1)
        text = CONFIG.format(folder=self.folder, port=ports[0], limit=LIMIT)
        for node, port in zip(self.nodes, ports[1:], strict=True):
            (self.folder / f"spool-{node}").mkdir()
            text += f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port}"
            text += " CPUs=1 RealMemory=1000\n"
        first = 0
        for name, count in self.partitions.items():
            nodes = ",".join(self.nodes[first : first + count])
            text += f"PartitionName={name} Nodes={nodes} MaxTime=60\n"
            first += count
        (self.folder / "state").mkdir()
        (self.folder / "slurm.conf").write_text(text)
        self.folder.chmod(0o755)

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        socket_path = self.folder / "munge.sock"
        names = {"socket": socket_path, "key-file": key}
        names |= {f"{kind}-file": self.folder / f"munge.{kind}" for kind in ("log", "pid", "seed")}
        self._start("munged", ["-F", "--force", *(f"--{k}={v}" for k, v in names.items())])
        wait_for("munged", socket_path.exists)

    def _start(self, program: str, words: list[str], name: str = "") -> None:
        with ExitStack() as stack:
            log = stack.enter_context((self.folder / f"{name or program}.out").open("wb"))
            self.daemons[name or program] = subprocess.Popen(
                [program, *words], env=self.environ, stdout=log, stderr=log, cwd=self.folder
            )

    def _processes(self, node: str = "") -> Iterator[int]:
        """Whatever runs with this cluster's configuration; of one node, where one is given.

        A slurmd and the parents of its steps have its log open, tasks know the node's name.
        """
        mine = f"SLURM_CONF={self.environ['SLURM_CONF']}".encode()
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                variables = (path / "environ").read_bytes().split(b"\0")
                if mine not in variables or int(path.name) == os.getpid():
                    continue
                opened = {os.readlink(file) for file in (path / "fd").iterdir()}
                log = str(self.folder / f"slurmd-{node}.log")
                if not node or log in opened or f"SLURMD_NODENAME={node}".encode() in variables:
                    yield int(path.name)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        servers = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)
        ]
        return [server.getsockname()[1] for server in servers]
