"""The global gradient norm and the one factor that gradients are multiplied by.

Gradients are sums over tokens. The factor 1 / valid tokens and the clipping factor are applied
together, once, inside the optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def squared_norms(gradients: Sequence[Tensor]) -> Tensor:
    """Σ g² of each gradient, in order, (parameters,) fp64: partial sums, added up canonically.

    Rows are summed in the gradient's dtype and their sums in fp64. Summing a whole tensor in fp32
    loses 1% on a CPU at 90M elements; by rows it is exact to 1e-9, and no slower.
    """
    rows = (torch.linalg.vector_norm(g, dim=-1).double().square() for g in gradients)
    return torch.stack([row.sum() for row in rows])


def clip_factor(norm: float, clip: float | None) -> float:
    """min(1, clip / norm), with PyTorch's ε; 1 where clipping is off."""
    return min(1.0, clip / (norm + 1e-6)) if clip else 1.0
