"""The extension module, and how tensors are handed to it.

A *variant* of the extension is the set of all ops compiled for one instruction set or for CUDA.
Where there is none for a device, the ops run their references.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType

import torch
from torch import Tensor

#: The codes of csrc/ops.h. CUDA kernels take all but the last.
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
#: CPU variants, best first; the extension has those that this machine can run.
CPU_VARIANTS = ("avx512", "avx2", "portable")

#: (element type, rows, columns, threads or stream)
Launch = tuple[int, int, int, int]


@functools.cache
def extension() -> ModuleType | None:
    """The extension, or None, said once, where it was not built."""
    try:
        return importlib.import_module("megallama.kernels._native")
    except ImportError as error:
        warnings.warn(
            f"megallama runs without its kernels, several times slower: {error}; "
            "install a C++ compiler and run `pip install -e .` again",
            stacklevel=2,
        )
        return None


@functools.cache
def variants() -> dict[str, ModuleType]:
    """The variant that each type of device uses."""
    module = extension()
    names = {"cpu": CPU_VARIANTS, "cuda": ("cuda",)}
    found = {
        device: [getattr(module, name) for name in best_first if hasattr(module, name)]
        for device, best_first in names.items()
    }
    return {device: modules[0] for device, modules in found.items() if modules}


def variant_for(x: Tensor) -> ModuleType | None:
    """The variant that runs an op on x; None where its reference does."""
    if x.is_cuda and x.dtype == torch.float64:
        return None
    return variants().get(x.device.type)


def launch(x: Tensor, rows: int, columns: int) -> Launch:
    """How a kernel on x's elements is to run: on torch's threads, or on its current stream.

    Raises ValueError for tensors of a GPU that is not the current one.
    """
    if x.is_cuda:
        if x.device.index != torch.cuda.current_device():
            raise ValueError(f"tensors are on {x.device}; {torch.cuda.current_device()} is current")
        where = torch.cuda.current_stream(x.device).cuda_stream
    else:
        where = torch.get_num_threads()
    return TYPES[x.dtype], rows, columns, where


def rows(x: Tensor | None) -> tuple[int, int]:
    """The address of x's rows, and how far apart they are; a vector is one, None is none."""
    if x is None:
        return 0, 0
    return x.data_ptr(), x.stride(0) if x.dim() > 1 else 0


def heads(x: Tensor) -> tuple[int, int, int]:
    """The address of (T, heads, E), its strides from token to token and from head to head."""
    return x.data_ptr(), x.stride(0), x.stride(1)


def share_count(x: Tensor) -> int:
    """How many partial sums a sum over x's rows is made of.

    On a CPU it depends on the rows alone, so that the number of threads changes no bit: enough for
    128 threads, and so few that they take an eighth of x's traffic at most. On CUDA, four blocks a
    multiprocessor.
    """
    if x.is_cuda:
        device = torch.cuda.get_device_properties(x.device)
        return max(1, min(len(x), 4 * device.multi_processor_count))
    return max(1, min(128, len(x) // 8))
