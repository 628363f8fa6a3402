"""How csrc/ compiles: no access out of bounds, no CUDA kernel that spills registers."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]
CSRC = ROOT / "csrc"
ARCHITECTURES = ("80", "90")


def build_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("csrc_build", CSRC / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = build_module()


def runtime() -> str | None:
    """AddressSanitizer's shared library, which must come before the interpreter's own memory."""
    if shutil.which("c++") is None:
        return None
    command = ["c++", "-print-file-name=libasan.so"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return path if os.path.isabs(path) else None


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory) -> Path:
    """The CPU extension, built with AddressSanitizer."""
    if runtime() is None:
        pytest.skip("no C++ compiler with AddressSanitizer")
    folder = tmp_path_factory.mktemp("asan")
    target = folder / "_native.so"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGALLAMA_CUDA_ARCHS", "")
        build.build(target, folder / "objects", ["-O0", "-fsanitize=address"])
    return target


def run_sanitized(target: Path, more: int) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime() or "",
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc",
    }
    command = [sys.executable, Path(__file__).with_name("sanitized.py"), target, str(more)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_nothing_is_read_or_written_out_of_bounds(sanitized):
    done = run_sanitized(sanitized, 0)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ran portable")


def test_a_column_too_many_is_found(sanitized):
    """The check above can fail."""
    done = run_sanitized(sanitized, 1)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr


def spills(report: str) -> dict[tuple[str, str], int]:
    """Kernel and architecture → the bytes that it spills, from ptxas's report."""
    found, place = {}, None
    for line in report.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for '(sm_\d+)'", line):
            place = match.groups()
        elif match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            assert place is not None, report
            found[place] = int(match[1]) + int(match[2])
    return found


needs_nvcc = pytest.mark.skipif(build.nvcc() is None, reason="no CUDA compiler")


@pytest.fixture(scope="module")
def reports() -> dict[str, str]:
    """What nvcc said of each CUDA source when the extension was built; of an edited one, now."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGALLAMA_CUDA_ARCHS", " ".join(ARCHITECTURES))
        files = build.commands(ROOT / "build" / "objects", [])
    cuda = {item: made for item, made in files.items() if made[0].suffix == ".cu"}
    build.compile_stale(cuda)
    return {source.stem: build.report(item).read_text() for item, (source, _) in cuda.items()}


@needs_nvcc
@pytest.mark.parametrize("source", sorted(CSRC.rglob("*.cu")), ids=lambda path: path.stem)
def test_cuda_compiles_and_no_kernel_spills(reports, source):
    found = spills(reports[source.stem])
    assert {architecture for _, architecture in found} == {f"sm_{a}" for a in ARCHITECTURES}
    assert {place: size for place, size in found.items() if size} == {}


PLANTED = """
// Up to 32 registers a thread, and 64 numbers that are all needed at the end.
__global__ void __launch_bounds__(1024, 2) planted(float* x) {
  float held[64];
#pragma unroll
  for (int i = 0; i < 64; i++) held[i] = x[threadIdx.x + 1024 * i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; i++) x[threadIdx.x + 1024 * i] = held[63 - i] * held[i ^ 5];
}
"""


@needs_nvcc
def test_a_spill_is_found(tmp_path):
    """The check above can fail."""
    source, item = tmp_path / "planted.cu", tmp_path / "planted.o"
    source.write_text(PLANTED)
    flags = build.nvcc_flags(ARCHITECTURES)
    build.compile_stale({item: (source, [build.nvcc(), *flags, "-c", source, "-o", item])})
    found = spills(build.report(item).read_text())
    assert {architecture for _, architecture in found} == {f"sm_{a}" for a in ARCHITECTURES}
    assert min(found.values()) > 0


def test_what_is_older_than_its_source_is_compiled_again(tmp_path):
    """And what was cut short, which has no report; nothing else. Python plays the compiler."""
    source, item = tmp_path / "a.py", tmp_path / "a.o"
    report = build.report(item)

    def said(word: str) -> bool:
        source.write_text(f"print({word!r}); open({str(item)!r}, 'w')")
        os.utime(source, (1, 1))
        build.compile_stale({item: (source, [sys.executable, str(source)])})
        return word in report.read_text()

    assert said("first")
    assert not said("second"), "its time is that of before"
    os.utime(report, (0, 0))
    assert said("second")
    report.unlink()
    assert said("third")


def test_without_a_compiler_the_build_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match=r"no-such-compiler not found; apt install g\+\+"):
        build.build(tmp_path / "_native.so", tmp_path / "objects")
