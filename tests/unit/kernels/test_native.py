"""The extension: it is there where it can be, and its absence is said once."""

from __future__ import annotations

import importlib
import platform
import shutil
import warnings

import pytest
import torch

from megallama.kernels import native
from megallama.kernels.swiglu import swiglu_forward


def test_a_machine_with_a_compiler_has_kernels():
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    assert native.extension() is not None
    assert "cpu" in native.variants()


def test_the_best_variant_that_the_machine_can_run():
    if platform.machine() != "x86_64" or native.extension() is None:
        pytest.skip("one variant")
    with open("/proc/cpuinfo") as file:
        flags = next(line for line in file if line.startswith("flags")).split()
    expected = "portable"
    if {"avx2", "fma"} <= set(flags):
        expected = "avx2"
        if {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"} <= set(flags):
            expected = "avx512"
    assert native.variants()["cpu"].__name__.rpartition(".")[2] == expected


@pytest.fixture
def without_extension(monkeypatch):
    """An interpreter that was installed where there is no compiler."""

    def fail(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", fail)
    for function in (native.extension, native.variants):
        function.cache_clear()
    yield
    for function in (native.extension, native.variants):
        function.cache_clear()


def test_without_the_extension_the_references_run_and_that_is_said_once(without_extension):
    gate_up = torch.randn(3, 8)
    with pytest.warns(UserWarning, match="without its kernels.*compiler"):
        act = swiglu_forward(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    assert torch.equal(act, torch.nn.functional.silu(gate) * up)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        swiglu_forward(gate_up)
