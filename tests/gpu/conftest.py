"""The device of tests/gpu: a GPU, and no test without one."""

from __future__ import annotations

import pytest
import torch

from megallama.kernels import native


@pytest.fixture
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    assert "cuda" in native.variants(), "the extension was built without CUDA"
    return torch.device("cuda", torch.cuda.current_device())
