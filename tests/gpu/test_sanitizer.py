"""compute-sanitizer over every kernel: no access out of bounds, no race in shared memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_sanitized(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    command += [sys.executable, "-m", "tests.gpu.sanitized", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=200
    )


@pytest.fixture
def sanitizer(device) -> None:
    """Skips where there is none, or where it does not reach the GPU (some virtual machines)."""
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("no compute-sanitizer")
    script = "import torch; torch.ones(1, device='cuda')"
    command = ["compute-sanitizer", sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not support this GPU here")


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_no_fault_is_found(sanitizer, tool):
    done = run_sanitized(tool)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "ran cuda" in done.stdout


def test_a_column_too_many_is_found(sanitizer):
    """The check above can fail."""
    done = run_sanitized("memcheck", "1")
    assert done.returncode != 0
    assert "Invalid __global__" in done.stdout
