"""Causal attention through a flash kernel (arXiv 2307.08691): no S × S matrix is ever kept.

A micro-batch is a run of segments in token order: whole samples, or documents where attention must
not cross them. The kernel returns each row's log-sum-exp, from which the backward recomputes the
probabilities. Key and value heads may be fewer than query heads (grouped-query attention,
arXiv 2305.13245); every kernel here reads them in place, without copies.

On a CPU it is csrc's kernel, and PyTorch's where there is none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megallama.autograd import flash_cuda
from megallama.autograd.segments import Segments
from megallama.kernels import attention, native


def attention_forward(
    q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, segments: Segments
) -> tuple[Tensor, Tensor]:
    """Return the output o (T, H, E) and the rows' log-sum-exp (T, H)."""
    if q_THE.is_cuda:
        return flash_cuda.forward(q_THE, k_TKE, v_TKE, segments)
    if q_THE.is_meta or native.variant_for(q_THE) is not None:
        return attention.attention_forward(q_THE, k_TKE, v_TKE, segments.lengths)
    if segments.uniform:
        return _cpu_forward(q_THE, k_TKE, v_TKE, segments.longest)
    o_THE = q_THE.new_empty(q_THE.shape)
    lse_TH = q_THE.new_empty(q_THE.shape[:2], dtype=torch.promote_types(q_THE.dtype, torch.float32))
    pieces = (t.split(segments.lengths) for t in (q_THE, k_TKE, v_TKE, o_THE, lse_TH))
    for q, k, v, o, lse in zip(*pieces, strict=True):
        o_piece, lse_piece = _cpu_forward(q, k, v, len(q))
        o.copy_(o_piece)
        lse.copy_(lse_piece)
    return o_THE, lse_TH


def attention_backward(
    do_THE: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    o_THE: Tensor,
    lse_TH: Tensor,
    segments: Segments,
    out: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Write dq (T, H, E), dk and dv (T, K, E) from what the forward was given and returned.

    `out` may be views of one fused tensor.
    """
    if do_THE.is_cuda:
        flash_cuda.backward(do_THE, qkv, o_THE, lse_TH, segments, out)
    elif do_THE.is_meta or native.variant_for(do_THE) is not None:
        attention.attention_backward(do_THE, qkv, o_THE, lse_TH, segments.lengths, out)
    elif segments.uniform:
        _cpu_backward(do_THE, qkv, o_THE, lse_TH, segments.longest, out)
    else:
        pieces = (t.split(segments.lengths) for t in (do_THE, *qkv, o_THE, lse_TH, *out))
        for do, q, k, v, o, piece_lse, dq, dk, dv in zip(*pieces, strict=True):
            _cpu_backward(do, (q, k, v), o, piece_lse, len(do), (dq, dk, dv))


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, length: int) -> tuple[Tensor, Tensor]:
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(_split_samples(t, length) for t in (q, k, v)), 0.0, True
    )
    return _join_samples(o), _join_samples(lse)


def _cpu_backward(
    do: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    o: Tensor,
    lse: Tensor,
    length: int,
    out: tuple[Tensor, Tensor, Tensor],
) -> None:
    split = (_split_samples(t, length) for t in (do, *qkv, o, lse))
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *split, 0.0, True
    )
    for output, gradient in zip(out, gradients, strict=True):
        output.copy_(_join_samples(gradient))


def _split_samples(t: Tensor, length: int) -> Tensor:
    """(T, H, …) → (T / length, H, length, …): PyTorch's order of dimensions, as a view."""
    return t.unflatten(0, (-1, length)).transpose(1, 2)


def _join_samples(t: Tensor) -> Tensor:
    """The inverse of `_split_samples`; a view, since the CPU kernel lays tokens out first."""
    return t.transpose(1, 2).flatten(0, 1)
