"""What a machine has of what training uses: versions, devices, optional packages."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterator

import torch

from megallama import __version__
from megallama.train.device import bf16_is_emulated, device_name

OPTIONAL = {
    "flash_attn": "flash-attn: attention kernels for CUDA (PyTorch's own are used instead)",
    "amp_C": "apex: fused AdamW for CUDA (PyTorch's own is used instead)",
    "wandb": "wandb: experiment tracking (metrics.jsonl is always written)",
    "pyarrow": "pyarrow: parquet input for `megallama data build`",
}


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


def findings() -> Iterator[str]:
    """One line for each thing looked at."""
    yield ", ".join(f"{name} {version}" for name, version in versions().items())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cpu = processor()
    yield f"processor: {cpu['model']}, {cpu['threads']} threads, bf16 units: {cpu['bf16_units']}"
    if device.type == "cuda":
        yield f"GPU: {device_name(device)}, {torch.cuda.device_count()} of them"
    if bf16_is_emulated(device):
        yield "bf16: emulated, many times slower than fp32; train with train.precision=fp32"
    else:
        yield "bf16: native"
    for module, purpose in OPTIONAL.items():
        found = "found" if importlib.util.find_spec(module) else "not found"
        yield f"{found}: {purpose}"
