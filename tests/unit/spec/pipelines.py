"""Small runs on pipelines, for the tests of what follows from a config."""

from __future__ import annotations

from typing import Any

from megallama.config.load import parse_config
from megallama.config.schema import Config

#: Schedule → the chunks that it gives a rank where nothing is said.
CHUNKS = {
    "gpipe": 1,
    "1f1b": 1,
    "interleaved": 2,
    "zb-h1": 1,
    "zb-h2": 1,
    "zb-v": 2,
    "1f1b-fused": 1,
    "interleaved-fused": 2,
}


def run(model: dict[str, Any] | None = None, **parallel: Any) -> Config:
    """A run of 24 micro-batches of 16 tokens, over the data ranks."""
    shape = {"d_model": 32, "layers": 8, "heads": 8, "kv_heads": 2, "ffn": 48, "vocab": 61}
    return parse_config(
        {
            "model": shape | (model or {}),
            "train": {"steps": 1, "sequence_length": 16, "global_batch": 24, "precision": "fp32"},
            "optimizer": {"lr": 1e-3},
            "parallel": parallel,
        }
    )
