"""Every op's backward against finite differences of its forward, in fp64.

T tokens, H query heads, K key/value heads, E head width, D, F and V widths.
"""

from __future__ import annotations

import pytest
import torch

from megallama.autograd.attention import attention_backward, attention_forward
from megallama.autograd.embedding import embedding_backward, embedding_forward
from megallama.autograd.linear import linear_dgrad, linear_forward, linear_wgrad
from megallama.autograd.rotation import rope_frequencies, rotation_at
from megallama.autograd.segments import Segments
from megallama.kernels.rms_norm import rms_norm_backward, rms_norm_forward
from megallama.kernels.rope import rope_backward, rope_forward
from megallama.kernels.swiglu import swiglu_backward, swiglu_forward
from tests.unit.autograd.pairs import check_pair, random


def test_linear():
    def backward(dy, x, w):
        dw = torch.zeros_like(w)
        linear_wgrad(dy, x, dw)
        return linear_dgrad(dy, w), dw

    check_pair(linear_forward, backward, random(5, 3), random(4, 3))


def test_linear_into_a_tensor_that_is_there():
    x, w, rows = random(5, 3), random(4, 3), torch.zeros(9, 4, dtype=torch.float64)
    assert linear_forward(x, w, out=rows[2:7]).data_ptr() == rows[2].data_ptr()
    assert torch.equal(rows[2:7], linear_forward(x, w))
    assert not rows[:2].any()
    assert not rows[7:].any()


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_norm(eps):
    def backward(dn, x, w):
        dw = torch.zeros_like(w)
        return rms_norm_backward(dn, x, w, dw, eps), dw

    check_pair(lambda x, w: rms_norm_forward(x, w, eps), backward, random(4, 6), random(6))


def test_norm_of_a_row_of_zeros_is_finite():
    x, w, dw = torch.zeros(2, 4), torch.ones(4), torch.zeros(4)
    dx = rms_norm_backward(torch.ones(2, 4), x, w, dw, 1e-6)
    assert torch.equal(rms_norm_forward(x, w, 1e-6), x)
    assert dx.allclose(torch.tensor(1e3))
    assert not dw.any()


def test_rope():
    rotation = rotation_at(torch.tensor([0, 1, 5, 2]), rope_frequencies(6, 100.0), torch.float64)

    def forward(x):
        y = x.clone()
        rope_forward(y, *rotation)
        return y

    def backward(dy, x):
        dx = dy.clone()
        rope_backward(dx, *rotation)
        return (dx,)

    x = random(4, 3, 6)
    check_pair(forward, backward, x)
    assert torch.equal(forward(x)[0], x[0]), "position 0 does not turn"
    assert torch.allclose(forward(x).norm(dim=-1), x.norm(dim=-1), rtol=1e-14)
    # A complex number a pair: multiplication by exp(i · position · frequency).
    angle = 5 * 100.0 ** (-2 / 6)
    turned = (
        torch.complex(x[2, :, 1], x[2, :, 4])
        * torch.tensor(1j * angle, dtype=torch.complex128).exp()
    )
    assert torch.allclose(forward(x)[2, :, 1], turned.real, rtol=1e-14)
    assert torch.allclose(forward(x)[2, :, 4], turned.imag, rtol=1e-14)


def test_swiglu():
    def backward(dact, gate_up):
        dgate_up, act = swiglu_backward(dact, gate_up)
        assert torch.equal(act, swiglu_forward(gate_up)), "the output that W2's wgrad needs"
        return (dgate_up,)

    check_pair(swiglu_forward, backward, random(5, 6))


@pytest.mark.parametrize("heads, keys", [(4, 4), (4, 2), (4, 1), (1, 1)])
@pytest.mark.parametrize("lengths", [(6,), (3, 3), (1, 4, 2), (1, 1, 1), (2, 5)], ids=str)
def test_attention(heads, keys, lengths):
    segments = Segments(lengths)

    def forward(q, k, v):
        return attention_forward(q, k, v, segments)[0]

    def backward(do, q, k, v):
        o, lse = attention_forward(q, k, v, segments)
        fused = torch.full((length, heads + 2 * keys, 2), torch.nan, dtype=q.dtype)
        out = fused.split((heads, keys, keys), dim=1)
        attention_backward(do, (q, k, v), o, lse, segments, out)
        return out

    length = sum(lengths)
    q, k, v = (random(length, n, 2, seed=i) for i, n in enumerate((heads, keys, keys)))
    check_pair(forward, backward, q, k, v)


