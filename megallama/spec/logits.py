"""How many tokens' logits exist at a time: the loss takes a micro-batch in chunks."""

from __future__ import annotations

#: Bytes of a chunk of logits, by device type; two exist at a time among tensor ranks. On a CPU (2
#: cores, V=32,000, bf16) chunks below 1,000 tokens lose more to the fp32 accumulation of the weight
#: gradient than they gain in cache. On a GPU it is 8,192 tokens at V=128k; chosen, not measured.
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 2 << 30}


def chunk_length(tokens: int, rows: int, itemsize: int, budget: int) -> int:
    """Tokens a chunk, as even as `budget` bytes allow; the last chunk may be shorter.

    `rows`: of this rank's share of the vocabulary, padding included.
    """
    most = max(1, budget // (rows * itemsize))
    chunks = -(-tokens // most)
    return -(-tokens // chunks)


def chunk_count(tokens: int, rows: int, itemsize: int, budget: int) -> int:
    """Chunks of a micro-batch."""
    return -(-tokens // chunk_length(tokens, rows, itemsize, budget))
