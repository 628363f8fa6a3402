"""Speed figures of a step, the same for `train` and `bench`."""

from __future__ import annotations

from typing import Any

from megallama.spec.flops import flops_per_token, flops_per_token_6n
from megallama.train.build import Trainer
from megallama.train.device import device_peak_flops, peak_memory_bytes


def speed(trainer: Trainer, tokens: int, seconds: float) -> dict[str, Any]:
    """Tokens/s, TFLOP/s and utilisation of a step over `tokens` on all ranks.

    `mfu*` is None where the device's peak is unknown; memory is this rank's.
    """
    config, device = trainer.config, trainer.device
    rate = tokens / seconds / trainer.place.grid.size
    flops = rate * flops_per_token(config.model, config.train.sequence_length)
    flops_6n = rate * flops_per_token_6n(trainer.parameters)
    peak = device_peak_flops(device)
    return {
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_per_gpu": rate,
        "tflops_per_gpu": flops / 1e12,
        "mfu": flops / peak if peak else None,
        "mfu_6n": flops_6n / peak if peak else None,
        "memory_bytes": peak_memory_bytes(device),
    }
