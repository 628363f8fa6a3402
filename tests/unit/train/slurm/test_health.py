"""What a node finds out about itself, with stand-ins for nvidia-smi and the GPUs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from megallama.train.slurm import bandwidth, health
from megallama.train.slurm.attempt import Health
from megallama.train.slurm.health import examine

WELL = {
    "ecc.errors.uncorrected.volatile.total": ["0", "0"],
    "retired_pages.pending": ["No", "[N/A]"],
    "clocks_throttle_reasons.hw_slowdown": ["Not Active", "Not Active"],
    "clocks_throttle_reasons.hw_thermal_slowdown": ["Not Active", "Not Active"],
}

STAND_IN = f"""#!{sys.executable}
import json, sys, time
values = json.load(open(sys.argv[0] + ".json"))
if "hangs" in values and values["hangs"] in sys.argv[1]:
    time.sleep(60)
if sys.argv[1] == "--list-gpus":
    for index in range(values["gpus"]):
        print(f"GPU {{index}}: NVIDIA A100 (UUID: GPU-{{index}})")
    sys.exit(values.get("code", 0))
field = sys.argv[1].partition("=")[2]
if field not in values:
    sys.exit(f'Field "{{field}}" is not a valid field to query.')
print(*values[field], sep="\\n")
"""


class Node:
    def __init__(self, folder: Path) -> None:
        self.folder, self.program = folder, folder / "bin/nvidia-smi"
        (folder / "bin").mkdir()
        (folder / "health").mkdir()

    def gpus(self, **values: object) -> None:
        """nvidia-smi shows two well GPUs, but for these values."""
        self.program.write_text(STAND_IN)
        self.program.chmod(0o755)
        fields = {key.replace("__", "."): value for key, value in values.items()}
        self.program.with_suffix(".json").write_text(json.dumps({"gpus": 2, **WELL, **fields}))

    def examine(self, gpus: int) -> Health:
        found = examine("n1", self.folder / "health", gpus)
        written = json.loads((self.folder / "health/n1.json").read_text())
        assert written["faults"] == list(found.faults)
        assert written["finished"]
        return found


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    node = Node(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(health, "_bandwidth", lambda: (230.0, ""))
    monkeypatch.setattr(health, "_links", lambda node, gpus: ({"n2": float(gpus)}, []))
    return node


def test_two_well_gpus(node: Node) -> None:
    node.gpus()
    found = node.examine(2)
    assert (found.faults, found.notes, found.bandwidth) == ((), (), 230.0)
    assert found.links == {"n2": 2.0}


FAULTS = {
    "one is missing": ({"gpus": 1}, "has 1 of 2 GPUs"),
    "ecc": (
        {"ecc__errors__uncorrected__volatile__total": ["0", "3"]},
        "GPU 1 has 3 uncorrected ECC errors",
    ),
    "pages": ({"retired_pages__pending": ["Yes", "No"]}, "GPU 0 has memory pages to retire"),
    "rows": ({"remapped_rows__failure": ["0", "1"]}, "GPU 1 failed to remap memory rows"),
    "slow": ({"clocks_throttle_reasons__hw_slowdown": ["Active", "Not Active"]}, "GPU 0 is slowed"),
    "driver": ({"code": 9, "gpus": 0}, "nvidia-smi fails"),
}


@pytest.mark.parametrize("values, words", FAULTS.values(), ids=FAULTS)
def test_a_bad_gpu_is_named(node: Node, values: dict[str, object], words: str) -> None:
    node.gpus(**values)
    found = node.examine(2)
    assert len(found.faults) == 1
    assert found.faults[0].startswith(words)
    assert found.bandwidth is None, "GPUs known to be bad are not put to work"
    assert found.links == {"n2": 0.0}


HANGS = {"at all": ("--list-gpus", ""), "on a field": ("retired", " on retired_pages.pending")}


@pytest.mark.parametrize("word, words", HANGS.values(), ids=HANGS)
def test_a_driver_that_hangs_is_named_and_not_waited_for(
    word: str, words: str, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot be killed."""
    node.gpus(hangs=word)
    run, kill, hung = health._run, subprocess.Popen.kill, list[subprocess.Popen[str]]()

    def patience(command: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str]:
        return run(command, 0.1 if word in command[1] else seconds)

    monkeypatch.setattr(health, "_run", patience)
    monkeypatch.setattr(subprocess.Popen, "kill", lambda process: hung.append(process))
    found = node.examine(2)
    (process,) = hung
    still = process.poll() is None
    kill(process)
    assert found.faults == (f"nvidia-smi hangs{words}",)
    assert still


def test_without_nvidia_smi_disks_alone_are_looked_at(node: Node) -> None:
    found = node.examine(2)
    assert found.faults == ()
    assert found.notes == ("no nvidia-smi: GPUs not looked at",)
    assert node.examine(0).notes == ()
    assert node.examine(0).links == {}


def test_a_full_temporary_folder(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=5 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "has 5 MiB free" in node.examine(0).faults[0]


def test_a_run_directory_that_cannot_be_written(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    (node.folder / "health" / f"disk-{os.uname().nodename}-{os.getpid()}").mkdir()
    (fault,) = node.examine(0).faults
    assert "disk-" in fault


BANDWIDTH = {
    "measured": ("print(231.5)", (231.5, "")),
    "no GPUs": ("print()", (None, "")),
    "failed": (
        "raise RuntimeError('wrong sums')",
        (None, "its GPUs do not reduce (RuntimeError: wrong sums)"),
    ),
    "hangs": ("import time; time.sleep(60)", (None, "its GPUs do not reduce within 2 s")),
}


def stand_in(script: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is started as Python runs `script`; one that sleeps is given up after 2 s."""
    python = folder / "python"
    python.write_text(f"#!{sys.executable}\n{script}\n")
    python.chmod(0o755)
    for patience in ("NCCL_PATIENCE", "LONGEST"):
        monkeypatch.setattr(health, patience, 2.0 if "sleep" in script else 60.0)
    monkeypatch.setattr(sys, "executable", str(python))


@pytest.mark.parametrize("script, wanted", BANDWIDTH.values(), ids=BANDWIDTH)
def test_the_bandwidth_is_measured_in_a_process_that_may_hang(
    script: str, wanted: tuple[float | None, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(script, tmp_path, monkeypatch)
    assert health._bandwidth() == wanted


LINKS = {
    "measured": ("print('{\"n2\": 24.0}')", ({"n2": 24.0}, [])),
    "one task": ("", ({}, [])),
    "no exchange": (
        "import sys; print('{\"n2\": 0.0}'); sys.exit(print('no route', file=sys.stderr))",
        ({"n2": 0.0}, ["no route"]),
    ),
    "failed": ("raise OSError('no store')", ({}, ["network not looked at (OSError: no store)"])),
    "hangs": (
        "import time; time.sleep(60)",
        ({}, ["network not looked at: no end within 2 s"]),
    ),
}


@pytest.mark.parametrize("script, wanted", LINKS.values(), ids=LINKS)
def test_the_network_is_looked_at_in_a_process_that_may_hang(
    script: str,
    wanted: tuple[dict[str, float], list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand_in(script, tmp_path, monkeypatch)
    assert health._links("n1", 2) == wanted


def test_without_two_gpus_nothing_is_measured() -> None:
    assert bandwidth.measure() is None
