"""What tests of kernels share: operands in every memory layout, and the rule for errors."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from megallama.kernels import native

#: What this machine can run of the extension, best first, and the references.
VARIANTS = (
    *(name for name in native.CPU_VARIANTS if hasattr(native.extension(), name)),
    "reference",
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: How rows lie in memory: whole; with a gap after each; starting one element off.
LAYOUTS = ("contiguous", "strided", "misaligned")

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
#: For what no variant has a part in: how an op is registered, and what its checks let through.
best_variant = pytest.mark.parametrize("device", VARIANTS[:1], ids=["best"], indirect=True)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
#: The device is the same for all examples of a test.
examples = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


class Operands:
    """Random tensors of one type, layout and device, each another."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, layout: str = "contiguous", seed: int = 0
    ) -> None:
        self.device, self.dtype, self.layout = device, dtype, layout
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal numbers times `scale`."""
        values = torch.randn(shape, generator=self._generator, dtype=torch.float64) * scale
        return self.empty(*shape).copy_(values)

    def empty(self, *shape: int) -> Tensor:
        """Memory full of NaN, so that what is not written shows."""
        before, gap = {"contiguous": (0, 0), "strided": (0, 16), "misaligned": (1, 3)}[self.layout]
        *outer, width = shape
        rows = math.prod(outer)
        memory = torch.full((before + rows * (width + gap),), torch.nan, dtype=self.dtype)
        matrix = memory.to(self.device)[before:].view(rows, width + gap)[:, :width]
        return matrix.unflatten(0, outer) if outer else matrix[0]


def error(result: Tensor, truth: Tensor, scale: float | None = None) -> float:
    """‖result − truth‖ / ‖truth‖ in fp64; `scale`: the norm of what truth is a difference of."""
    truth = truth.double().cpu()
    return float((result.double().cpu() - truth).norm() / (scale or truth.norm()))


def assert_as_good(ours: Tensor, naive: Tensor, truth: Tensor, scale: float | None = None) -> None:
    """The numerics rule: at most twice the error of plain PyTorch in the same precision.

    Plain PyTorch can be exact where nothing is added up: one rounding of the result is allowed. Of
    few elements, chance decides which of two roundings is the luckier, and in fp64 the truth has
    errors of its own: a few are.
    """
    roundings = 8 if ours.numel() < 256 or ours.dtype == torch.float64 else 1
    floor = roundings * torch.finfo(ours.dtype).eps / 2
    found, allowed = error(ours, truth, scale), max(2 * error(naive, truth, scale), floor)
    assert found <= allowed, f"{found:.2e}; {allowed:.2e} is allowed"


def gradients(
    forward: Callable[..., Tensor], doutput: Tensor, *inputs: Tensor
) -> tuple[Tensor, ...]:
    """PyTorch's own gradients of a function of fp64 tensors on the CPU."""
    leaves = [x.detach().double().cpu().requires_grad_() for x in inputs]
    return torch.autograd.grad(forward(*leaves), leaves, doutput.double().cpu())
