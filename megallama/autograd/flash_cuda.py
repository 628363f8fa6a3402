"""Flash attention on CUDA: flash-attn's kernels where it is installed, else PyTorch's own.

Both take segments of any lengths packed along the tokens, in bf16 or fp16. flash-attn is preferred
because its backward writes straight into the buffers it is given and has a deterministic mode.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from functools import cache
from typing import Any

import torch
from torch import Tensor

from megallama.autograd.segments import Segments


def forward(
    q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, segments: Segments
) -> tuple[Tensor, Tensor]:
    """Return o (T, H, E) and the log-sum-exp (T, H) fp32, a view: kernels lay heads out first."""
    offsets, longest = segments.cuda_offsets, segments.longest
    scale = q_THE.shape[-1] ** -0.5
    package = _flash_attn()
    if package is not None:
        o, lse_HT, *_ = package._flash_attn_varlen_forward(
            q_THE,
            k_TKE,
            v_TKE,
            offsets,
            offsets,
            longest,
            longest,
            dropout_p=0.0,
            softmax_scale=scale,
            causal=True,
        )
        return o, lse_HT.T
    o, lse_HT, *_ = torch.ops.aten._flash_attention_forward(
        q_THE, k_TKE, v_TKE, offsets, offsets, longest, longest, 0.0, True, False, scale=scale
    )
    return o, lse_HT.T


def backward(
    do_THE: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    o_THE: Tensor,
    lse_TH: Tensor,
    segments: Segments,
    out: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Write dq (T, H, E), dk and dv (T, K, E)."""
    offsets, longest = segments.cuda_offsets, segments.longest
    scale = do_THE.shape[-1] ** -0.5
    package = _flash_attn()
    if package is not None:
        package._flash_attn_varlen_backward(
            do_THE,
            *qkv,
            o_THE,
            lse_TH.T,
            *out,
            offsets,
            offsets,
            longest,
            longest,
            dropout_p=0.0,
            softmax_scale=scale,
            causal=True,
            window_size_left=-1,
            window_size_right=-1,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return
    # The two seeds describe dropout's random numbers; without dropout nothing reads them.
    seed = torch.zeros(2, dtype=torch.uint64, device=do_THE.device)
    gradients = torch.ops.aten._flash_attention_backward(
        do_THE,
        *qkv,
        o_THE,
        lse_TH.T,
        offsets,
        offsets,
        longest,
        longest,
        0.0,
        True,
        seed,
        seed.new_empty(0),
        scale=scale,
    )
    for output, gradient in zip(out, gradients, strict=True):
        output.copy_(gradient)


@cache
def _flash_attn() -> Any | None:
    """flash-attn's interface module; None where it is absent, or older than 2.7: other results."""
    try:
        version = importlib.metadata.version("flash_attn")
    except importlib.metadata.PackageNotFoundError:
        return None
    if tuple(int(part) for part in version.split(".")[:2]) < (2, 7):
        return None
    return importlib.import_module("flash_attn.flash_attn_interface")