@pytest.mark.parametrize("lengths", [(8,), (4, 4), (1, 5, 2)], ids=str)
def test_attention_of_strided_views_and_its_log_sum_exp(lengths):
    """The passes hand in views of one fused projection."""
    fused = random(8, 4 + 2 + 2, 4)
    q, k, v = fused.split((4, 2, 2), dim=1)
    o, lse = attention_forward(q, k, v, Segments(lengths))
    whole = attention_forward(q.contiguous(), k.contiguous(), v.contiguous(), Segments(lengths))
    assert torch.equal(o, whole[0])
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    allowed = (documents[:, None] == documents).tril()
    scores = torch.einsum("she,the->hst", q, k.repeat_interleave(2, 1)) / 2
    expected = scores.masked_fill(~allowed, -torch.inf).logsumexp(-1).T
    assert torch.allclose(lse, expected, rtol=1e-13, atol=1e-13)


def test_embedding():
    tokens = torch.tensor([3, 0, 3, 3, 1])  # repeated rows add up

    def backward(dx, w):
        dw = torch.zeros_like(w)
        embedding_backward(dx, tokens, dw, rows=5)
        return (dw,)

    check_pair(lambda w: embedding_forward(tokens, w, rows=5), backward, random(5, 3))


@pytest.mark.parametrize("first, rows", [(0, 4), (4, 3), (7, 0)])
def test_embedding_of_a_shard(first, rows):
    """Rows of other ranks and of padding are not this one's, forward or backward."""
    tokens, whole, dx = torch.arange(7).repeat(2), random(7, 3), random(14, 3)
    w = torch.full((4, 3), 9.0, dtype=torch.float64)
    w[:rows] = whole[first : first + rows]
    mine = (tokens >= first) & (tokens < first + rows)
    x = embedding_forward(tokens - first, w, rows)
    assert torch.equal(x, whole[tokens] * mine[:, None])
    dw, expected = torch.ones_like(w), torch.zeros_like(whole).index_add_(0, tokens, dx)
    embedding_backward(dx, tokens - first, dw, rows)
    assert torch.allclose(dw[:rows], 1 + expected[first : first + rows], rtol=1e-15)
    assert (dw[rows:] == 1).all()


WGRADS = {
    "linear": lambda dw: linear_wgrad(random(5, 4), random(5, 3), dw),
    "embedding": lambda dw: embedding_backward(random(3, 3), torch.tensor([1, 1, 0]), dw, 4),
    "norm": lambda dw: rms_norm_backward(random(2, 3), random(2, 3), random(3), dw[0], 1e-5),
}


@pytest.mark.parametrize("wgrad", WGRADS.values(), ids=WGRADS.keys())
def test_a_weight_gradient_is_added_to_what_is_there(wgrad):
    alone, held = torch.zeros(4, 3, dtype=torch.float64), random(4, 3)
    wgrad(alone)
    assert alone.norm() > 0
    added = held.clone()
    wgrad(added)
    wgrad(added)
    assert torch.allclose(added, held + 2 * alone, rtol=1e-14, atol=1e-14)


def test_a_bf16_weight_gradient_lands_in_fp32():
    """An addition smaller than bf16's resolution at the buffer's value is not lost."""
    dy, x = random(8, 4).bfloat16(), random(8, 3).bfloat16()
    dw = torch.full((4, 3), 1024.0)
    linear_wgrad(dy, x, dw)
    expected = dy.double().T @ x.double()
    assert dw.dtype == torch.float32
    assert ((dw.double() - 1024 - expected).norm() / expected.norm()) < 0.01
    rows, tokens = torch.full((4, 3), 1024.0), torch.arange(4)
    embedding_backward(x[:4], tokens, rows, len(rows))
    assert torch.equal(rows, 1024 + x[:4].float())
