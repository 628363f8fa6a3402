"""Which source each sample comes from: exact shares over every prefix, without randomness.

Weights are exact fractions with a common denominator M, the period: source s owns c_s of every M
samples. Its j-th sample may come at slot floor(j·M / c_s) at the earliest and before
ceil((j+1)·M / c_s) at the latest (the windows of Pfair scheduling: Baruah et al. 1996). Taking the
earliest deadline first meets them all, and they mean |count_s(n) − n·c_s / M| < 1 for every n.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from megallama.errors import ConfigError

IntArray = npt.NDArray[np.int64]

MAX_PERIOD = 1 << 16


class Mixture:
    """The apportionment of samples to sources 0, 1, … of the given weights.

    shares: c_s. period: M. exact: whether c_s / M are the weights given; weights whose common
    denominator is over 65,536 are rounded to multiples of 1/65,536 (largest remainder).
    """

    def __init__(self, weights: Sequence[Fraction]) -> None:
        total = sum(weights)
        weights = [weight / total for weight in weights]
        denominator = math.lcm(*(weight.denominator for weight in weights))
        self.exact = denominator <= MAX_PERIOD
        self.period = denominator if self.exact else MAX_PERIOD
        self.shares = _apportion(weights, self.period)
        self._source = _earliest_deadline_first(self.shares, self.period)
        self._rank = np.empty(self.period, np.int64)  # how many of its source came before a slot
        for source, share in enumerate(self.shares):
            self._rank[self._source == source] = np.arange(share)

    def counts(self, samples: int) -> IntArray:
        """How many of the first `samples` samples come from each source."""
        periods, rest = divmod(samples, self.period)
        shares = np.array(self.shares, np.int64)
        return periods * shares + np.bincount(self._source[:rest], minlength=len(shares))

    def locate(self, samples: IntArray) -> tuple[IntArray, IntArray]:
        """For each sample number: its source, and how many of that source came before it."""
        periods, slots = np.divmod(samples, self.period)
        sources = self._source[slots]
        return sources, periods * np.array(self.shares, np.int64)[sources] + self._rank[slots]


def exact_weight(weight: str | float | int, place: str) -> Fraction:
    """The fraction that `weight` says in decimal: 0.045 is 9/200. Raises ConfigError."""
    try:
        fraction = Fraction(str(weight))
    except (ValueError, ZeroDivisionError):
        fraction = Fraction(-1)
    if fraction <= 0:
        raise ConfigError(f"{place}: weight {weight} is not a positive number")
    return fraction


def _apportion(weights: Sequence[Fraction], period: int) -> list[int]:
    """Whole shares of `period` nearest to the weights, by largest remainder; ties to the first."""
    quotas = [weight * period for weight in weights]
    shares = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda s: shares[s] - quotas[s])
    for source in by_remainder[: period - sum(shares)]:
        shares[source] += 1
    return shares


def _earliest_deadline_first(shares: Sequence[int], period: int) -> IntArray:
    """The source of every slot of a period: of the samples that may come, the most urgent."""
    # (release, source, j), a heap
    waiting = [(0, source, 0) for source, share in enumerate(shares) if share]
    ready: list[tuple[int, int, int]] = []  # (deadline, source, j), a heap
    slots = np.empty(period, np.int64)
    for slot in range(period):
        while waiting and waiting[0][0] <= slot:
            _, source, j = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(j + 1) * period // shares[source]), source, j))
        _, source, j = heapq.heappop(ready)
        slots[slot] = source
        if j + 1 < shares[source]:
            heapq.heappush(waiting, ((j + 1) * period // shares[source], source, j + 1))
    return slots
