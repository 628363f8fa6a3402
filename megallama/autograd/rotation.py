"""The angles of the rotary position embedding (RoFormer, arXiv 2104.09864).

Each pair of a head's elements (x[e], x[e + E/2]) turns by position · θ^(−2e/E);
`megallama.kernels.rope` turns them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megallama.autograd.transfer import sent
from megallama.config.schema import RopeScaling


class Rotation(NamedTuple):
    """The cosines and sines of every token's angles, each (T, 1, E/2), fp32 or wider."""

    cos: Tensor
    sin: Tensor


def rope_frequencies(head_width: int, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """Radians a position, (E/2,), in fp64; `scaling` is Llama 3.1's (arXiv 2407.21783)."""
    exponents = torch.arange(0, head_width, 2, dtype=torch.float64) / head_width
    frequencies = theta**-exponents
    if scaling is None:
        return frequencies
    # Wavelengths shorter than the original context / high_freq_factor stay, those longer than
    # context / low_freq_factor stretch by `factor`, and those between are blended linearly.
    turns = scaling.original_context * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (keep + (1 - keep) / scaling.factor)


def rotation_at(positions_T: Tensor, frequencies_E: Tensor, dtype: torch.dtype) -> Rotation:
    """The rotation of tokens at these positions; angles are computed in fp64, kept in `dtype`."""
    angles = positions_T.to(torch.float64)[:, None, None] * frequencies_E
    return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))


class RotationTable:
    """The rotations of positions 0, 1, 2, …, computed once: every micro-batch asks again."""

    def __init__(self, frequencies_E: Tensor, dtype: torch.dtype, device: torch.device) -> None:
        self._frequencies_E, self._dtype, self._device = frequencies_E, dtype, device
        self._grow(1)

    def at(self, positions_T: Tensor, length: int) -> Rotation:
        """The rotation of tokens at these positions, all below `length`."""
        if length > len(self._table.cos):
            self._grow(length)
        index_T = sent(positions_T, self._device)
        return Rotation(self._table.cos[index_T], self._table.sin[index_T])

    def _grow(self, length: int) -> None:
        table = rotation_at(torch.arange(length), self._frequencies_E, self._dtype)
        self._table = Rotation(table.cos.to(self._device), table.sin.to(self._device))
