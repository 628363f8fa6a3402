"""What a step does between the host and the GPU: one wait, and launches on the right GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megallama.kernels import native
from megallama.kernels.rms_norm import rms_norm_backward, rms_norm_forward
from megallama.spec.grid import ALONE
from megallama.train.bench import batches
from megallama.train.host import Reading
from tests.gpu.models import SHAPES
from tests.gpu.test_model import RATE, make_trainer


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Allows the one readback of a step, and counts it."""
    found: list[str] = []
    finish = Reading.finish

    def allowed(self: Reading) -> list[list[float]]:
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        try:
            found.append("readback")
            return finish(self)
        finally:
            torch.cuda.set_sync_debug_mode(mode)

    monkeypatch.setattr(Reading, "finish", allowed)
    yield found
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("policy", ["linear_outputs", "layer_input"])
def test_the_host_waits_once_in_a_step(device, readings, policy):
    trainer = make_trainer(SHAPES["heads of 128"], saved_activations=policy)
    batch_of = batches(trainer.config, None, ALONE)
    trainer.step.run(batch_of(0), RATE)  # libraries and tables are set up
    readings.clear()
    torch.cuda.set_sync_debug_mode("error")
    result = trainer.step.run(batch_of(1), RATE)
    assert result.applied
    assert readings == ["readback"]


def test_the_check_above_can_fail(device, readings):
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(3, device=device).sum().item()


def test_kernels_run_on_the_current_stream(device):
    """Behind what is queued there, and before what follows."""
    x, w = torch.ones(4096, 1024, device=device), torch.ones(1024, device=device)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        x.mul_(0)
        n = rms_norm_forward(x, w, 1e-5)
        total = n.abs().sum()
    side.synchronize()
    assert total.item() == 0


def test_another_gpu(device):
    """A tensor of a GPU that is not current is refused; of the current one, computed there."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    other = torch.device("cuda", 1 - torch.cuda.current_device())
    x, w, dw = (torch.ones(*s, device=other) for s in ((40, 96), (96,), (96,)))
    with pytest.raises(ValueError, match="is current"):
        rms_norm_forward(x, w, 1e-5)
    with torch.cuda.device(other):
        n = rms_norm_forward(x, w, 0.0)
        rms_norm_backward(x, x, w, dw, 0.0)
        torch.cuda.synchronize()
    assert torch.allclose(n, x)
    assert torch.allclose(dw, torch.full_like(dw, 40.0))


def test_a_launch_that_fails_raises(device):
    """More blocks along y than the hardware takes."""
    x = torch.ones(8, device=device)
    rows, stream = (x.data_ptr(), 0), torch.cuda.current_stream(device).cuda_stream
    with pytest.raises(RuntimeError, match=r"swiglu_forward: .*invalid"):
        native.variants()["cuda"].swiglu_forward((0, 1, 2**26 + 1, stream), rows, rows)
    assert rms_norm_forward(x[None], x, 0.0).isfinite().all(), "the fault does not stick"


def test_what_kernels_do_not_take_is_refused():
    """Before a launch, so a GPU is not needed: more rows than 32 bits count, and fp64."""
    variant, rows = native.variants().get("cuda"), (0, 0)
    if variant is None:
        pytest.skip("built without CUDA")
    with pytest.raises(ValueError, match=r"2147483648 .*at most"):
        variant.swiglu_forward((0, 2**31, 8, 0), rows, rows)
    with pytest.raises(ValueError, match="not type 3"):
        variant.swiglu_forward((3, 1, 8, 0), rows, rows)
