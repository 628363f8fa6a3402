"""One writer: a file in the run directory that says which live job writes there.

`writer.json` names the job and is written anew every few seconds by a thread of the process that
holds it. Who comes later and finds one that is alive is refused. Whether it is alive is not asked
of a clock, for those of two machines differ, nor of a lock, which file servers grant twice: on one
machine the process is looked for, from another the file is watched for a change.

Two that take over the same file at once see it when they look again, and then at every renewal:
the last to have written it stays, the other may not save any more.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megallama.errors import ConfigError, UserError
from megallama.files import refuse_os_errors
from megallama.train.meeting import Meeting

LEASE = "writer.json"
#: Seconds from one renewal to the next.
INTERVAL = 10.0
#: Renewals that must fail to come before a file is called stale. NFS shows another client's file
#: up to 60 s late: six renewals.
MISSED = 7
#: Renewals of this holder's own that failed to come, after which a file that is gone may have been
#: another's meanwhile: one that a launcher started does not wait.
SLEPT = 3
#: Seconds after which a file that was taken over is looked at again.
SETTLE = 0.2


@dataclass(frozen=True)
class Holder:
    """Who writes. `machine` tells apart what share a host name: a boot, a container."""

    token: str
    host: str
    machine: str
    pid: int
    started: int
    job: str
    restarts: int
    interval: float
    renewals: int = 0
    time: float = 0.0
    attempt: int = 0
    """Of the job since its last restart, from 1 where our job script made it."""

    def __str__(self) -> str:
        job = f"job {self.job}, " if self.job else ""
        return f"{job}process {self.pid} on {self.host}"

    def replaces(self, other: Holder) -> bool:
        """Whether the launcher started this one because it had ended that one."""
        own, others = (self.restarts, self.attempt), (other.restarts, other.attempt)
        return bool(self.job) and self.job == other.job and own > others


def this_process(environ: Mapping[str, str], interval: float = INTERVAL) -> Holder:
    """The holder that this process would be."""
    return Holder(
        token=uuid.uuid4().hex,
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        started=_started(os.getpid()) or 0,
        job=environ.get("SLURM_JOB_ID", ""),
        restarts=int(environ.get("SLURM_RESTART_COUNT", "0") or 0),
        interval=interval,
        attempt=_attempt(environ),
    )


def _attempt(environ: Mapping[str, str]) -> int:
    """The last number of ATTEMPT, the job script's `…/JOB.RESTARTS.NUMBER`; else 0."""
    job, _, number = Path(environ.get("ATTEMPT", "")).name.rpartition(".")
    job = job.rpartition(".")[0]
    ours = bool(job) and job == environ.get("SLURM_JOB_ID") and number.isdecimal()
    return int(number) if ours else 0


class Lease:
    """The right to write in a run directory, while entered."""

    def __init__(
        self, directory: Path, holder: Holder, say: Callable[[str], None] = lambda text: None
    ) -> None:
        self.path, self.holder, self._say = directory / LEASE, holder, say
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._refusal = ""
        self._held = False

    def take(self) -> None:
        """Become the writer, waiting until a silent holder elsewhere is known to be gone.

        Raises:
            ConfigError: another one is alive, or the directory cannot be written.
        """
        with refuse_os_errors("write", self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self._write(first=True):
                other = _read(self.path)
                if other is not None:
                    self._outlast(other)
                self._write()
                time.sleep(SETTLE)
        self._refuse_taken()
        self._held = True
        self._thread.start()

    @property
    def replaced(self) -> bool:
        """Whether another job took over, as the last renewal found."""
        return bool(self._refusal)

    def check(self) -> None:
        """Make sure that this is still the writer.

        Raises:
            ConfigError: another job took over, which it may where this one was silent for long.
        """
        if self._held:
            self._refuse_taken()

    def release(self) -> None:
        """Let the next one write. A directory that was made for the lease alone goes, too."""
        if not self._held:
            return
        self._held = False
        self._over.set()
        self._thread.join()
        with suppress(OSError):
            found = _read(self.path)
            if found is not None and found.token == self.holder.token:
                self.path.unlink()
            self.path.parent.rmdir()

    def _outlast(self, other: Holder) -> None:
        """Return once `other` is known not to write any more."""
        if self.holder.replaces(other):
            return
        if other.machine == self.holder.machine:
            if _started(other.pid) == other.started:
                raise ConfigError(self._refused(other))
            self._say(f"took over from {other}, which is gone")
            return
        patience = MISSED * other.interval
        self._say(f"watching for {patience:g} s whether {other} still writes here")
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            time.sleep(min(1.0, other.interval / 4))
            now = _read(self.path)
            if now is None:
                return
            if now != other:
                raise ConfigError(self._refused(now))
        self._say(f"took over from {other}, silent for {patience:g} s")

    def _refused(self, other: Holder) -> str:
        return (
            f"{self.path.parent}: {other} writes there; wait for its end, stop it, or choose "
            "another run.name"
        )

    def _refuse_taken(self) -> None:
        with suppress(OSError):  # unreadable for a moment: the next look tells
            found = _read(self.path)
            slept = time.time() - self.holder.time > SLEPT * self.holder.interval
            if found is None and slept:
                self._refusal = (
                    f"{self.path.parent}: another job wrote there while this one was stopped, and "
                    "has ended; start it again to go on from the newest checkpoint"
                )
            elif found is not None and found.token != self.holder.token:
                self._refusal = self._refused(found)
        if self._refusal:
            raise ConfigError(self._refusal)

    def _renew(self) -> None:
        while not self._over.wait(self.holder.interval):
            with suppress(UserError, OSError):  # taken, as `check` says; or a disk full for now
                self._refuse_taken()
                self._write()

    def _write(self, first: bool = False) -> bool:
        """Write this holder; with `first`, only where no file is, and returns whether.

        Each holder has a temporary file of its own. Nothing is fsynced: a lease need not outlast a
        power failure.
        """
        self.holder = replace(self.holder, renewals=self.holder.renewals + 1, time=time.time())
        own = self.path.with_name(f"{LEASE}.{self.holder.token}")
        try:
            own.write_text(json.dumps(asdict(self.holder)))
            if not first:
                os.replace(own, self.path)
                return True
            with suppress(FileExistsError):
                os.link(own, self.path)
                return True
            return False
        finally:
            own.unlink(missing_ok=True)


@contextmanager
def sole_writer(
    directory: Path, meeting: Meeting, say: Callable[[str], None]
) -> Iterator[Lease | None]:
    """Holds the lease of a run directory: on the rank that leads, which writes for all.

    Raises:
        ConfigError: another job is alive that writes there, on every rank.
    """
    lease = Lease(directory, this_process(os.environ), say) if meeting.leads else None

    def take() -> str:
        if lease is not None:
            lease.take()
        return ""

    meeting.hold(take)
    try:
        yield lease
    finally:
        if lease is not None:
            lease.release()


def _read(path: Path) -> Holder | None:
    """Who is written there; None where nobody is, or nobody that can be read."""
    try:
        return Holder(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):  # not ours: written by hand, or torn by a power failure
        return None


def _machine() -> str:
    """This boot of this machine, and the processes that can be seen from here."""
    found = [socket.gethostname()]
    with suppress(OSError):
        found.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        found.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(found)


def _started(pid: int) -> int | None:
    """When a process of this machine was started, in ticks; None where it does not run.

    A number is soon another process's: the time tells them apart. Without /proc it is 0.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self").exists():
            return None
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return 0
    return None if fields[0] in "ZX" else int(fields[19])
