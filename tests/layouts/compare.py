"""Every number that the ranks of a case came to, held against the reference.

Ranks hold rectangles of named global tensors. Together they must cover every element; what several
ranks hold must be the same bits; and what they hold must be the reference's, relative to the norm
of each tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from tests.layouts.case import Case
from tests.layouts.problem import Reference, Step

#: Relative to a tensor's norm, at every step.
TOLERANCE = {"fp64": 1e-12, "fp32": 1e-5}
#: Of what an optimizer step adds to a tensor, in fp32: the weights' rounding hides nothing.
UPDATE_TOLERANCE = 1e-3
#: A gradient smaller than this part of all gradients together is rounding noise in fp64.
NOISE = 1e-14
#: With a bf16 wire every rank's addend is rounded to 8 bits, by at most 2⁻⁹ of itself; partial sums
#: are larger than the sum where they cancel, here by less than 8 times.
WIRE_TOLERANCE = 2.0**-6


@dataclass(frozen=True)
class Piece:
    """A rectangle of a named global tensor, as one rank holds it."""

    name: str
    start: tuple[int, ...]
    value: np.ndarray

    @property
    def region(self) -> tuple[slice, ...]:
        return tuple(
            slice(first, first + n) for first, n in zip(self.start, self.value.shape, strict=True)
        )


@dataclass(frozen=True)
class RankStep:
    """A step as one rank saw it: what it reported, by name, and its part of the tensors.

    Gradients are of the summed loss, as the optimizer takes them; a step that was left out has
    none.
    """

    numbers: dict[str, float]
    applied: bool
    gradients: list[Piece]
    weights: list[Piece]


Named = dict[str, np.ndarray]


class Faults(list[str]):
    """What is wrong, one line each."""

    def near(self, what: str, ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> None:
        """Hold a tensor against the reference's."""
        scale = np.linalg.norm(theirs)
        difference = np.linalg.norm(ours.astype(np.float64) - theirs)
        if scale == 0:
            if np.any(ours != 0):
                self.append(f"{what}: the reference is zero, ours is {difference:.1e}")
        elif not difference <= tolerance * scale:  # a NaN is no match
            self.append(f"{what}: relative error {difference / scale:.1e} > {tolerance:.0e}")

    def number(self, what: str, ours: float, theirs: float, tolerance: float) -> None:
        """Hold a scalar against the reference's; where that is NaN, so must ours be."""
        if math.isnan(theirs):
            if not math.isnan(ours):
                self.append(f"{what}: {ours}, the reference has none")
        else:
            self.near(what, np.array(ours), np.array(theirs), tolerance)


def assemble(ranks: Sequence[Sequence[Piece]], shapes: Named, what: str, faults: Faults) -> Named:
    """Global tensors from the pieces of all ranks; `shapes` are tensors of the sizes wanted."""
    dtypes = {piece.name: piece.value.dtype for pieces in ranks for piece in pieces}
    whole = {n: np.zeros(t.shape, dtypes.get(n, np.float64)) for n, t in shapes.items()}
    count = {name: np.zeros(tensor.shape, np.int64) for name, tensor in shapes.items()}
    for rank, pieces in enumerate(ranks):
        for piece in pieces:
            if piece.name not in whole:
                faults.append(f"{what} {piece.name}: rank {rank} holds a tensor of no model")
                continue
            there, region = whole[piece.name][piece.region], piece.region
            if there.shape != piece.value.shape:
                faults.append(f"{what} {piece.name}: rank {rank} holds {region}, out of bounds")
                continue
            known = count[piece.name][region] > 0
            if not np.array_equal(there[known], piece.value[known], equal_nan=True):
                faults.append(f"{what} {piece.name}: rank {rank} holds other bits than before it")
            there[...] = piece.value
            count[piece.name][region] += 1
    for name, times in count.items():
        if not times.all():
            missing = int((times == 0).sum())
            faults.append(f"{what} {name}: {missing} of {times.size} elements are on no rank")
    return whole


def compare(case: Case, reference: Reference, runs: Sequence[Sequence[RankStep]]) -> list[str]:
    """What differs from the reference, one line each; `runs` has the steps of every rank."""
    faults = Faults()
    before = ours_before = _numpy(reference.initial)
    for number, expected in enumerate(reference.steps):
        what, ranks = f"step {number + 1}", [run[number] for run in runs]
        loss, tensor = tolerances(case, number)
        _compare_numbers(what, expected, ranks, (loss, tensor), faults)
        if expected.valid_tokens:
            _compare_gradients(what, expected, ranks, tensor, faults)
        after = _numpy(expected.weights)
        ours = assemble([rank.weights for rank in ranks], after, f"{what} weight", faults)
        for name in after:
            faults.near(f"{what} weight {name}", ours[name], after[name], tensor)
            if case.wire == "fp32":
                update = np.subtract(ours[name], ours_before[name], dtype=np.float64)
                expected_update = after[name] - before[name]
                faults.near(f"{what} update {name}", update, expected_update, UPDATE_TOLERANCE)
        before, ours_before = after, ours
    return list(faults)


