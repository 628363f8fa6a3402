"""Floating-point operations of a training step, and the peaks that utilisation is measured by."""

from __future__ import annotations

import re

from megallama.config.schema import Model

#: Dense bf16 peak in FLOP/s by whole words of the device's name (vendors' data sheets), the first
#: that fits. A device that is not listed has no utilisation: a denominator is never guessed.
PEAK_FLOPS: dict[str, float] = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
}


def layer_flops(model: Model, sequence_length: int) -> int:
    """FLOPs of a decoder layer's forward and backward a token: 6·[(2+2K/H)·D² + 3·D·F + D·S]."""
    d = model.d_model
    attention = 2 * d * (d + model.kv_heads * model.head_width)
    return 6 * (attention + 3 * d * model.ffn + d * sequence_length)


def head_flops(model: Model) -> int:
    """FLOPs of the output projection's forward and backward a token: 6·V·D."""
    return 6 * model.vocab * model.d_model


def flops_per_token(model: Model, sequence_length: int) -> float:
    """FLOPs of forward and backward a token: 6·L·[(2+2K/H)·D² + 3·D·F] + 6·V·D + 6·L·D·S.

    A multiply-add counts two, the backward twice the forward, causal attention half of S², and
    recomputation nothing.
    """
    return float(model.layers * layer_flops(model, sequence_length) + head_flops(model))


def flops_per_token_6n(parameters: int) -> float:
    """The plain estimate, 6 FLOPs a parameter and token (arXiv 2001.08361): no attention term."""
    return 6.0 * parameters


def peak_flops(device_name: str) -> float | None:
    """The bf16 peak of the named device, or None where it is unknown."""
    found = (peak for words, peak in PEAK_FLOPS.items() if re.search(rf"\b{words}\b", device_name))
    return next(found, None)
