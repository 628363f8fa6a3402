"""The device a run trains on: which, how fast at best, how full."""

from __future__ import annotations

import os
import platform
import resource
from contextlib import suppress
from pathlib import Path

import torch

from megallama.config.schema import Config
from megallama.errors import ConfigError
from megallama.spec.flops import peak_flops

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def choose_device(config: Config, local_rank: int = 0) -> torch.device:
    """The rank's own GPU for bf16, where there is one, else the CPU.

    Flash attention on CUDA takes no fp32.

    Raises:
        ConfigError: a head is too wide, or of a width that the CUDA kernels do not take.
    """
    if not torch.cuda.is_available() or config.train.precision != "bf16":
        return torch.device("cpu")
    width = config.model.head_width
    if width % 8 or width > 256:
        raise ConfigError(
            f"model.heads={config.model.heads}: heads of width {width}; on CUDA the width is a "
            "multiple of 8 up to 256; choose heads so that model.d_model / heads is"
        )
    return device_of(local_rank)


def device_of(local_rank: int) -> torch.device:
    """The rank's own GPU where there are any, else the CPU.

    Raises:
        ConfigError: the machine has fewer GPUs than ranks.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if torch.cuda.device_count() == 1 and "CUDA_VISIBLE_DEVICES" in os.environ:
        local_rank = 0  # the launcher showed each process a GPU of its own (--gpus-per-task)
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank}: this machine has {torch.cuda.device_count()} GPUs; start as "
            "many processes on it"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def make_deterministic() -> None:
    """Choose kernels that repeat bit for bit. Only CUDA has others; call before its first use."""
    # cuBLAS repeats itself only with a workspace of fixed size.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # The filling of fresh memory, on by default, finds reads of it; it changes no result.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)


def device_name(device: torch.device) -> str:
    """The device's name as its vendor gives it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def device_peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak in FLOP/s, None where unknown (every CPU)."""
    return peak_flops(device_name(device)) if device.type == "cuda" else None


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held so far: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak_memory(device: torch.device) -> None:
    """Have `peak_memory_bytes` count from here on. Linux alone can do so on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def bf16_is_emulated(device: torch.device) -> bool:
    """Whether bf16 GEMMs run without bf16 units: 20 times slower than fp32 on such a CPU."""
    if device.type == "cuda":
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    if platform.machine() != "x86_64":
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
