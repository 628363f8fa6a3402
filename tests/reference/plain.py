"""LLaMA in plain PyTorch, differentiated by autograd: a function of a dict of named weights.

Everything is computed in the weights' dtype, with no fp32 island; only the rotation angles are
fp64, before they are rounded to it. Sources: Touvron et al. 2023, section 2.2; Su et al. 2021,
equation 34, on pairs (i, i + E/2); Llama 3.1's frequency scaling.

B samples, S positions, D model width, H query heads, K key/value heads, G = H/K, E head width,
F feed-forward width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from . import IGNORED, Result, ShapeLike, document_positions, rope_scaling


def rms_norm(x_BSD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight."""
    return x_BSD / (x_BSD.square().mean(-1, keepdim=True) + eps).sqrt() * weight_D


def frequencies(shape: ShapeLike) -> Tensor:
    """Radians a position, one for each pair of a head's E dimensions: (E/2,), in fp64."""
    head_width = shape.d_model // shape.heads
    pair = torch.arange(head_width // 2, dtype=torch.float64)
    omega = shape.rope_theta ** (-2 * pair / head_width)
    scaling = rope_scaling(shape)
    if scaling is None:
        return omega
    # How many turns the pair makes in the original context decides how much it is slowed down.
    turns = scaling.original_context * omega / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return omega * (kept + (1 - kept) / scaling.factor)


def rotate(x_BSNE: Tensor, angles_BSE: Tensor) -> Tensor:
    """Turns each pair (i, i + E/2) of every head by its angle; `angles` is (B, S, E/2)."""
    cos, sin = (f(angles_BSE).unsqueeze(2).to(x_BSNE.dtype) for f in (torch.cos, torch.sin))
    first, second = x_BSNE.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attention(q_BSHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, allowed_BSS: Tensor) -> Tensor:
    """Softmax attention; query head h reads key/value head h // G. Returns (B, S, D)."""
    heads = k_BSKE.shape[2]
    q_BSKGE = q_BSHE.unflatten(2, (heads, -1))
    scores = torch.einsum("bskge,btke->bkgst", q_BSKGE, k_BSKE) / math.sqrt(q_BSHE.shape[-1])
    scores = scores.masked_fill(~allowed_BSS[:, None, None], -math.inf)
    return torch.einsum("bkgst,btke->bskge", scores.softmax(-1), v_BSKE).flatten(2)


def forward(
    shape: ShapeLike,
    weights: Mapping[str, Tensor],
    tokens: Tensor,
    document_lengths: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """Logits (B, S, V) of tokens (B, S); with documents, none attends to another."""
    samples, length = tokens.shape
    lengths = document_lengths or [[length]] * samples
    document, position = (t.to(tokens.device) for t in document_positions(lengths, length))
    allowed = (document[:, :, None] == document[:, None, :]).tril()
    angles = position.unsqueeze(-1) * frequencies(shape).to(tokens.device)

    x = weights["tok_embeddings.weight"][tokens]
    for i in range(shape.layers):
        layer = f"layers.{i}."
        n1 = rms_norm(x, weights[layer + "attention_norm.weight"], shape.norm_eps)
        q, k, v = (
            (n1 @ weights[f"{layer}attention.{name}.weight"].T).unflatten(2, (heads, -1))
            for name, heads in (("wq", shape.heads), ("wk", shape.kv_heads), ("wv", shape.kv_heads))
        )
        o = attention(rotate(q, angles), rotate(k, angles), v, allowed)
        x = x + o @ weights[layer + "attention.wo.weight"].T
        n2 = rms_norm(x, weights[layer + "ffn_norm.weight"], shape.norm_eps)
        gate, up = (n2 @ weights[f"{layer}feed_forward.{name}.weight"].T for name in ("w1", "w3"))
        x = x + (gate * gate.sigmoid() * up) @ weights[layer + "feed_forward.w2.weight"].T
    head = "tok_embeddings.weight" if shape.tie_embeddings else "output.weight"
    return rms_norm(x, weights["norm.weight"], shape.norm_eps) @ weights[head].T


def forward_backward(
    shape: ShapeLike,
    weights: Mapping[str, Tensor],
    tokens: Tensor,
    labels: Tensor,
    dtype: torch.dtype = torch.float64,
    document_lengths: Sequence[Sequence[int]] | None = None,
    reduction: Literal["sum", "mean"] = "sum",
) -> Result:
    """Loss over the labels that are not -100 (already shifted), logits, every gradient."""
    leaves = {name: w.detach().to(dtype).clone().requires_grad_() for name, w in weights.items()}
    logits = forward(shape, leaves, tokens, document_lengths)
    valid = labels != IGNORED
    target = logits.gather(-1, labels.masked_fill(~valid, 0).unsqueeze(-1)).squeeze(-1)
    losses = (logits.logsumexp(-1) - target)[valid]
    loss = losses.sum() if reduction == "sum" else losses.mean()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return Result(loss.detach(), logits.detach(), dict(zip(leaves, grads, strict=True)))
