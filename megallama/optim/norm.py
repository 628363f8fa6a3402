"""The one factor that gradients are multiplied by.

Gradients are sums over tokens. The factor 1 / valid tokens and the clipping factor are applied
together, once, inside the optimizer.
"""

from __future__ import annotations


def clip_factor(norm: float, clip: float | None) -> float:
    """min(1, clip / norm), with PyTorch's ε; 1 where clipping is off."""
    return min(1.0, clip / (norm + 1e-6)) if clip else 1.0
