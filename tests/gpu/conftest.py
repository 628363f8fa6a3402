"""The device of tests/gpu: a GPU, and no test without one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from megallama.kernels import native

# cuBLAS repeats itself only with a workspace of fixed size, and torch looks at this once.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    assert "cuda" in native.variants(), "the extension was built without CUDA"
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """A deterministic run leaves its mode to the process; large operands are given back."""
    yield
    torch.use_deterministic_algorithms(False)
    if torch.cuda.is_available() and torch.cuda.memory_reserved() > 2**30:
        torch.cuda.empty_cache()
