"""Initial weights: a pure function of (seed, tensor name, global index), whatever the layout.

Every element has its own draw of a counter-based generator (Philox, keyed by seed and name), so any
rectangle of any tensor can be made without the rest. The draw becomes normal through the inverse of
the normal distribution function, one number in, one number out.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from megallama.parallel.state import ParameterState
from megallama.spec.parameters import Part

BLOCK_ELEMENTS = 1 << 22  # elements made at a time: 32 MiB of fp64


def initialize(state: ParameterState, seed: int) -> None:
    """Fill the masters: every rank makes its own rectangles and no others."""
    for piece, tensor in state.pieces(state.masters):
        fill(tensor, piece.part, piece.start, seed)


def fill(tensor: Tensor, part: Part, start: tuple[int, ...], seed: int) -> None:
    """Fill `tensor` with the rectangle of its shape that begins at `start` of the part."""
    if part.init_std is None:
        tensor.fill_(1.0)
        return
    (rows, columns), width = tensor.shape, part.shape[1]
    # Whole rows are one stretch of the stream; narrower ones are a stretch each.
    height = max(1, BLOCK_ELEMENTS // columns) if columns == width else 1
    for row in range(0, rows, height):
        block = tensor[row : row + height]
        first = (start[0] + row) * width + start[1]
        uniform = _uniform(part.name, seed, first, block.numel())
        normal = torch.special.ndtri(torch.from_numpy(uniform)).mul_(part.init_std)
        block.copy_(normal.view(block.shape))


def _uniform(name: str, seed: int, start: int, count: int) -> np.ndarray:
    """Elements start … start + count of the tensor's stream, in (0, 1), fp64."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
    # A Philox counter makes four 64-bit words: begin at the block that holds `start`.
    generator = np.random.Philox(key=int.from_bytes(digest, "little")).advance(start // 4)
    skip = start % 4
    words = generator.random_raw(skip + count)[skip:]
    # 53 bits and a half: never 0 or 1, where the inverse distribution is infinite.
    return ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
