"""The order of samples: sample number → (source, epoch, window), a pure function.

It depends on the seed, the phases and the sizes, never on ranks or batch sizes, and its only state
is the count of samples consumed. Nothing is stored per sample: start-up costs the same for a
thousand tokens and for 1.4 trillion.

Window i of a source covers tokens [i·S, i·S + S + 1). A fixed permutation splits the N windows: its
last `validation_sequences` places are held out, the others are for training; every epoch goes
through those in an order of its own. So within an epoch nothing repeats and nothing is skipped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megallama.data.mixture import MAX_PERIOD, Mixture, exact_weight
from megallama.data.permutation import IntArray, Permutation
from megallama.errors import ConfigError


@dataclass(frozen=True)
class Phase:
    """A mixture of sources, name → weight, until `until_tokens` of training (None: to the end)."""

    until_tokens: int | None
    weights: Mapping[str, str | float | int]


class Location(NamedTuple):
    """Where samples are, one entry a sample. source: an index into SampleOrder.source_names."""

    source: IntArray
    epoch: IntArray
    window: IntArray


@dataclass(frozen=True)
class _PhasePlan:
    """A phase, computed: its first sample, its mixture, and what the phases before it consumed."""

    first: int
    mixture: Mixture
    sources: IntArray  # of the mixture's sources, the index in source_names
    consumed: IntArray  # by each source of source_names, before the phase


class SampleOrder:
    """The order of samples of a run.

    tokens: tokens of each source, by name; the order of names does not matter.
    sequence_length: S; phases change at sample ceil(until_tokens / S).
    A source's position carries over from phase to phase.
    Raises ConfigError for weights, phases or sizes that give no order.
    """

    def __init__(
        self,
        tokens: Mapping[str, int],
        phases: Sequence[Phase],
        sequence_length: int,
        seed: int,
        validation_sequences: int = 0,
    ) -> None:
        _check_phases(phases, tokens)
        self.source_names = sorted(tokens)
        self.seed = seed
        self.validation_sequences = validation_sequences
        self._train = np.array(
            [
                _training_windows(name, tokens[name], sequence_length, validation_sequences)
                for name in self.source_names
            ],
            np.int64,
        )
        self._splits = [
            Permutation(int(train) + validation_sequences, seed, name, "split")
            for name, train in zip(self.source_names, self._train, strict=True)
        ]
        self._plans: list[_PhasePlan] = []
        first, consumed = 0, np.zeros(len(self.source_names), np.int64)
        self.end: int | None = None  # the first sample past the last phase
        for number, phase in enumerate(phases):
            plan = _PhasePlan(first, _mixture(phase, number), self._indices(phase), consumed)
            self._plans.append(plan)
            if phase.until_tokens is not None:
                self.end = -(-phase.until_tokens // sequence_length)
                consumed = consumed.copy()
                consumed[plan.sources] += plan.mixture.counts(self.end - first)
                first = self.end
            else:
                self.end = None

    def locate(self, samples: npt.ArrayLike) -> Location:
        """Where samples (a number or an array of numbers) are.

        Raises ConfigError for a sample past a last phase that has an end.
        """
        ns = np.atleast_1d(np.asarray(samples, np.int64))
        sources, positions = np.empty_like(ns), np.empty_like(ns)
        phase_of = self._phase_of(ns)
        for number in np.unique(phase_of):
            plan, here = self._plans[number], phase_of == number
            local, counts = plan.mixture.locate(ns[here] - plan.first)
            sources[here] = plan.sources[local]
            positions[here] = plan.consumed[sources[here]] + counts
        epochs, places = np.divmod(positions, self._train[sources])
        windows = np.empty_like(ns)
        for source, epoch in np.unique(np.stack([sources, epochs]), axis=1).T.tolist():
            here = (sources == source) & (epochs == epoch)
            windows[here] = self._splits[source](self._epoch(source, epoch)(places[here]))
        return Location(sources, epochs, windows)

    def validation_windows(self, source: int, samples: npt.ArrayLike) -> IntArray:
        """The windows of a source's held-out samples (numbers below `validation_sequences`)."""
        ns = np.atleast_1d(np.asarray(samples, np.int64))
        if ((ns < 0) | (ns >= self.validation_sequences)).any():
            raise IndexError(f"validation samples {ns.tolist()} of {self.validation_sequences}")
        return self._splits[source](self._train[source] + ns)

    def epochs(self, samples: int) -> dict[str, float]:
        """How often each source was gone through in the first `samples` samples, by name."""
        plan = self._plans[int(self._phase_of(np.array([max(0, samples - 1)]))[0])]
        consumed = plan.consumed.copy()
        consumed[plan.sources] += plan.mixture.counts(samples - plan.first)
        return {
            name: float(used / train)
            for name, used, train in zip(self.source_names, consumed, self._train, strict=True)
        }

    def mixture(self, phase: int) -> Mixture:
        """The mixture of a phase, whose `exact`, `shares` and `period` say what weights became."""
        return self._plans[phase].mixture

    def _phase_of(self, ns: IntArray) -> IntArray:
        if len(ns) and int(ns.min()) < 0:
            raise IndexError(f"sample {int(ns.min())}")
        if self.end is not None and len(ns) and int(ns.max()) >= self.end:
            raise ConfigError(
                f"sample {int(ns.max())} is past the last phase of data, which ends at sample "
                f"{self.end}: raise its until_tokens or leave it out"
            )
        return np.searchsorted([plan.first for plan in self._plans], ns, side="right") - 1

    def _epoch(self, source: int, epoch: int) -> Permutation:
        name = self.source_names[source]
        return Permutation(int(self._train[source]), self.seed, name, "epoch", epoch)

    def _indices(self, phase: Phase) -> IntArray:
        return np.array([self.source_names.index(name) for name in sorted(phase.weights)], np.int64)


def _mixture(phase: Phase, number: int) -> Mixture:
    names = sorted(phase.weights)
    place = f"data phase {number}"
    mixture = Mixture(
        [exact_weight(phase.weights[name], f"{place}: source {name!r}") for name in names]
    )
    for name, share in zip(names, mixture.shares, strict=True):
        if share == 0:
            raise ConfigError(
                f"{place}: source {name!r}: weight {phase.weights[name]} is below the mixture's "
                f"resolution, 1/{MAX_PERIOD} of the sum: raise it or leave the source out"
            )
    return mixture


def _training_windows(name: str, tokens: int, S: int, validation: int) -> int:
    train = max(0, tokens - 1) // S - validation
    if train < 1:
        needed = (validation + 1) * S + 1
        raise ConfigError(
            f"data source {name!r} has {tokens} tokens, but {needed} are needed for one training "
            f"sample of {S} tokens beside {validation} of validation: give more text, shorten the "
            "sequence or lower validation_sequences"
        )
    return train


def _check_phases(phases: Sequence[Phase], tokens: Mapping[str, int]) -> None:
    if not phases or not all(phase.weights for phase in phases):
        raise ConfigError("data: at least one phase is needed, with at least one source each")
    last = 0
    for number, phase in enumerate(phases):
        if missing := set(phase.weights) - set(tokens):
            raise ConfigError(f"data phase {number}: no source {min(missing)!r}")
        until = phase.until_tokens
        if until is None and number < len(phases) - 1:
            raise ConfigError(f"data phase {number}: until_tokens is needed: a phase follows it")
        if until is not None:
            if until <= last:
                raise ConfigError(f"data phase {number}: until_tokens {until} is not above {last}")
            last = until
