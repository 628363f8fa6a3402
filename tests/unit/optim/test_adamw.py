"""AdamW against torch.optim.AdamW, by our kernel and by apex's."""

from __future__ import annotations

import importlib.machinery
import sys
import types

import pytest
import torch

from megallama.optim import adamw
from megallama.optim.adamw import AdamW
from megallama.parallel.state import ParameterState
from megallama.spec.parameters import parameter_table
from tests.harness import flat, lone_state, model_config, put
from tests.reference import Shape
from tests.unit.optim.trainers import optimizer_config

TABLE = parameter_table(model_config(Shape(layers=1)))
CONFIG = optimizer_config(betas=(0.8, 0.97), eps=1e-6, weight_decay=0.3)
DTYPES = (torch.float64, torch.float32)


def multi_tensor_adam(
    chunk, noop, lists, lr, beta1, beta2, eps, step, mode, bias_correction, weight_decay
):
    """What apex's kernel computes, in place, from its documented arguments (gradients first)."""
    assert chunk == 2048 * 32
    assert (noop.dtype, noop.tolist(), bias_correction, mode) == (torch.int32, [0], 1, 1)
    for g, p, m, v in zip(*lists, strict=True):
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
        p.sub_(lr * (update + weight_decay * p))


@pytest.fixture
def apex(monkeypatch):
    """Stand-ins for apex's modules, which are used as where csrc/ has no kernels for the device."""
    monkeypatch.setattr(adamw, "_apex_stands_in", lambda divisor: True)
    for name in ("amp_C", "apex", "apex.multi_tensor_apply"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["amp_C"].multi_tensor_adam = multi_tensor_adam
    sys.modules["apex.multi_tensor_apply"].multi_tensor_applier = (
        lambda kernel, noop, lists, *arguments: kernel(2048 * 32, noop, lists, *arguments)
    )


def gradients(state: ParameterState, step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [
        torch.randn(p.shape, generator=generator, dtype=torch.float64).to(state.wide) * 3
        for p in TABLE
    ]


def train(dtype: torch.dtype, steps: int = 5) -> tuple[ParameterState, AdamW]:
    """Some updates of which each divides its gradients by another number."""
    state = lone_state(TABLE, dtype)
    put(state.masters, start(state))
    optimizer = AdamW(CONFIG, state)
    for step in range(steps):
        for parameter, gradient in zip(TABLE, gradients(state, step), strict=True):
            state.gradients[parameter.name].copy_(gradient)
        optimizer.step(1e-2 / (step + 1), torch.full((), 7.0 + step, dtype=state.wide))
    return state, optimizer


def start(state: ParameterState) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(99)
    return {
        name: torch.randn(master.shape, generator=generator, dtype=torch.float64)
        for name, master in state.masters.items()
    }


def reference(dtype: torch.dtype, steps: int = 5) -> ParameterState:
    """torch.optim.AdamW, unfused, on the divided gradients."""
    state = lone_state(TABLE, dtype)
    put(state.masters, start(state))
    groups = [
        {"params": [w for w in state.masters.values() if w.dim() == 2], "weight_decay": 0.3},
        {"params": [w for w in state.masters.values() if w.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=CONFIG.betas, eps=CONFIG.eps, foreach=False)
    for step in range(steps):
        for parameter, gradient in zip(TABLE, gradients(state, step), strict=True):
            state.masters[parameter.name].grad = gradient / (7.0 + step)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        optimizer.step()
    return state


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_updates(dtype):
    state, optimizer = train(dtype)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    expected = flat(reference(dtype).masters)
    assert torch.allclose(flat(state.masters), expected, rtol=tolerance, atol=tolerance)
    assert optimizer.updates == 5


def test_gradients_are_left_as_they_are():
    state, _ = train(torch.float32)
    for parameter, gradient in zip(TABLE, gradients(state, 4), strict=True):
        assert torch.equal(state.gradients[parameter.name], gradient)


@pytest.mark.parametrize("by_apex", [False, True])
def test_weights_are_rounded_from_the_masters(by_apex, request):
    if by_apex:
        request.getfixturevalue("apex")
    state, _ = train(torch.bfloat16)
    for name, master in state.masters.items():
        assert torch.equal(state.weights[name], master.bfloat16()), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_apex_kernel(dtype, request):
    """apex's arguments are given in its order, and the result is our kernel's."""
    ours, our_optimizer = train(dtype)
    request.getfixturevalue("apex")
    theirs, their_optimizer = train(dtype)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5

    def assert_close(a, b):
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance)

    assert_close(flat(theirs.masters), flat(ours.masters))
    for kind in ("exp_avg", "exp_avg_sq"):
        for name, moment in getattr(our_optimizer, kind).items():
            assert_close(moment, getattr(their_optimizer, kind)[name])


def test_apex_is_for_cuda_alone():
    assert not adamw._apex_stands_in(torch.zeros(()))


def test_weight_decay_is_for_matrices_alone():
    state = lone_state(TABLE, torch.float64)
    for master in state.masters.values():
        master.fill_(2.0)
    AdamW(CONFIG, state).step(0.1, torch.ones((), dtype=state.wide))
    for name, master in state.masters.items():
        expected = 2.0 if master.dim() == 1 else 2.0 * (1 - 0.1 * 0.3)
        assert torch.allclose(master, torch.tensor(expected, dtype=torch.float64)), name


def test_the_first_update_is_the_rate_times_the_sign():
    """m̂ / (√v̂ + ε) of one gradient is its sign; a closed form of the bias corrections."""
    state = lone_state(TABLE, torch.float64)
    config = optimizer_config(eps=1e-30, weight_decay=0.0)
    optimizer = AdamW(config, state)
    put(state.gradients, {n: torch.randn_like(g) for n, g in state.gradients.items()})
    gradient = flat(state.gradients)
    optimizer.step(0.25, torch.full((), 5.0, dtype=state.wide))
    assert torch.allclose(flat(state.masters), -0.25 * gradient.sign(), rtol=1e-12)
