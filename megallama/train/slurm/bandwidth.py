"""GB/s of an all-reduce over the GPUs of this node: `python -m megallama.train.slurm.bandwidth`.

Prints the bus bandwidth as NCCL's tests count it, 2(n-1)/n · bytes / seconds, of the best of a few
rounds; nothing where torch sees fewer than two GPUs.
"""

from __future__ import annotations

import time

import torch

#: Bytes that each GPU reduces: past the sizes where latency counts.
BYTES = 256 << 20
ROUNDS = 5


def measure() -> float | None:
    """The bandwidth in GB/s; None with fewer than two GPUs.

    Raises:
        RuntimeError: NCCL failed, or the sums are wrong.
    """
    count = torch.cuda.device_count()
    if count < 2:
        return None
    import torch.cuda.nccl as nccl

    tensors = [torch.ones(BYTES // 4, device=f"cuda:{index}") for index in range(count)]
    best = 0.0
    for _ in range(ROUNDS):
        for tensor in tensors:
            tensor.fill_(1)
        _finish(count)
        began = time.perf_counter()
        nccl.all_reduce(tensors)
        _finish(count)
        seconds = time.perf_counter() - began
        best = max(best, 2 * (count - 1) / count * BYTES / seconds / 1e9)
    if any(float(tensor.amin()) != count or float(tensor.amax()) != count for tensor in tensors):
        raise RuntimeError("wrong sums")
    return best


def _finish(count: int) -> None:
    for index in range(count):
        torch.cuda.synchronize(index)


if __name__ == "__main__":
    found = measure()
    print("" if found is None else f"{found:.1f}")
