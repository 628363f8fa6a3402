"""Bytes that one process holds through a step, computed from the config alone."""

from __future__ import annotations

from megallama.config.schema import Config
from megallama.spec.parameters import EMBEDDING, parameter_table
from megallama.spec.saved import saved_bytes_per_token

#: train.precision → bytes of a weight or activation.
ITEMSIZE = {"bf16": 2, "fp32": 4, "fp64": 8}


def held_bytes(config: Config) -> dict[str, int]:
    """Parameter buffers, moments, and what the layers save of one micro-batch."""
    numel = {parameter.name: parameter.numel for parameter in parameter_table(config.model)}
    parameters, itemsize = sum(numel.values()), ITEMSIZE[config.train.precision]
    wide = max(itemsize, 4)  # masters, gradients and moments are fp32 or fp64
    tied = numel[EMBEDDING] if config.model.tie_embeddings else 0
    tokens = config.train.micro_batch * config.train.sequence_length
    a_token = saved_bytes_per_token(config.model, config.train.saved_activations, itemsize)
    return {
        "masters": parameters * wide,
        "weights": parameters * itemsize if itemsize < wide else 0,
        "gradients": (parameters + tied) * wide,
        "moments": 2 * parameters * wide,
        "saved activations": config.model.layers * tokens * a_token,
    }
