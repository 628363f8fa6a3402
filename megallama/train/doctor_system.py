"""What training asks of the system: memory, disks, open files, the clock."""

from __future__ import annotations

import ctypes
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from megallama.files import sync
from megallama.train.finding import Finding

#: Bytes that are written to see how fast a disk is.
TRIAL = 64 << 20
#: Below so many bytes free, a disk is soon full; below so many a second, saves take long.
LITTLE_ROOM, SLOW_DISK = 10 << 30, 50e6
#: Open files: a rank has a connection to each of its peers, the store's host one to every rank.
FEW_FILES = 4096
#: The state of adjtimex(2) in which nothing keeps the clock right.
UNSYNCHRONISED = 5
NETWORK_FILE_SYSTEMS = ("nfs", "nfs4", "lustre", "beegfs", "gpfs", "cifs", "fuse.sshfs", "ceph")


def system(folder: Path) -> Iterator[Finding]:
    """`folder`: where runs are to be written; it need not be there yet."""
    yield from _memory()
    yield from _run_disk(folder)
    yield _temporary_files()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < FEW_FILES:
        remedy = f"`ulimit -n {FEW_FILES if hard < 0 else min(hard, FEW_FILES)}` for large jobs"
        yield Finding("open files", f"at most {soft}", "note", remedy)
    else:
        yield Finding("open files", "no limit" if soft < 0 else f"at most {soft}")
    yield _clock()


def _memory() -> Iterator[Finding]:
    with suppress(OSError):
        lines = (line.partition(":") for line in Path("/proc/meminfo").read_text().splitlines())
        kib = {name: int(value.split()[0]) for name, _, value in lines}
        total, free = kib["MemTotal"] / 2**20, kib["MemAvailable"] / 2**20
        yield Finding("memory", f"{free:.1f} of {total:.1f} GiB available")


def _run_disk(folder: Path) -> Iterator[Finding]:
    """Of the folder, or of the nearest one above it that is there."""
    here = folder.absolute()
    while not here.exists() and here != here.parent:
        here = here.parent
    subject = f"disk of {folder}"
    try:
        room = os.statvfs(here)
        free = room.f_bavail * room.f_frsize
        if free < TRIAL:
            yield Finding(subject, f"{free / 2**20:.0f} MiB free", "broken", "free some room")
            return
        speed, latency = _write(here)
    except OSError as error:
        remedy = "make it writable, or choose another run.root"
        yield Finding(subject, f"{here}: {error.strerror or error}", "broken", remedy)
        return
    kind = _file_system(here)
    words = f"{kind}, {free / 2**30:.1f} GiB free"
    if free < LITTLE_ROOM:
        remedy = (
            "a checkpoint takes 12 bytes a parameter, and checkpoint.keep + 1 are there at once"
        )
        yield Finding(subject, words, "note", remedy)
    else:
        yield Finding(subject, words)
    words = f"{speed / 1e6:,.0f} MB/s written and synced, {1e3 * latency:.1f} ms a sync"
    if speed < SLOW_DISK:
        yield Finding(subject, words, "note", "saves take long: choose another run.root")
    else:
        yield Finding(subject, words)
    if kind in NETWORK_FILE_SYSTEMS:
        remedy = "see what docs/reliability.md asks of it"
        yield Finding(subject, "a network file system", "note", remedy)


def _write(folder: Path) -> tuple[float, float]:
    """Bytes a second of one large synced file, and the seconds of a small sync. Nothing stays."""
    block = os.urandom(TRIAL >> 3)
    with tempfile.TemporaryFile(dir=folder, prefix="megallama-doctor-") as file:
        began = time.monotonic()
        for _ in range(8):
            file.write(block)
        sync(file)
        seconds = time.monotonic() - began
        began = time.monotonic()
        file.write(b"0")
        sync(file)
        return TRIAL / seconds, time.monotonic() - began


def _file_system(path: Path) -> str:
    """Such as `ext4`."""
    with suppress(OSError):
        mounts = (line.split() for line in Path("/proc/mounts").read_text().splitlines())
        # A blank in a path is written \\040; the last of mounts at one place is the one seen.
        named = [(m[1].replace("\\040", " "), m[2]) for m in mounts]
        inside = [(len(place), kind) for place, kind in named if path.is_relative_to(place)]
        longest = max(length for length, _ in inside)
        return [kind for length, kind in inside if length == longest][-1]
    return "unknown file system"


def _temporary_files() -> Finding:
    """Local workers meet in a file there."""
    try:
        folder = tempfile.gettempdir()
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        remedy = "local workers meet there: set TMPDIR to a folder that can be written"
        return Finding("temporary files", error.strerror or str(error), "broken", remedy)
    return Finding("temporary files", f"{folder} can be written")


def _clock() -> Finding:
    now = f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}"
    state = 0
    with suppress(AttributeError):  # not Linux
        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))
    if state == UNSYNCHRONISED:
        remedy = "run a time service, or logs of several machines cannot be compared"
        return Finding("clock", f"{now}, not synchronised", "note", remedy)
    return Finding("clock", now)
