"""The keyed permutation is a bijection, looks random, and never changes."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megallama.data.permutation import Permutation


@given(st.integers(1, 3000), st.integers(0, 2**64), st.text())
def test_it_is_a_bijection(size: int, seed: int, name: str) -> None:
    values = Permutation(size, seed, name)(np.arange(size))
    assert np.array_equal(np.sort(values), np.arange(size))


def plain_permutation(size: int, key: tuple[str | int, ...], value: int) -> int:
    """The same network in Python's own integers, one value at a time."""
    a = next(a for a in range(math.isqrt(size), size + 1) if a * a >= size)
    b = math.ceil(Fraction(size, a))
    keys = struct.unpack("<8Q", hashlib.blake2b(json.dumps(list(key)).encode()).digest())

    def mix(x: int) -> int:
        x = x % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return (x ^ x >> 31) >> 2

    while True:
        left, right = divmod(value, b)
        for i in range(0, 8, 2):
            left = (left + mix(right + keys[i])) % a
            right = (right + mix(left + keys[i + 1])) % b
        value = left * b + right
        if value < size:
            return value


@given(st.integers(1, 2**62 - 1), st.integers(0, 2**64), st.data())
def test_it_is_the_plain_network(size: int, seed: int, data: st.DataObject) -> None:
    places = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=5))
    expected = [plain_permutation(size, (seed, "é", 3), place) for place in places]
    assert Permutation(size, seed, "é", 3)(np.array(places)).tolist() == expected


@pytest.mark.parametrize("size", [2**31 + 7, 10**12, 2**62 - 1])
def test_giant_ranges(size: int) -> None:
    places = np.concatenate([np.arange(1000), size - 1 - np.arange(1000)])
    values = Permutation(size, 0, "giant")(places)
    assert len(set(values.tolist())) == 2000
    assert values.min() >= 0
    assert values.max() < size
    assert abs(values.astype(float).mean() / size - 0.5) < 0.03  # 4.6 standard errors


def test_every_place_is_as_likely() -> None:
    size, keys = 10, 4000
    counts = np.zeros((size, size))
    for key in range(keys):
        counts[np.arange(size), Permutation(size, key)(np.arange(size))] += 1
    chi2 = ((counts - keys / size) ** 2 / (keys / size)).sum()
    assert chi2 < 81 + 5 * np.sqrt(2 * 81)  # 81 degrees of freedom, five standard deviations


def test_neighbours_and_epochs_are_unrelated() -> None:
    size = 100_000
    first, second = (Permutation(size, 1, "epoch", e)(np.arange(size)) for e in (0, 1))
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.02  # six standard errors
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.02
    assert (first == second).sum() < 10


def test_it_is_frozen() -> None:
    """Changing these numbers changes the data order of every run that is resumed."""
    assert Permutation(1000, 42, "web", "epoch", 0)(np.arange(5)).tolist() == GOLDEN
    assert Permutation(1000, 42, "web", "epoch", 1)(np.arange(5)).tolist() != GOLDEN


GOLDEN = [992, 533, 494, 36, 26]
