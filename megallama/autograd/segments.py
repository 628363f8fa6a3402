"""Segments: the stretches of a micro-batch's tokens that attend among themselves."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Lengths in token order, which sum to T: whole samples, or documents kept apart."""

    lengths: tuple[int, ...]

    @cached_property
    def longest(self) -> int:
        return max(self.lengths)

    @cached_property
    def uniform(self) -> bool:
        return all(length == self.longest for length in self.lengths)

    @cached_property
    def cuda_offsets(self) -> Tensor:
        """Where segments begin, and T: (segments + 1,) int32 on the GPU, copied once for all
        layers, from pinned memory so that the host does not wait."""
        offsets = torch.tensor((0, *self.lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return offsets.pin_memory().to("cuda", non_blocking=True)
