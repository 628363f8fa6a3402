"""Causal flash attention on the CPU (FlashAttention-2, arXiv 2307.08691).

The tokens are a run of segments, and a query attends to the keys of its own segment up to itself.
Key and value heads may be fewer than query heads (grouped-query attention, arXiv 2305.13245); they
are read in place. Scores are scaled by 1/√E. T tokens, H query heads, K key/value heads, E head
width.

Sums are of fp32 (fp64 under fp64). Where the CPU multiplies bf16 (AVX-512), probabilities and their
gradients are rounded to it for the products that they enter, as on GPUs; elsewhere they are not.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from megallama.kernels import check, native
from megallama.kernels.op import define


def attention_forward(
    q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the output o (T, H, E) and the rows' log-sum-exp (T, H) of fp32 or wider.

    `lengths`: those of the segments, in order; their sum is T. q, k and v may be strided views.
    """
    o_THE = q_THE.new_empty(q_THE.shape)
    lse_TH = q_THE.new_empty(q_THE.shape[:2], dtype=check.wide(q_THE.dtype))
    _forward(q_THE, k_TKE, v_TKE, lengths, o_THE, lse_TH)
    return o_THE, lse_TH


def attention_backward(
    do_THE: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    o_THE: Tensor,
    lse_TH: Tensor,
    lengths: Sequence[int],
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq (T, H, E), dk and dv (T, K, E) from what the forward was given and returned.

    They go into `out` where it is given: views of one fused matrix will do, of qkv's will not.
    """
    dq, dk, dv = out or tuple(x.new_empty(x.shape) for x in qkv)
    _backward(do_THE, *qkv, o_THE, lse_TH, lengths, dq, dk, dv)
    return dq, dk, dv


def _forward_reference(
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKE: Tensor,
    lengths: Sequence[int],
    o_THE: Tensor,
    lse_TH: Tensor,
) -> None:
    operands = (x.to(lse_TH.dtype) for x in (q_THE, k_TKE, v_TKE))
    pieces = (x.split(list(lengths)) for x in (*operands, o_THE, lse_TH))
    for q, k, v, o, lse in zip(*pieces, strict=True):
        scores = _scores(q, k)
        lse.copy_(scores.logsumexp(-1).T)
        o.copy_(torch.einsum("hst,the->she", scores.softmax(-1), _every_head(v, q)))


def _backward_reference(
    do_THE: Tensor,
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKE: Tensor,
    o_THE: Tensor,
    lse_TH: Tensor,
    lengths: Sequence[int],
    dq_THE: Tensor,
    dk_TKE: Tensor,
    dv_TKE: Tensor,
) -> None:
    operands = (x.to(lse_TH.dtype) for x in (do_THE, q_THE, k_TKE, v_TKE, o_THE, lse_TH))
    pieces = (x.split(list(lengths)) for x in (*operands, dq_THE, dk_TKE, dv_TKE))
    for do, q, k, v, o, lse, dq, dk, dv in zip(*pieces, strict=True):
        p = (_scores(q, k) - lse.T[..., None]).exp_()
        dp = torch.einsum("she,the->hst", do, _every_head(v, q))
        ds = (dp - (do * o).sum(-1).T[..., None]).mul_(p).div_(math.sqrt(q.shape[-1]))
        dq.copy_(torch.einsum("hst,the->she", ds, _every_head(k, q)))
        for gradient, weights, x in ((dk, ds, q), (dv, p, do)):
            each = torch.einsum("hst,she->the", weights, x)
            gradient.copy_(each.unflatten(1, (k.shape[1], -1)).sum(2))


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """(H, S, S) of one segment, −∞ where the key comes after the query."""
    scores = torch.einsum("she,the->hst", q, _every_head(k, q)).div_(math.sqrt(q.shape[-1]))
    later = torch.ones(len(q), len(q), dtype=torch.bool, device=q.device).triu_(1)
    return scores.masked_fill_(later, -torch.inf)


def _every_head(x_SKE: Tensor, q_SHE: Tensor) -> Tensor:
    """Keys or values (S, H, E), each as often as queries share it."""
    return x_SKE.repeat_interleave(q_SHE.shape[1] // x_SKE.shape[1], dim=1)


def _check_inputs(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, lengths: Sequence[int]) -> None:
    check.floating("q", q_THE)
    if q_THE.is_cuda:
        raise ValueError(f"q is on {q_THE.device}; this is attention for the CPU")
    if q_THE.dim() != 3 or k_TKE.dim() != 3:
        shapes = f"{tuple(q_THE.shape)} and {tuple(k_TKE.shape)}"
        raise ValueError(f"q and k have shapes {shapes}; (T, H, E) and (T, K, E) are needed")
    tokens, heads, width = q_THE.shape
    keys = k_TKE.shape[1]
    if width < 1:
        raise ValueError("q has heads of width 0; 1 or more is needed")
    if keys < 1 or heads % keys:
        raise ValueError(f"q has {heads} heads; a multiple of k's {keys} is needed")
    check.operand("q", q_THE, q_THE.shape, q_THE)
    for name, x in (("k", k_TKE), ("v", v_TKE)):
        check.operand(name, x, (tokens, keys, width), q_THE)
    if any(length < 0 for length in lengths) or sum(lengths) != tokens:
        raise ValueError(f"lengths are {list(lengths)}; numbers whose sum is {tokens} are needed")


def _forward_check(
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKE: Tensor,
    lengths: Sequence[int],
    o_THE: Tensor,
    lse_TH: Tensor,
) -> None:
    _check_inputs(q_THE, k_TKE, v_TKE, lengths)
    check.result("o", o_THE, q_THE.shape, q_THE)
    check.result("lse", lse_TH, q_THE.shape[:2], q_THE, check.wide(q_THE.dtype))


def _backward_check(
    do_THE: Tensor,
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKE: Tensor,
    o_THE: Tensor,
    lse_TH: Tensor,
    lengths: Sequence[int],
    dq_THE: Tensor,
    dk_TKE: Tensor,
    dv_TKE: Tensor,
) -> None:
    _check_inputs(q_THE, k_TKE, v_TKE, lengths)
    check.operand("do", do_THE, q_THE.shape, q_THE)
    check.operand("o", o_THE, q_THE.shape, q_THE)
    check.operand("lse", lse_TH, q_THE.shape[:2], q_THE, check.wide(q_THE.dtype))
    for name, x, like in (("dq", dq_THE, q_THE), ("dk", dk_TKE, k_TKE), ("dv", dv_TKE, v_TKE)):
        check.result(name, x, like.shape, q_THE)


def _attention(q_THE: Tensor, k_TKE: Tensor, offsets: Tensor) -> tuple[int, int, int, int]:
    """As struct Attention of csrc/ops.h has it; `offsets`: where segments begin, and T."""
    return offsets.data_ptr(), len(offsets) - 1, q_THE.shape[1], k_TKE.shape[1]


def _offsets(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int64)


def _forward_run(
    variant: ModuleType,
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKE: Tensor,
    lengths: Sequence[int],
    o_THE: Tensor,
    lse_TH: Tensor,
) -> None:
    offsets = _offsets(lengths)
    launch = native.launch(q_THE, q_THE.shape[0], q_THE.shape[2])
    tensors = map(native.heads, (q_THE, k_TKE, v_TKE, o_THE))
    attention = _attention(q_THE, k_TKE, offsets)
    variant.attention_forward(launch, attention, *tensors, native.rows(lse_TH))


def _backward_run(
    variant: ModuleType,
    do_THE: Tensor,
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKE: Tensor,
    o_THE: Tensor,
    lse_TH: Tensor,
    lengths: Sequence[int],
    dq_THE: Tensor,
    dk_TKE: Tensor,
    dv_TKE: Tensor,
) -> None:
    offsets = _offsets(lengths)
    launch = native.launch(q_THE, q_THE.shape[0], q_THE.shape[2])
    inputs = map(native.heads, (do_THE, q_THE, k_TKE, v_TKE, o_THE))
    results = map(native.heads, (dq_THE, dk_TKE, dv_TKE))
    attention = _attention(q_THE, k_TKE, offsets)
    variant.attention_backward(launch, attention, *inputs, native.rows(lse_TH), *results)


_forward = define(
    "attention_forward(Tensor q, Tensor k, Tensor v, int[] lengths, Tensor(a!) o, Tensor(b!) lse) "
    "-> ()",
    _forward_check,
    _forward_run,
    _forward_reference,
)
_backward = define(
    "attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
    "int[] lengths, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) -> ()",
    _backward_check,
    _backward_run,
    _backward_reference,
)
