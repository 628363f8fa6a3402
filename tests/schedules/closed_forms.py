"""What the papers promise of each schedule, as formulas of p stages, m micro-batches, v chunks.

Narayanan et al., arXiv 2104.04473 (1F1B, interleaved); Huang et al., arXiv 1811.06965 (GPipe); Qi
et al., arXiv 2401.10241 (ZB-H1, ZB-H2, ZB-V), table 1 and §6; the fused forms' are our own.
"""

from __future__ import annotations

from megallama.config.schedules import VIRTUAL_STAGES


def virtual_stages(name: str, most: int) -> range:
    """The numbers of virtual stages up to `most` that make different lists of a schedule."""
    takes = VIRTUAL_STAGES[name]
    return range(2, most + 1) if takes is None else range(takes, takes + 1)


def owner(name: str, p: int, chunk: int) -> int:
    """The rank of a chunk: round and round, or a V."""
    if name == "zb-v":
        return chunk if chunk < p else 2 * p - 1 - chunk
    return chunk % p


def in_flight(name: str, p: int, m: int, v: int, rank: int) -> tuple[int, bool]:
    """Saved sets from F to B, counted by chunk, and whether that is exact (or a bound).

    Interleaved: the warm-up and one more, as Megatron's loop; where p does not divide m the bound
    is that of the next multiple. ZB-V: 1F1B's memory, p micro-batches of two chunks; with fewer
    than 2p-1 micro-batches the first ranks have less, as a round of theirs waits for gradients.
    """
    left = p - rank
    whole = -(-m // p) * p
    return {
        "gpipe": (m, True),
        "1f1b": (min(m, left), True),
        "1f1b-fused": (min(m, 2 * left), True),
        "interleaved": (min(m * v, 2 * (left - 1) + (v - 1) * p + 1), m == whole),
        "interleaved-fused": (min(m * v, 2 * (left - 1) + (v - 1) * p + 2), m == whole),
        "zb-h1": (min(m, left), True),
        "zb-h2": (min(m, 2 * left - 1), True),
        "zb-v": (min(2 * m, 2 * p, m + rank + 1), True),
    }[name]


def until_weight_gradient(name: str, p: int, m: int, rank: int) -> int | None:
    """Sets from F to W, by chunk: the papers' memory, which holds a set until W has used it.

    ZB-H1: that of 1F1B's first rank, on every rank. ZB-H2: 2p-1. ZB-V: 1F1B's, p whole shares.
    None: every backward is whole.
    """
    zb_v = min(2 * m, 2 * p, m + rank + 1)
    return {"zb-h1": min(m, p), "zb-h2": min(m, 2 * p - 1), "zb-v": zb_v}.get(name)


def bubble(name: str, p: int, m: int, v: int, times: tuple[float, float, float]) -> float | None:
    """The published bubble where the paper's condition on m, and on the times, holds; else None."""
    forward, backward, weight = times
    whole = (p - 1) * (forward + backward + weight)
    fits = weight <= forward  # a W must not delay the forward that the next rank waits for
    if name in ("gpipe", "1f1b", "1f1b-fused"):
        return whole
    if name.startswith("interleaved") and m % p == 0:
        return whole / v
    if name == "zb-h1" and m >= p and fits:
        return (p - 1) * (forward + backward - weight)
    if name == "zb-h2" and m >= 2 * p - 1 and fits and forward + backward >= 2 * weight:
        return (p - 1) * (forward + backward - 2 * weight)
    if name == "zb-v" and m >= 2 * p - 1 and forward == backward == weight:
        return 0.0
    return None
