"""A keyed permutation of [0, N): any element in constant time, and nothing stored.

A Feistel network (Luby and Rackoff 1988) on pairs (left, right) with left < a, right < b, a·b just
over N; outputs past N are sent through again until they fall inside ("cycle walking": Black and
Rogaway 2002). With a = ceil(sqrt N) and b = ceil(N / a), fewer than a of the pairs lie outside.
"""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
UintArray = npt.NDArray[np.uint64]

ROUNDS = 8  # four suffice for a strong pseudorandom permutation; a round costs nanoseconds


class Permutation:
    """A bijection of [0, size) that depends on `key` alone, on any machine.

    key: strings and integers, such as (seed, source, purpose, epoch).
    """

    def __init__(self, size: int, *key: str | int) -> None:
        if not 0 < size < 1 << 62:
            raise ValueError(f"size {size}")
        self.size = size
        self._a = math.isqrt(size - 1) + 1
        self._b = -(-size // self._a)
        digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=8 * ROUNDS).digest()
        self._keys = np.frombuffer(digest, "<u8").astype(np.uint64)

    def __call__(self, places: IntArray) -> IntArray:
        """The elements at `places`, each in [0, size)."""
        values = self._once(places.astype(np.uint64))
        while (outside := values >= self.size).any():
            values[outside] = self._once(values[outside])
        return values.astype(np.int64)

    def _once(self, values: UintArray) -> UintArray:
        a, b = np.uint64(self._a), np.uint64(self._b)
        left, right = values // b, values % b
        for even, odd in self._keys.reshape(-1, 2):
            left = (left + _mix(right + even)) % a
            right = (right + _mix(left + odd)) % b
        return left * b + right


def _mix(x: UintArray) -> UintArray:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014), shifted to leave room to add.

    The result is below 2^62, so that adding a half of a pair does not wrap.
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) >> np.uint64(2)
