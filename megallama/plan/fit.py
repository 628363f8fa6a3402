"""Two of the A100's constants, fitted to published steps; the other constants have sources.

`gemm.addition` and `memory.shares.softmax` are what no data sheet has: how much longer a product
takes that is added into an fp32 gradient, and what Megatron-LM's softmax and dropout kernels reach.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from megallama.plan.hardware import Hardware
from megallama.plan.published import Run, compare

#: Bounds that make sense: 1.5 is an addition by a kernel of its own; a copy has a share of 1.
LEAST, MOST = np.array([0.0, 0.2]), np.array([1.5, 1.0])


def with_fitted(hardware: Hardware, addition: float, softmax: float) -> Hardware:
    """The machine with other values of the two."""
    shares = hardware.memory.shares.model_copy(update={"softmax": softmax})
    memory = hardware.memory.model_copy(update={"shares": shares})
    gemm = hardware.gemm.model_copy(update={"addition": addition})
    return hardware.model_copy(update={"gemm": gemm, "memory": memory})


def fit(runs: Sequence[Run], hardware: Hardware) -> tuple[float, float]:
    """The values with the least sum of squared relative errors (Gauss-Newton)."""

    def errors(values: np.ndarray) -> np.ndarray:
        machine = with_fitted(hardware, *map(float, values))
        return np.array([line.error for line in compare(runs, machine)])

    values = np.array([1.0, 0.5])
    for _ in range(6):
        step = np.linalg.lstsq(_slopes(errors, values), -errors(values), rcond=None)[0]
        values = np.clip(values + step, LEAST, MOST)
    return float(values[0]), float(values[1])


def _slopes(errors: Callable[[np.ndarray], np.ndarray], values: np.ndarray) -> np.ndarray:
    small = 1e-3
    columns = [errors(values + small * unit) - errors(values) for unit in np.eye(len(values))]
    return np.stack(columns, axis=1) / small