def tolerances(case: Case, step: int) -> tuple[float, float]:
    """Of the loss and of tensors, at a step counted from 0."""
    exact = TOLERANCE[case.precision]
    if case.wire == "fp32" or case.data == 1:
        return exact, exact
    # Losses differ once rounded gradients have moved the weights.
    return (exact if step == 0 else WIRE_TOLERANCE), WIRE_TOLERANCE


def _compare_numbers(
    what: str,
    expected: Step,
    ranks: Sequence[RankStep],
    tolerance: tuple[float, float],
    faults: Faults,
) -> None:
    first = ranks[0]
    for rank, step in enumerate(ranks):
        if _bits(step) != _bits(first) or step.applied != first.applied:
            faults.append(f"{what}: rank {rank} reports other numbers than rank 0")
    if first.applied != (expected.valid_tokens > 0):
        faults.append(f"{what}: the step was {'' if first.applied else 'not '}applied")
    for name in sorted(first.numbers.keys() | expected.numbers.keys()):
        ours, theirs = first.numbers.get(name, math.nan), expected.numbers.get(name, math.nan)
        kind = tolerance["gradient" in name]
        faults.number(f"{what} {name}", ours, theirs, kind)


def _compare_gradients(
    what: str, expected: Step, ranks: Sequence[RankStep], tolerance: float, faults: Faults
) -> None:
    theirs = _numpy(expected.gradients)
    ours = assemble([rank.gradients for rank in ranks], theirs, f"{what} gradient", faults)
    noise = NOISE * math.sqrt(sum(float(np.square(t).sum()) for t in theirs.values()))
    for name, tensor in ours.items():
        if 0 < np.linalg.norm(theirs[name]) < noise:
            # Zero but for rounding, as that of queries where every target is a document's first.
            if not np.linalg.norm(tensor.astype(np.float64)) < noise:
                faults.append(f"{what} gradient {name}: the reference is rounding noise")
        else:
            faults.near(f"{what} gradient {name}", tensor, theirs[name], tolerance)


def _numpy(tensors: Mapping[str, Tensor]) -> Named:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def _bits(step: RankStep) -> tuple[tuple[str, ...], bytes]:
    """What a rank reported, to compare bit by bit: NaN equals NaN."""
    return tuple(step.numbers), np.array([*step.numbers.values()], np.float64).tobytes()


def identical(
    one: Sequence[Sequence[RankStep]], other: Sequence[Sequence[RankStep]]
) -> Iterator[str]:
    """Where two runs of one layout differ in any bit."""
    for rank, (steps, others) in enumerate(zip(one, other, strict=True)):
        for number, (a, b) in enumerate(zip(steps, others, strict=True)):
            what = f"rank {rank} step {number + 1}"
            if _bits(a) != _bits(b):
                yield f"{what}: the numbers reported"
            for kind in ("gradients", "weights"):
                for p, q in zip(getattr(a, kind), getattr(b, kind), strict=True):
                    if (p.name, p.start) != (q.name, q.start):
                        yield f"{what}: {kind} are other rectangles"
                    elif p.value.tobytes() != q.value.tobytes():
                        yield f"{what}: {kind} {p.name}"


def same_as_alone(ranks: Sequence[Sequence[RankStep]], alone: Sequence[RankStep]) -> Iterator[str]:
    """Where the ranks of a layout, together, differ in any bit from one process with all of it."""
    for number, one in enumerate(alone):
        steps = [run[number] for run in ranks]
        for rank, step in enumerate(steps):
            if _bits(step) != _bits(one) or step.applied != one.applied:
                yield f"rank {rank} step {number + 1}: other numbers than in one process"
        for kind in ("gradients", "weights"):
            held = [getattr(step, kind) for step in steps]
            whole = {piece.name: piece.value for piece in getattr(one, kind)}
            faults = Faults()
            assemble(held, whole, f"step {number + 1} {kind}", faults)
            yield from faults
            for rank, pieces in enumerate(held):
                for piece in pieces:
                    if piece.value.tobytes() != whole[piece.name][piece.region].tobytes():
                        what = f"rank {rank} step {number + 1}: {kind} {piece.name}"
                        yield f"{what}: other bits than in one process"
