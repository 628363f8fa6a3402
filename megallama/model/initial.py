"""Initial weights: a pure function of (seed, tensor name, global index), whatever the layout.

Every element has its own draw of a counter-based generator (Philox, keyed by seed and name), so any
rows of any tensor can be made without the rest. The draw becomes normal through the inverse of the
normal distribution function, one number in, one number out.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from megallama.parallel.state import ParameterState
from megallama.spec.parameters import Part

ROWS_ELEMENTS = 1 << 22  # elements made at a time: 32 MiB of fp64


def initialize(state: ParameterState, seed: int) -> None:
    """Fill the masters, and the weights that follow from them."""
    parts = {part.name: part for parameter in state.table for part in parameter.parts}
    for name, tensor in state.parts(state.masters):
        fill_rows(tensor, parts[name], seed, first_row=0)
    state.refresh_weights()


def fill_rows(tensor: Tensor, part: Part, seed: int, first_row: int) -> None:
    """Fill `tensor` with the rows of the part that begin at `first_row`."""
    if part.init_std is None:
        tensor.fill_(1.0)
        return
    columns = part.numel // part.shape[0]
    block = max(1, ROWS_ELEMENTS // columns)
    for row in range(0, len(tensor), block):
        rows = tensor[row : row + block]
        uniform = _uniform(part.name, seed, (first_row + row) * columns, rows.numel())
        normal = torch.special.ndtri(torch.from_numpy(uniform)).mul_(part.init_std)
        rows.copy_(normal.view(rows.shape))


def _uniform(name: str, seed: int, start: int, count: int) -> np.ndarray:
    """Elements start … start + count of the tensor's stream, in (0, 1), fp64."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
    # A Philox counter makes four 64-bit words: begin at the block that holds `start`.
    generator = np.random.Philox(key=int.from_bytes(digest, "little")).advance(start // 4)
    skip = start % 4
    words = generator.random_raw(skip + count)[skip:]
    # 53 bits and a half: never 0 or 1, where the inverse distribution is infinite.
    return ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
