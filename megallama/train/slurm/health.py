"""Whether a node may train: its GPUs, its disks. Each node of a job asks itself before a run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from megallama.errors import UserError
from megallama.files import write_atomic
from megallama.train.slurm.attempt import Health
from megallama.train.slurm.links import LONGEST

#: Seconds that nvidia-smi has: a GPU that fell off its bus makes it hang.
PATIENCE = 60.0
#: Seconds that eight GPUs have to start NCCL and reduce.
NCCL_PATIENCE = 90.0
#: Bytes that a node's temporary folder must have free.
ROOM = 1 << 30
#: Fields of nvidia-smi → the values that are well, and what is wrong with any other. They are asked
#: one by one: a field that a driver does not know fails the whole call.
FIELDS = {
    "ecc.errors.uncorrected.volatile.total": ("0", "has {} uncorrected ECC errors"),
    "retired_pages.pending": ("No", "has memory pages to retire (reset it)"),
    "remapped_rows.failure": ("0|No", "failed to remap memory rows"),
    "clocks_throttle_reasons.hw_slowdown": ("Not Active", "is slowed down by its hardware"),
    "clocks_throttle_reasons.hw_thermal_slowdown": ("Not Active", "is too hot and slowed down"),
}
UNKNOWN = re.compile(r"\[?(N/A|Not Supported|Unknown Error|)\]?")


def examine(node: str, folder: Path, gpus: int) -> Health:
    """Look at this node, then with its neighbours at the network between them, and write what was
    found to folder/NODE.json: first, after the look, and last.

    `gpus`: how many it must have; 0: none is looked for, and no network.
    """
    Health(node, time.time(), finished=False).write(folder)
    faults, notes = list(_disk_faults(folder)), []
    bandwidth = None
    if gpus and shutil.which("nvidia-smi"):
        faults += _gpu_faults(gpus)
    elif gpus:
        notes.append("no nvidia-smi: GPUs not looked at")
    if gpus > 1 and not faults:
        bandwidth, fault = _bandwidth()
        faults += [fault] if fault else []
        if bandwidth is None:
            notes.append("all-reduce not measured")
    health = Health(node, time.time(), tuple(faults), tuple(notes), bandwidth)
    health.write(folder)
    if gpus:
        links, words = _links(node, 0 if faults else gpus)
        health = replace(health, links=links, notes=(*notes, *words))
        health.write(folder)
    return health


def _disk_faults(folder: Path) -> Iterator[str]:
    """Whether the run directory can be written, and the temporary folder has room."""
    probe = folder / f"disk-{os.uname().nodename}-{os.getpid()}"
    try:
        write_atomic(probe, os.urandom(1 << 20))
        probe.unlink()
    except (UserError, OSError) as error:
        yield str(error)
    temporary = tempfile.gettempdir()
    with suppress(OSError):
        free = shutil.disk_usage(temporary).free
        if free < ROOM:
            yield f"{temporary} has {free >> 20} MiB free"


def _gpu_faults(gpus: int) -> Iterator[str]:
    try:
        listed = _nvidia_smi(["--list-gpus"])
    except subprocess.TimeoutExpired:
        yield "nvidia-smi hangs"
        return
    except (OSError, subprocess.CalledProcessError) as error:
        yield f"nvidia-smi fails ({_reason(error)})"
        return
    found = sum(line.startswith("GPU ") for line in listed)
    if found < gpus:
        yield f"has {found} of {gpus} GPUs"
    for field, (well, wrong) in FIELDS.items():
        try:
            values = _nvidia_smi([f"--query-gpu={field}", "--format=csv,noheader,nounits"])
        except subprocess.CalledProcessError:  # this driver has no such field
            continue
        except subprocess.TimeoutExpired:
            yield f"nvidia-smi hangs on {field}"
            return
        for index, value in enumerate(values):
            if not re.fullmatch(well, value) and not UNKNOWN.fullmatch(value):
                yield f"GPU {index} {wrong.format(value)}"


def _nvidia_smi(words: Sequence[str]) -> list[str]:
    """What it prints, line by line.

    Raises:
        SubprocessError: it fails, or does not end.
    """
    done = _run(["nvidia-smi", *words], PATIENCE)
    done.check_returncode()
    return [line.strip() for line in done.stdout.splitlines()]


def _run(command: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """What a process leaves. One that hangs in a driver cannot be killed, so, unlike
    `subprocess.run`, this does not wait for its end.

    Raises:
        TimeoutExpired: it did not end in time.
    """
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
    try:
        output, error = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        threading.Thread(target=process.communicate, daemon=True).start()  # collects it, if it ends
        raise
    return subprocess.CompletedProcess(command, process.returncode, output, error)


def _bandwidth() -> tuple[float | None, str]:
    """GB/s of an all-reduce over this node's GPUs, and what went wrong; None: not measured.

    In a process of its own, which may hang.
    """
    command = [sys.executable, "-m", "megallama.train.slurm.bandwidth"]
    try:
        done = _run(command, NCCL_PATIENCE)
    except subprocess.TimeoutExpired:
        return None, f"its GPUs do not reduce within {NCCL_PATIENCE:.0f} s"
    except OSError as error:
        return None, f"cannot start a process ({error.strerror})"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return None, f"its GPUs do not reduce ({last})"
    text = done.stdout.strip()
    return (float(text) if text else None), ""


def _links(node: str, gpus: int) -> tuple[dict[str, float], list[str]]:
    """Peer → GB/s of an exchange with it, and what to say of that. `gpus`: 0 for a bad node."""
    command = [sys.executable, "-m", "megallama.train.slurm.exchange", node, str(gpus)]
    try:
        done = _run(command, LONGEST)
    except subprocess.TimeoutExpired:
        return {}, [f"network not looked at: no end within {LONGEST:.0f} s"]
    except OSError as error:
        return {}, [f"network not looked at: cannot start a process ({error.strerror})"]
    last = done.stderr.strip().splitlines()[-1:]
    if done.returncode:
        reason = last or [f"exit code {done.returncode}"]
        return {}, [f"network not looked at ({reason[0]})"]
    found = json.loads(done.stdout or "{}")
    return found, last if 0.0 in found.values() else []


def _reason(error: OSError | subprocess.CalledProcessError) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = (error.stdout + error.stderr).strip().splitlines()
        return lines[-1] if lines else f"exit code {error.returncode}"
    return str(error)
