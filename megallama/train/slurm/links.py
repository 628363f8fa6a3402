"""Which node's network is slow, from what pairs of nodes exchanged before a run.

Each node has two pairs, with its neighbours in a ring, one after the other. A node all of whose
pairs are slow is at fault where a neighbour of it has a fast one: that neighbour is well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

#: A pair exchanges at this share of the fastest quarter's speed at least. A port that fell back to
#: half its rate is below, and a pair whose switch is busy mostly above.
SLOWEST_LINK = 0.7
#: Seconds that the first node waits for the others' looks at themselves, and that a pair has.
GATHERING, EXCHANGE = 60.0, 30.0
#: Seconds of it all: the first node's start and gathering; three rounds, each an exchange and a
#: wait for those of others; the wait for all to leave.
LONGEST = 2 * GATHERING + 7 * EXCHANGE

Pair = tuple[int, int]


def rounds(count: int) -> list[list[Pair]]:
    """The pairs of `count` nodes that exchange at the same time, round by round: a ring's even and
    odd edges, and the edge that closes an odd ring alone."""
    if count < 3:
        return [[(0, 1)]] if count == 2 else []
    edges = [(node, (node + 1) % count) for node in range(count)]
    even, odd, last = edges[: count - 1 : 2], edges[1 : count - 1 : 2], edges[count - 1]
    return [even, [*odd, last]] if count % 2 == 0 else [even, odd, [last]]


def judge(links: Mapping[str, Mapping[str, float]]) -> tuple[dict[str, str], list[str]]:
    """Nodes at fault → what is wrong with them; and lines on slow pairs that blame nobody.

    `links`: node → peer → GB/s as the node measured it, 0 where the exchange failed. Of a pair's
    two figures the lower one counts; a node that said nothing has its peers' figures.
    """
    speeds: dict[str, dict[str, float]] = {}
    for node, found in links.items():
        for peer, speed in found.items():
            known = speeds.setdefault(node, {}).get(peer, speed)
            speeds[node][peer] = speeds.setdefault(peer, {})[node] = min(speed, known)
    if not speeds:
        return {}, []
    fastest = sorted((s for found in speeds.values() for s in found.values()), reverse=True)
    floor = SLOWEST_LINK * fastest[len(fastest) // 4]  # in a small ring half the pairs may be slow
    slow = {
        node: found
        for node, found in speeds.items()
        if all(speed == 0 or speed < floor for speed in found.values())
    }
    faults = {
        node: f"its network is slow: {_said(found.items(), floor)}"
        for node, found in slow.items()
        if any(peer not in slow for peer in found)
    }
    unclear = [
        f"{node}: {_said([(peer, speed)], floor)}; one of the two is slow"
        for node in slow
        for peer, speed in slow[node].items()
        if node < peer and node not in faults and peer not in faults
    ]
    return faults, unclear


def _said(found: Iterable[tuple[str, float]], floor: float) -> str:
    parts = [
        f"{speed:.1f} GB/s with {peer}" if speed else f"none with {peer}" for peer, speed in found
    ]
    return f"{' and '.join(parts)}, below {floor:.1f}"
