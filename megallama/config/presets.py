"""Published model shapes, by name: the `model.preset` key.

LLaMA 1: Touvron et al., arXiv 2302.13971, table 2. Llama 2: arXiv 2307.09288 (34B: the shape of
Code Llama 34B, arXiv 2308.12950). Llama 3: arXiv 2407.21783, table 3. Feed-forward widths and
norm_eps are those of the released weights. Training recipes are in configs/.
"""

from __future__ import annotations

from typing import Literal

Preset = Literal[
    "llama-7b",
    "llama-13b",
    "llama-33b",
    "llama-65b",
    "llama2-7b",
    "llama2-13b",
    "llama2-34b",
    "llama2-70b",
    "llama3-8b",
]

Shape = dict[str, int | float]


def _llama(d_model: int, layers: int, heads: int, ffn: int, norm_eps: float) -> Shape:
    return {
        "d_model": d_model,
        "layers": layers,
        "heads": heads,
        "ffn": ffn,
        "vocab": 32000,
        "norm_eps": norm_eps,
    }


PRESETS: dict[str, Shape] = {
    "llama-7b": _llama(4096, 32, 32, 11008, 1e-6),
    "llama-13b": _llama(5120, 40, 40, 13824, 1e-6),
    "llama-33b": _llama(6656, 60, 52, 17920, 1e-6),
    "llama-65b": _llama(8192, 80, 64, 22016, 1e-6),
    "llama2-7b": _llama(4096, 32, 32, 11008, 1e-5),
    "llama2-13b": _llama(5120, 40, 40, 13824, 1e-5),
    "llama2-34b": {**_llama(8192, 48, 64, 22016, 1e-5), "kv_heads": 8},
    "llama2-70b": {**_llama(8192, 80, 64, 28672, 1e-5), "kv_heads": 8},
    "llama3-8b": {
        **_llama(4096, 32, 32, 14336, 1e-5),
        "kv_heads": 8,
        "vocab": 128256,
        "rope_theta": 500000.0,
    },
}
