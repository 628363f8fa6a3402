"""What PyTorch's errors mean: memory ran out, a device failed, a connection broke."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megallama.dist.compat import AcceleratorError, DistError
from megallama.errors import LostError
from megallama.train.process import Process

#: What an out-of-memory error is called by those that have no class for it.
SHORTAGES = ("can't allocate memory", "not enough memory", "out of memory")
#: What plain RuntimeErrors say of a device that failed: those of our own kernels and of parts of
#: PyTorch, and cuBLAS's two. Its other words are of faulty calls.
FAILURE = re.compile(
    r"CUDA error: (?!CU\w+_STATUS_)|CUBLAS_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR)"
)
#: What any device answers to the same faulty call: a bug, and no machine's fault.
BUGS = (
    "device-side assert",
    "invalid argument",
    "invalid configuration argument",
    "invalid device function",
    "no kernel image",
)


def is_shortage(error: BaseException) -> bool:
    """Whether an allocation failed; PyTorch's CPU allocator raises a RuntimeError."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or _says(error, SHORTAGES)


@contextmanager
def explained_loss(process: Process) -> Iterator[None]:
    """A device or a connection that fails within is lost, and no bug.

    Raises:
        LostError: the GPU of this process failed, which names its machine; or NCCL did, as an
            operation was issued, which may be any rank's fault.
    """
    try:
        yield
    except RuntimeError as error:
        if is_shortage(error) or _says(error, BUGS):
            raise
        reason = str(error).partition("\n")[0]
        if isinstance(error, AcceleratorError) or FAILURE.search(reason):
            raise LostError(
                f"the GPU of rank {process.rank} (host {socket.gethostname()}) failed: {reason}; "
                "try again without that machine"
            ) from error
        if isinstance(error, DistError):
            words = f"a NCCL operation failed ({reason}); try again"
            raise LostError(words, follows=True) from error
        raise


def _says(error: BaseException, words: tuple[str, ...]) -> bool:
    return any(word in str(error) for word in words)
