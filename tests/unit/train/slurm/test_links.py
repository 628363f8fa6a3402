"""Whose network is at fault, from what pairs of nodes exchanged."""

from __future__ import annotations

import random
from collections import Counter
from itertools import chain

import pytest

from megallama.train.slurm.links import judge, rounds


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 8, 255, 256])
def test_in_a_round_nobody_is_twice_and_in_all_everybody_has_both_neighbours(count: int) -> None:
    found = rounds(count)
    for pairs in found:
        assert len({*chain.from_iterable(pairs)}) == 2 * len(pairs)
    ring = {frozenset((node, (node + 1) % count)) for node in range(count)} if count > 1 else set()
    assert Counter(map(frozenset, chain.from_iterable(found))) == Counter(ring)
    assert len(found) == (min(count - 1, 1) * 2 + count % 2 if count > 2 else max(count - 1, 0))


def measured(
    count: int, slow: dict[int, float], jitter: float = 0.0
) -> dict[str, dict[str, float]]:
    """What `count` nodes find of their pairs where each goes at its slower end's speed."""
    draw, links = random.Random(count), {f"n{node}": dict[str, float]() for node in range(count)}
    for one, other in chain.from_iterable(rounds(count)):
        speed = min(slow.get(node, 24.0) for node in (one, other)) * (1 - jitter * draw.random())
        links[f"n{one}"][f"n{other}"] = links[f"n{other}"][f"n{one}"] = speed
    return links


@pytest.mark.parametrize("count", [3, 4, 5, 16, 255, 256])
def test_a_slow_node_is_told_from_its_neighbours(count: int) -> None:
    for node in {0, 1, count // 2, count - 1}:
        for speed in (0.0, 3.0, 11.0):
            faults, unclear = judge(measured(count, {node: speed}, jitter=0.2))
            assert (list(faults), unclear) == ([f"n{node}"], [])


def test_slow_neighbours_and_slow_nodes_with_one_between_them() -> None:
    assert set(judge(measured(8, {2: 3.0, 3: 3.0}))[0]) == {"n2", "n3"}
    assert set(judge(measured(8, {2: 3.0, 4: 0.0}))[0]) == {"n2", "n4"}, "n3 is well"


def test_the_words_name_the_pairs() -> None:
    faults, _ = judge(measured(4, {1: 3.0}))
    assert faults == {
        "n1": "its network is slow: 3.0 GB/s with n0 and 3.0 GB/s with n2, below 16.8"
    }
    faults, _ = judge(measured(6, {1: 0.0}))
    assert faults == {"n1": "its network is slow: none with n0 and none with n2, below 16.8"}


def test_of_two_nodes_neither_is_blamed() -> None:
    assert judge(measured(2, {1: 3.0})) == ({}, [])
    faults, unclear = judge(measured(2, {1: 0.0}))
    assert (faults, unclear) == ({}, ["n0: none with n1, below 0.0; one of the two is slow"])


def test_one_slow_pair_of_two_good_nodes_blames_nobody() -> None:
    links = measured(6, {})
    links["n1"]["n2"] = links["n2"]["n1"] = 1.0
    assert judge(links) == ({}, [])


def test_a_node_that_says_nothing_is_judged_by_its_peers_and_one_side_s_word_counts() -> None:
    links = measured(6, {1: 0.0})
    links["n1"] = {}
    assert list(judge(links)[0]) == ["n1"]
    links = measured(6, {})
    links["n1"] = {"n0": 24.0, "n2": 24.0}
    links["n0"]["n1"] = links["n2"]["n1"] = 1.0
    assert list(judge(links)[0]) == ["n1"]


def test_nothing_measured() -> None:
    assert judge({"a": {}, "b": {}}) == ({}, [])
