"""Lines through measured times, by which a machine's constants are found."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def fit_rate(seconds: dict[int, float]) -> tuple[float, float]:
    """(rate, half), where `half` is the size at which half the rate is reached: a unit of work
    takes (1 + half / size) / rate seconds. `seconds`: of a unit, by size."""
    flat, slope = fit_line([1 / size for size in seconds], list(seconds.values()))
    if slope <= 0 or flat <= 0:  # no faster with the size
        return 1 / statistics.mean(seconds.values()), 0.0
    return 1 / flat, slope / flat


def fit_line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """(a, b) of y = a + b·x with the least sum of squared relative errors; neither is negative."""
    weights = [1 / value**2 for value in y]
    total = sum(weights)
    mean_x = sum(w * v for w, v in zip(weights, x, strict=True)) / total
    mean_y = sum(w * v for w, v in zip(weights, y, strict=True)) / total
    spread = sum(w * (v - mean_x) ** 2 for w, v in zip(weights, x, strict=True))
    both = sum(w * (u - mean_x) * (v - mean_y) for w, u, v in zip(weights, x, y, strict=True))
    slope = both / spread
    if mean_y - slope * mean_x < 0:  # through the origin
        return 0.0, sum(w * u * v for w, u, v in zip(weights, x, y, strict=True)) / sum(
            w * u * u for w, u in zip(weights, x, strict=True)
        )
    return (mean_y, 0.0) if slope < 0 else (mean_y - slope * mean_x, slope)
