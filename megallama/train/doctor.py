"""What a machine has of what training uses: versions, devices, kernels."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from megallama import __version__
from megallama.kernels import native
from megallama.kernels.squared_norm import squared_norms
from megallama.train.device import bf16_is_emulated, device_name
from megallama.train.doctor_network import network
from megallama.train.doctor_system import system
from megallama.train.finding import Finding

NVIDIA = Path("/proc/driver/nvidia/version")


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    names = ("torch", "numpy", "sentencepiece", "safetensors")
    packages = {name: importlib.metadata.version(name) for name in names}
    return {"megallama": __version__, "python": platform.python_version(), **packages}


def processor() -> dict[str, str | int]:
    """The CPU: its model as the system names it, the cores this process may use, its bf16 units."""
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if "model name" in line]
        model = names[0] if names else model
    amx, avx512 = torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()
    units = "AMX" if amx else "AVX-512" if avx512 else "none"
    return {"model": model, "threads": torch.get_num_threads(), "bf16_units": units}


def findings(folder: Path) -> Iterator[Finding]:
    """All but the packages. `folder`: where runs are to be written."""
    yield from _devices()
    yield from _kernels()
    yield from network()
    yield from system(folder)


def _devices() -> Iterator[Finding]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cpu = processor()
    words = f"{cpu['model']}, {cpu['threads']} threads, bf16 units: {cpu['bf16_units']}"
    yield Finding("processor", words)
    for index in range(torch.cuda.device_count() if device.type == "cuda" else 0):
        about = torch.cuda.get_device_properties(index)
        words = f"{about.name}, {about.total_memory / 2**30:.0f} GiB, sm_{about.major}{about.minor}"
        yield Finding(f"GPU {index}", words)
    if device.type == "cpu" and NVIDIA.exists():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without it"
        remedy = "install a PyTorch for CUDA that this driver runs"
        yield Finding("GPU", f"a driver is here, and PyTorch ({built}) uses none", "note", remedy)
    if bf16_is_emulated(device):
        remedy = "train with train.precision=fp32"
        yield Finding("bf16", "emulated, many times slower than fp32", "note", remedy)
    else:
        yield Finding("bf16", f"native on {device_name(device) or device.type}")


def _kernels() -> Iterator[Finding]:
    """Whether the extension is there, and whether what it computes is right."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is missing is said below
        module, variants = native.extension(), native.variants()
    if module is None:
        remedy = "install a C++ compiler and run `pip install -e .` again"
        yield Finding("kernels", "not built, several times slower", "note", remedy)
        return
    every = [name for name in (*native.CPU_VARIANTS, "cuda") if hasattr(module, name)]
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    for device in devices:
        subject = f"kernels on {device}"
        if device not in variants:
            remedy = "install nvcc and run `pip install -e .` again"
            yield Finding(subject, "not built, slower", "note", remedy)
            continue
        name = variants[device].__name__.rpartition(".")[2]
        if fault := _fault(torch.device(device)):
            remedy = "run `pip install -e .` again" + (
                ", with this GPU's number in MEGALLAMA_CUDA_ARCHS" if device == "cuda" else ""
            )
            yield Finding(subject, f"{name}: {fault}", "broken", remedy)
        else:
            others = ", ".join(other for other in every if other != name)
            yield Finding(subject, name + (f" (built too: {others})" if others else ""))


def _fault(device: torch.device) -> str:
    """What is wrong with a sum of squares there; an architecture that was not built for shows."""
    x = torch.arange(1000, dtype=torch.float32, device=device)
    try:
        found = float(squared_norms([x]).sum())
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    exact = 999 * 1000 * 1999 / 6
    return "" if abs(found - exact) <= 1e-6 * exact else f"a sum of squares is {found}, not {exact}"
