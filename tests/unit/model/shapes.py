"""The model shapes and documents that the tests of the whole model share."""

from __future__ import annotations

from tests.reference import Shape

#: Of a head's four pairs one is kept, one is interpolated and two are slowed down.
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context": 128}

SHAPES = {
    "multi-head": Shape(kv_heads=4),
    "grouped": Shape(),
    "multi-query": Shape(kv_heads=1),
    "tied": Shape(tie_embeddings=True),
    "tied multi-head": Shape(kv_heads=4, tie_embeddings=True),
    "scaled rope": Shape(rope_scaling=SCALING),
    "llama 3": Shape(rope_theta=500_000.0, rope_scaling=SCALING),
    "large epsilon": Shape(norm_eps=0.1),
    "heads of 12": Shape(d_model=36, heads=3, kv_heads=3),
    "one layer": Shape(layers=1, kv_heads=1, tie_embeddings=True),
}

#: Length → the document lengths of three samples, or None where attention crosses documents.
DOCUMENTS = {
    1: [None],
    7: [None, [[7], [3, 4], [1, 1, 5]]],
    13: [None, [[4, 9], [1, 11, 1], [5, 5, 3]]],
}
CASES = [(length, documents) for length, choices in DOCUMENTS.items() for documents in choices]
