"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from megallama.config.schema import Optimizer


def learning_rate(optimizer: Optimizer, step: int, total_steps: int) -> float:
    """The rate of step `step` (the first is 1) in a run of `total_steps`.

    Linear warm-up from 0, then `cosine` or `linear` decay to `min_lr` at the last step, `constant`,
    or `wsd`: constant until the last `decay_steps`, which fall linearly to `min_lr`. Because a
    constant stretch does not depend on the run's length, a wsd run may be prolonged, or its decay
    begun, from any checkpoint.
    """
    peak, low = optimizer.lr, optimizer.min_lr
    if step <= optimizer.warmup_steps:
        return peak * step / optimizer.warmup_steps
    if optimizer.schedule == "constant":
        return peak
    begin = optimizer.warmup_steps
    if optimizer.schedule == "wsd":
        begin = max(begin, total_steps - (optimizer.decay_steps or 0))
    progress = min(1.0, max(0, step - begin) / max(1, total_steps - begin))
    if optimizer.schedule == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return peak + (low - peak) * progress
