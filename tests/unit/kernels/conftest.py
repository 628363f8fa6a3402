"""Runs a test on every variant of the extension that this machine has, and on the references."""

from __future__ import annotations

import pytest
import torch

from megallama.kernels import native
from tests.unit.kernels.operands import VARIANTS


@pytest.fixture(params=VARIANTS)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The CPU, with its kernels compiled for one instruction set, or without any."""
    found = {} if request.param == "reference" else {"cpu": native.variants()["cpu"]}
    if found:
        found["cpu"] = getattr(native.extension(), request.param)
    monkeypatch.setattr(native, "variants", lambda: found)
    return torch.device("cpu")
