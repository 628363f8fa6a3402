"""A decoder layer in bf16 on a GPU against the CPU's fp64: z, dx and the weights' gradients."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from megallama.autograd.filling import fill_all, filled
from megallama.autograd.passes import Pass, WgradQueue, drive
from megallama.autograd.stash import Stash
from megallama.model.llama import Llama
from megallama.spec.saved import POLICIES
from tests.gpu.models import SHAPES, assert_as_good, bf16_weights, build_model
from tests.harness import parts
from tests.reference import Shape, plain

SAMPLES, LENGTH, LAYER = 2, 200, "layers.0."


def plain_layer(shape: Shape, w: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """x (B, S, D) → z, of the reference's pieces, in x's own type."""
    position = torch.arange(LENGTH, device=x.device).expand(SAMPLES, LENGTH)
    angles = position.unsqueeze(-1) * plain.frequencies(shape).to(x.device)
    allowed = torch.ones(SAMPLES, LENGTH, LENGTH, device=x.device).tril().bool()
    n1 = plain.rms_norm(x, w["attention_norm.weight"], shape.norm_eps)
    q, k, v = (
        (n1 @ w[f"attention.{name}.weight"].T).unflatten(2, (heads, -1))
        for name, heads in (("wq", shape.heads), ("wk", shape.kv_heads), ("wv", shape.kv_heads))
    )
    o = plain.attention(plain.rotate(q, angles), plain.rotate(k, angles), v, allowed)
    x2 = x + o @ w["attention.wo.weight"].T
    n2 = plain.rms_norm(x2, w["ffn_norm.weight"], shape.norm_eps)
    gate, up = (n2 @ w[f"feed_forward.{name}.weight"].T for name in ("w1", "w3"))
    return x2 + (gate * gate.sigmoid() * up) @ w["feed_forward.w2.weight"].T


def by_autograd(
    shape: Shape, weights: Mapping[str, Tensor], x: Tensor, dz: Tensor
) -> dict[str, Tensor]:
    """z, dx and every gradient of the layer, in the type of x and where it lies."""
    leaves = {
        name.removeprefix(LAYER): w.to(x, copy=True).requires_grad_()
        for name, w in weights.items()
        if name.startswith(LAYER)
    }
    leaves["dx"] = x.detach().clone().requires_grad_()
    z = plain_layer(shape, leaves, leaves["dx"])
    gradients = torch.autograd.grad(z, list(leaves.values()), dz.to(x))
    return {"z": z.detach()} | dict(zip(leaves, gradients, strict=True))


def by_passes(model: Llama, x: Tensor, dz: Tensor) -> dict[str, Tensor]:
    """The same by the layer's own passes."""
    layer, stash, queue = model.chunks[0].layers[0], Stash(), WgradQueue()
    positions = model.positions([[LENGTH]] * SAMPLES)

    def forward() -> Pass[Tensor]:
        output = yield from layer.forward(filled(x.flatten(0, 1), 1), positions, stash, 0)
        return (yield from fill_all(output))

    model.state.zero_gradients()
    z = drive(forward())
    dx = drive(layer.backward(dz.flatten(0, 1), positions, stash.take(0), queue), queue)
    results = {"z": z.view_as(x), "dx": dx.view_as(x)}
    gradients = parts(model.state, model.state.gradients).items()
    found = {name.removeprefix(LAYER): g for name, g in gradients if name.startswith(LAYER)}
    return results | {name: g.clone() for name, g in found.items()}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_forward_and_backward(device, shape):
    """Under every policy: what is recomputed is as good as what was kept."""
    weights = bf16_weights(shape)
    generator = torch.Generator().manual_seed(0)
    size = SAMPLES, LENGTH, shape.d_model
    x, dz = (torch.randn(size, generator=generator).bfloat16() for _ in range(2))
    truth = by_autograd(shape, weights, x.double(), dz)
    naive = by_autograd(shape, weights, x.to(device), dz)
    for policy in POLICIES:
        model = build_model(shape, weights, device, policy)
        ours = by_passes(model, x.to(device), dz.to(device))
        assert ours.keys() == truth.keys()
        for name, result in ours.items():
            assert_as_good(result, naive[name], truth[name], f"{policy}: {name}")
