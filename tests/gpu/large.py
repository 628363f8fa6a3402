"""What tests at LLaMA's sizes share: operands and errors that stay on the device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

TOKENS = 8192
#: Model width → feed-forward width and vocabulary: LLaMA 7B; 65B, with Llama 3's tokens.
LLAMA = {4096: (11008, 32000), 8192: (22016, 128256)}
every_width = pytest.mark.parametrize("width", LLAMA)
#: Rows of the memory that operands are cut from begin so many elements off.
every_offset = pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])


class Large:
    """Random operands of one type on a device. With an offset, rows allow no wide access."""

    def __init__(self, device: torch.device, offset: int = 0) -> None:
        self.device, self.offset = device, offset
        self._generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return self.empty(*shape).normal_(std=scale, generator=self._generator)

    def empty(self, *shape: int) -> Tensor:
        """Memory full of NaN, so that what is not written shows."""
        *outer, width = shape
        memory = torch.full(
            (*outer, width + self.offset), torch.nan, dtype=torch.bfloat16, device=self.device
        )
        return memory[..., self.offset :]


def error(result: Tensor, truth: Tensor) -> float:
    """‖result − truth‖ / ‖truth‖ in fp64; `truth` is fp64 and is used up."""
    norm = truth.norm()
    return float(truth.sub_(result).norm() / norm)


def assert_as_good(ours: Tensor, naive: Tensor, truth: Tensor) -> None:
    """The numerics rule (tests/unit/kernels/operands.py): one rounding at least is allowed."""
    floor = torch.finfo(ours.dtype).eps / 2
    found, allowed = error(ours, truth.clone()), max(2 * error(naive, truth), floor)
    assert found <= allowed, f"{found:.2e}; {allowed:.2e} is allowed"


def needs_memory(device: torch.device, gibibytes: float) -> None:
    """Skip where the device has less room."""
    if torch.cuda.mem_get_info(device)[0] < gibibytes * 2**30:
        pytest.skip(f"needs {gibibytes} GiB")
