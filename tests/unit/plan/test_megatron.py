"""The steps of Megatron-LM's layers against the paper's FLOPs, and LLaMA's as of its time."""

from __future__ import annotations

import pytest

from megallama.plan import llama_era, megatron
from megallama.plan.chunk import Part
from megallama.plan.megatron import Gpt, chunk_backward, chunk_forward
from megallama.plan.ops import Attend, Gemm, Start
from megallama.spec.flops import flops_per_token
from tests.unit.plan.machines import A100, config

WHOLE = Part(2, embedding=True, head=True)


def gpt(recompute="selective", divided=True) -> Gpt:
    return Gpt(1024, 16, 512, 2, 4, 2048, recompute, divided)


def flops(steps) -> int:
    return sum(step.flops for step in steps if isinstance(step, Gemm))


def test_flops_are_the_paper_s():
    """Appendix A: 72·b·s·L·h²·(1 + s/6h + v/12hL), a forward more where all is recomputed; the core
    of attention has 4·b·s²·h of a forward's."""
    one = gpt()
    h, s, v, layers, tokens = one.h, one.s, one.v, 2, one.s * one.b
    model = 72 * tokens * layers * h**2 * (1 + s / (6 * h) + v / (12 * h * layers)) / one.t
    core = 4 * tokens * s * h * layers / one.t
    found = flops(chunk_forward(one, WHOLE)) + flops(chunk_backward(one, WHOLE))
    assert found == pytest.approx(model + core)
    full = gpt("full")
    found = flops(chunk_forward(full, WHOLE)) + flops(chunk_backward(full, WHOLE))
    layer = 24 * tokens * h**2 * (1 + s / (6 * h)) / one.t
    assert found == pytest.approx(model + layers * layer)


@pytest.mark.parametrize("divided", [True, False])
def test_collectives_of_a_layer(divided):
    """Sequence parallelism moves an all-reduce's bytes as a gather and a scatter (§4.2.2), and two
    gathers more in the backward."""
    one, part = gpt(divided=divided), Part(1, False, False)
    forward, backward = (
        [step.collective for step in steps if isinstance(step, Start)]
        for steps in (chunk_forward(one, part), chunk_backward(one, part))
    )
    whole = 2 * 3 * one.tokens * one.h * megatron.HALF // 4
    assert sum(c.bytes for c in forward) == 2 * whole
    assert sum(c.bytes for c in backward) == (3 if divided else 2) * whole
    assert len(forward) == (4 if divided else 2)
    assert len(backward) == (6 if divided else 2)


def test_a_llama_of_its_time_has_the_model_s_flops():
    model = config("llama-65b").model
    one = Gpt(model.d_model, model.heads, 2048, 1, 8, model.vocab, "selective", True)
    steps = [
        *llama_era._forward(one, model.ffn, Part(model.layers, True, True)),
        *llama_era._backward(one, model.ffn, Part(model.layers, True, True)),
    ]
    attention = [step for step in steps if isinstance(step, Attend)]
    useful = sum(a.flops * (0.8 if a.phase == "backward" else 1) for a in attention)
    assert flops(steps) + useful == pytest.approx(2048 * flops_per_token(model, 2048) / 8)


def test_the_fastest_layouts_of_its_time_fit():
    model = config("llama-13b").model
    found = llama_era.era_layouts(model, 2048, 64, A100, 16, count=2)
    assert [era.seconds for era in found] == sorted(era.seconds for era in found)
    assert all(8 * era.pp * era.dp == 16 for era in found)
    small = A100.memory.model_copy(update={"capacity": 1 << 30})
    machine = A100.model_copy(update={"memory": small})
    assert llama_era.era_layouts(model, 2048, 64, machine, 16) == []
