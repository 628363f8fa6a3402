"""Flash attention on a GPU against softmax attention in fp64: documents, grouped queries, views."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megallama.autograd.attention import attention_backward, attention_forward
from megallama.autograd.segments import Segments
from tests.gpu.models import assert_as_good

#: Lengths of segments, query heads, key/value heads, head width.
CASES = [
    ((256, 256), 4, 4, 128),
    ((300, 1, 77, 134), 4, 2, 64),
    ((129,), 6, 1, 8),
    ((5, 2, 1), 2, 2, 256),
]


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """The output (T, H, E) and the log-sum-exp (T, H), in the operands' own type."""
    outputs, log_sums = [], []
    for q_s, k_s, v_s in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        group = q.shape[1] // k.shape[1]
        keys, values = (x.repeat_interleave(group, dim=1) for x in (k_s, v_s))
        scores = torch.einsum("she,the->hst", q_s, keys) * q.shape[-1] ** -0.5
        future = torch.ones(len(q_s), len(q_s), device=q.device).triu(1).bool()
        scores = scores.masked_fill(future, -torch.inf)
        outputs.append(torch.einsum("hst,the->she", scores.softmax(-1), values))
        log_sums.append(scores.logsumexp(-1).T)
    return torch.cat(outputs), torch.cat(log_sums)


def heads_of(qkv: Tensor, heads: int, keys: int, width: int) -> tuple[Tensor, ...]:
    return qkv.unflatten(1, (-1, width)).split((heads, keys, keys), dim=1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward_on_views_of_fused_rows(device, case):
    lengths, *sizes = case
    heads, keys, width = sizes
    generator = torch.Generator().manual_seed(0)
    rows = sum(lengths), (heads + 2 * keys) * width
    qkv, do = (
        torch.randn(shape, generator=generator).bfloat16()
        for shape in (rows, (rows[0], heads, width))
    )
    results = {}
    for name, where, dtype in (("truth", "cpu", torch.float64), ("naive", device, torch.bfloat16)):
        leaf = qkv.to(where, dtype, copy=True).requires_grad_()
        o, lse = softmax_attention(*heads_of(leaf, *sizes), lengths)
        (dqkv,) = torch.autograd.grad(o, leaf, do.to(where, dtype))
        results[name] = o.detach(), lse.detach(), dqkv
    ours, dours = qkv.to(device, copy=True), torch.full_like(qkv, torch.nan, device=device)
    segments = Segments(lengths)
    o, lse = attention_forward(*heads_of(ours, *sizes), segments)
    out = heads_of(dours, *sizes)
    attention_backward(do.to(device), heads_of(ours, *sizes), o, lse, segments, out)
    found = zip(("o", "lse", "dqkv"), (o, lse, dours), strict=True)
    for (name, mine), naive, truth in zip(found, results["naive"], results["truth"], strict=True):
        assert_as_good(mine, naive, truth, name)
    assert lse.dtype == torch.float32
    assert torch.equal(ours.cpu(), qkv), "an operand was overwritten"
