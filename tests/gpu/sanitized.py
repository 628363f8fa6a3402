"""Runs every kernel on GPU memory of exactly its operands' size: `python -m tests.gpu.sanitized`.

Under compute-sanitizer, with PyTorch's own cache of memory off. The operands are those of
tests/unit/kernels/sanitized.py; an argument N has kernels told of N columns more than there are.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from megallama.kernels import native
from tests.unit.kernels import sanitized

COLUMNS = (1, 3, 8, 17, 64, 71, 300, 1032, 4096)


class Memory:
    """Stands in for the C library's allocator."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def calloc(self, count: int, size: int) -> int:
        self._kept.append(torch.zeros(max(1, count * size), dtype=torch.uint8, device="cuda"))
        return self._kept[-1].data_ptr()


def main() -> None:
    more = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    variant = native.variants()["cuda"]
    sanitized.THREADS = 0  # the default stream
    for code in range(3):
        for columns in COLUMNS:
            sanitized.libc = Memory()
            sanitized.run(variant, code, columns, more)
            sanitized.run_loss_and_update(variant, code, columns, more)
            torch.cuda.synchronize()
    print("ran cuda")


if __name__ == "__main__":
    main()
