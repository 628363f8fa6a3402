"""The doctor: what it finds broken, what it lets pass, and that each problem has its remedy."""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import socket
import threading
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megallama.cli.main import main
from megallama.errors import LostError
from megallama.kernels import native
from megallama.train import doctor, doctor_network, doctor_system, finding
from megallama.train.finding import Finding

Captured = pytest.CaptureFixture[str]


def of(subject: str, findings: Iterable[Finding]) -> Finding:
    """The first finding about something that begins so."""
    return next(found for found in findings if found.subject.startswith(subject))


def refuse(error: Exception) -> Any:
    def refused(*arguments: Any, **named: Any) -> Any:
        raise error

    return refused


def test_a_machine_that_works_is_well(capsys: Captured, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    assert main(["doctor", "--root", str(tmp_path / "runs"), "--json", str(report)]) == 0
    printed = capsys.readouterr().out.splitlines()
    written = json.loads(report.read_text())
    assert written["working"] is True
    found = [Finding(**fields) for fields in written["findings"]]
    assert [str(one) for one in found] == printed[:-1]
    assert {one.level for one in found} <= {"ok", "note"}
    assert all(one.remedy for one in found if one.level != "ok")
    assert of("torch", found).found == torch.__version__
    assert of("gloo on loopback", found).found == "two ranks exchange"
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"], "nothing else stays"


def test_what_training_cannot_do_without_ends_in_78(
    capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a package is missing, nothing that would import it is tried."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "xxhash":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    report = tmp_path / "report.json"
    assert main(["doctor", "--json", str(report)]) == 78
    out = capsys.readouterr().out
    assert "broken: xxhash: not installed; pip install xxhash\n" in out
    assert "1 broken" in out.splitlines()[-1]
    assert "processor" not in out
    assert json.loads(report.read_text())["working"] is False


def test_a_report_that_cannot_be_written_is_one_line(capsys: Captured) -> None:
    assert main(["doctor", "--json", "/dev/null/report.json"]) == 78
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("megallama: error: cannot write ")


@pytest.mark.parametrize("version", ["2.10.1", "2.14.0+cu130", "3.0.0"])
def test_a_torch_that_nobody_tested_is_said(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    found = of("torch", finding.packages())
    assert found.level == "note"
    assert found.remedy == "install one of 2.11 to 2.13"


def test_missing_kernels_are_slow_and_wrong_ones_are_broken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert of("kernels", doctor._kernels()).level == "ok"
    with monkeypatch.context() as patch:
        patch.setattr(native, "extension", lambda: None)
        found = of("kernels", doctor._kernels())
        assert (found.level, found.found) == ("note", "not built, several times slower")
    with monkeypatch.context() as patch:
        patch.setattr(doctor, "squared_norms", lambda tensors: torch.ones(1))
        found = of("kernels on cpu", doctor._kernels())
        assert found.level == "broken"
        assert "a sum of squares is 1.0, not 332833500.0" in found.found
    monkeypatch.setattr(doctor, "squared_norms", refuse(RuntimeError("no kernel image\nmore")))
    found = of("kernels on cpu", doctor._kernels())
    assert (found.level, found.found.endswith(": no kernel image")) == ("broken", True)


def test_a_driver_without_a_torch_that_uses_it_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "version").touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "NVIDIA", tmp_path / "version")
    assert of("GPU", doctor._devices()).level == "note"
    monkeypatch.setattr(doctor, "NVIDIA", tmp_path / "nothing")
    assert not any(found.subject == "GPU" for found in doctor._devices())


# The network


def test_gloo_that_fails_on_loopback_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_network, "connect", refuse(LostError("nobody there\nmore")))
    found = list(doctor_network.network())
    assert found[-1].subject == "gloo on loopback"
    assert (found[-1].level, found[-1].found) == ("broken", "nobody there")


def test_gloo_that_fails_elsewhere_is_no_trouble_for_one_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    found = of("gloo on nowhere0", doctor_network.network())
    assert found.level == "note"
    assert "one machine needs it not" in found.found


def test_a_network_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    def hang(*arguments: Any, **named: Any) -> Any:
        over.wait()
        raise LostError("too late")

    monkeypatch.setattr(doctor_network, "connect", hang)
    monkeypatch.setattr(doctor_network, "PATIENCE", 0.05)
    found = of("gloo on loopback", doctor_network.network())
    over.set()
    assert (found.level, found.found) == ("broken", "no answer in 0.05 s")


def test_names_that_are_not_found_or_slow_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(doctor_network, "_look_up", lambda name: "")
        patch.setattr(doctor_network, "SLOW_NAME", 3600.0)
        assert doctor_network._name_service().level == "ok"
        patch.setattr(doctor_network, "SLOW_NAME", 0.0)
        assert "s to look up" in doctor_network._name_service().found
    unknown = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    monkeypatch.setattr(socket, "getaddrinfo", refuse(unknown))
    found = doctor_network._name_service()
    assert (found.level, "Name or service not known" in found.found) == ("note", True)
    assert "/etc/hosts" in found.remedy


# The system


def test_a_folder_that_is_not_there_yet_is_judged_by_its_disk(tmp_path: Path) -> None:
    found = list(doctor_system._run_disk(tmp_path / "a" / "b"))
    assert all(one.level != "broken" for one in found)
    assert "MB/s written and synced" in found[1].found
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_broken(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (found,) = doctor_system._run_disk(tmp_path / "file" / "runs")
    assert (found.level, found.found) == ("broken", f"{tmp_path / 'file'}: Not a directory")
    assert "run.root" in found.remedy


@pytest.mark.parametrize("free, level", [(1 << 20, "broken"), (1 << 30, "note"), (1 << 40, "ok")])
def test_room_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, level: str
) -> None:
    room = SimpleNamespace(f_bavail=free // 4096, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda path: room)
    assert next(doctor_system._run_disk(tmp_path)).level == level


def test_slow_disks_and_network_file_systems_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_system, "_write", lambda folder: (1e6, 0.5))
    monkeypatch.setattr(doctor_system, "_file_system", lambda path: "nfs4")
    _, speed, kind = doctor_system._run_disk(tmp_path)
    assert (speed.level, speed.found) == ("note", "1 MB/s written and synced, 500.0 ms a sync")
    assert "docs/reliability.md" in kind.remedy


def test_file_systems_are_those_that_the_kernel_names() -> None:
    assert doctor_system._file_system(Path("/proc/self")) == "proc"
    assert doctor_system._file_system(Path("/sys")) == "sysfs"


@pytest.mark.parametrize("state, level", [(0, "ok"), (5, "note")])
def test_a_clock_that_nothing_keeps_right_is_said(
    monkeypatch: pytest.MonkeyPatch, state: int, level: str
) -> None:
    libc = SimpleNamespace(adjtimex=lambda buffer: state)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libc)
    assert doctor_system._clock().level == level


def test_temporary_files_and_open_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert doctor_system._temporary_files().level == "ok"
    limits = doctor_system.resource
    monkeypatch.setattr(limits, "getrlimit", lambda kind: (1024, 2048))
    found = of("open files", doctor_system.system(tmp_path))
    assert (found.level, found.remedy) == ("note", "`ulimit -n 2048` for large jobs")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    found = doctor_system._temporary_files()
    assert (found.level, found.found) == ("broken", "No such file or directory")
