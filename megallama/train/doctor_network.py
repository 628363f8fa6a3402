"""What the ranks of a job talk over: interfaces, names, gloo and NCCL."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as c10d

from megallama.dist.connect import connect
from megallama.errors import UserError
from megallama.train.finding import Finding

INTERFACES, INFINIBAND = Path("/sys/class/net"), Path("/sys/class/infiniband")
LOOPBACK = "127.0.0.1"
#: Seconds that two threads get to meet on one machine, and a name server to answer.
PATIENCE = 30.0
#: Seconds from which a name is slow: each connection to the job's store may look one up.
SLOW_NAME = 1.0


def network() -> Iterator[Finding]:
    """Interfaces, names, NCCL, and gloo on loopback and as several machines would use it."""
    yield Finding("network interfaces", ", ".join(_interfaces()) or "none but loopback")
    if adapters := _names(INFINIBAND):
        yield Finding("InfiniBand", ", ".join(adapters))
    yield _name_service()
    fault = _within(PATIENCE, lambda: _exchange(LOOPBACK))
    if fault:
        remedy = "training in several processes needs it: bring up the interface lo"
        yield Finding("gloo on loopback", fault, "broken", remedy)
        return
    yield Finding("gloo on loopback", "two ranks exchange")
    # Between machines gloo listens where its host name leads, unless it is told an interface.
    chosen = os.environ.get("GLOO_SOCKET_IFNAME", "")
    subject = f"gloo on {chosen}" if chosen else "gloo on its own choice of interface"
    if fault := _within(PATIENCE, lambda: _exchange(None)):
        remedy = "set GLOO_SOCKET_IFNAME to an interface that the machines share"
        yield Finding(subject, f"{fault} (one machine needs it not)", "note", remedy)
    else:
        yield Finding(subject, "two ranks exchange")
    yield _nccl()


def _interfaces() -> Iterator[str]:
    """Such as `eth0 (up, 10000 Mb/s)`."""
    for name in _names(INTERFACES):
        if name == "lo":
            continue
        state = speed = ""
        with suppress(OSError):
            state = (INTERFACES / name / "operstate").read_text().strip()
            speed = (INTERFACES / name / "speed").read_text().strip()  # refused where it is down
        known = f", {speed} Mb/s" if speed.isdecimal() else ""
        yield f"{name} ({state or 'unknown'}{known})"


def _names(folder: Path) -> list[str]:
    with suppress(OSError):
        return sorted(path.name for path in folder.iterdir())
    return []


def _name_service() -> Finding:
    """Whether the name of this machine and of loopback is found at once."""
    began = time.monotonic()
    name = socket.gethostname()
    fault = _within(PATIENCE, lambda: _look_up(name))
    seconds = time.monotonic() - began
    subject = f"name of this machine, {name}"
    if fault:
        remedy = f"add a line `127.0.1.1 {name}` to /etc/hosts, or mend the name service"
        return Finding(subject, f"{fault} (several machines need it)", "note", remedy)
    if seconds > SLOW_NAME:
        remedy = "start-up waits for it at every connection: mend the name service, or /etc/hosts"
        return Finding(subject, f"takes {seconds:.1f} s to look up", "note", remedy)
    return Finding(subject, "is found at once")


def _look_up(name: str) -> str:
    try:
        socket.getaddrinfo(name, None)
        socket.getnameinfo((LOOPBACK, 0), 0)
    except OSError as error:
        return f"is not found ({error.strerror or error})"
    return ""


def _exchange(hostname: str | None) -> str:
    """Two ranks of this process add up a number over gloo; what goes wrong."""
    store = c10d.HashStore()  # type: ignore[attr-defined]
    faults: list[str] = []

    def rank(own: int) -> None:
        try:
            groups = connect(
                store,
                own,
                {"world": (0, 1)},
                torch.device("cpu"),
                timeout=timedelta(seconds=PATIENCE / 2),
                hostname=hostname,
            )
            total = groups["world"].all_reduce(torch.ones(1)).wait()
            groups.close()
            if total.item() != 2:
                faults.append(f"1 + 1 is {total.item()}")
        except (UserError, RuntimeError) as error:
            faults.append(str(error).partition("\n")[0])

    threads = [threading.Thread(target=rank, args=[own], daemon=True) for own in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return faults[0] if faults else ""


def _within(seconds: float, look: Callable[[], str]) -> str:
    """What `look` says, or that it did not end in time. Its thread is left behind then."""
    said: list[str] = []
    thread = threading.Thread(target=lambda: said.append(look()), daemon=True)
    thread.start()
    thread.join(seconds)
    return said[0] if said else f"no answer in {seconds:g} s"


def _nccl() -> Finding:
    if not c10d.is_nccl_available():
        if torch.cuda.is_available():
            remedy = "install a PyTorch with NCCL"
            return Finding("NCCL", "not in this PyTorch: one GPU at most", "note", remedy)
        return Finding("NCCL", "not in this PyTorch, and not needed without a GPU")
    version = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else ""
    return Finding("NCCL", version or "in this PyTorch, and no GPU here")
