"""Flash attention on CUDA: flash-attn's kernels where it is installed, else PyTorch's own.

Both take segments of any lengths packed along the tokens, in bf16 or fp16. flash-attn is preferred
because its backward writes straight into the buffers it is given and has a deterministic mode.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor


def forward(
    q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, lengths: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Return o (T, H, E) and the log-sum-exp (H, T) fp32."""
    offsets, longest, scale = _varlen(q_THE, lengths)
    package = _flash_attn()
    if package is not None:
        o, lse, *_ = package._flash_attn_varlen_forward(
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
        return o, lse
    o, lse, *_ = torch.ops.aten._flash_attention_forward(
        q_THE, k_TKE, v_TKE, offsets, offsets, longest, longest, 0.0, True, False, scale=scale
    )
    return o, lse


def backward(
    do_THE: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    o_THE: Tensor,
    lse: Tensor,
    lengths: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq (T, H, E), dk and dv (T, K, E)."""
    offsets, longest, scale = _varlen(do_THE, lengths)
    package = _flash_attn()
    if package is not None:
        dq, dk, dv = (t.new_empty(t.shape) for t in qkv)
        package._flash_attn_varlen_backward(
            do_THE,
            *qkv,
            o_THE,
            lse,
            dq,
            dk,
            dv,
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
        return dq, dk, dv
    # The two seeds describe dropout's random numbers; without dropout nothing reads them.
    seed = torch.zeros(2, dtype=torch.uint64, device=do_THE.device)
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        do_THE,
        *qkv,
        o_THE,
        lse,
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
    return dq, dk, dv


def _varlen(q_THE: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, int, float]:
    """The segments' offsets (segments + 1,) int32, the longest segment, the softmax scale."""
    starts = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    # From pinned memory the copy is asynchronous: the host does not wait for the device.
    offsets = starts.pin_memory().to(q_THE.device, non_blocking=True)
    return offsets, max(lengths), q_THE.shape[-1] ** -0.5


def _flash_attn() -> Any | None:
    """flash-attn's interface module, or None where the package is not installed."""
    if importlib.util.find_spec("flash_attn") is None:
        return None
    return importlib.import_module("flash_attn.flash_attn_interface")
