"""Damage in what several ranks hold alike: every flipped bit is found and named, none imagined."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch.distributed import Store
from torch.utils._python_dispatch import TorchDispatchMode

from megallama.train.replicas import Difference, checksums, odd_ones
from tests.chaos.flips import CASES, Flipped, campaign, flip
from tests.dist.processes import run_on

LIMIT = 60.0


@pytest.mark.parametrize("name", CASES)
def test_every_flip_is_found_and_no_clean_step_accused(name: str) -> None:
    case = CASES[name]

    def body(rank: int, store: Store) -> list[str]:
        return campaign(case, rank, store, flips=16, clean=3, seed=1)

    for wrong in run_on(case.ranks, body, LIMIT):
        assert wrong == []


def test_a_damaged_weight_ends_every_rank_alike() -> None:
    """Flipped before a step and found before its update, while the peers have it whole."""
    case = CASES["data"]

    def body(rank: int, store: Store) -> tuple[bool, str, int]:
        flipped = Flipped(case, rank, store)
        assert not flipped.step()
        for handle in flipped.trainer.model.state.arriving.values():
            handle.wait()
        if rank == 2:
            flip(flipped.trainer.model.state.padded_weights["layers.1.wo"], 5, 3)
        found = flipped.step()
        error = flipped.replicas.lost(flipped.meeting, 2)
        assert error.shared
        return found, str(error), error.exit_code

    ends = run_on(case.ranks, body, LIMIT)
    assert len(set(ends)) == 1
    found, words, code = ends[0]
    assert (found, code) == (True, 69)
    wanted = r"step 2: rank 2 \(host \S+\): the weight layers\.1\.wo is not what rank "
    assert re.match(wanted + r"\d has; memory or a link is faulty", words), words


def test_with_one_rank_and_one_precision_there_is_nothing_to_compare() -> None:
    case = CASES["data-fp32"].__class__(precision="fp32")

    def body(rank: int, store: Store) -> bool:
        flipped = Flipped(case, rank, store)
        flip(flipped.trainer.model.state.masters["norm"], 0, 3)
        return bool(flipped.replicas.compare())

    assert run_on(1, body, LIMIT) == [False]


class NoReading(TorchDispatchMode):
    """Refuses what makes the host wait for a device: its values, and copies from the host."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op.name().removeprefix("aten::").partition(".")[0]
        assert name not in {"_local_scalar_dense", "nonzero", "lift_fresh", "_to_copy"} or (
            name == "_to_copy" and (kwargs or {}).get("device") is None
        ), f"{name} in a comparison"
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["grid", "tied"])
def test_the_host_reads_nothing_for_a_comparison(name: str) -> None:
    """A flag of the device is all that comes of it; the step's one sum takes it along."""
    case = CASES[name]

    def body(rank: int, store: Store) -> tuple[bool, bool, bool]:
        flipped = Flipped(case, rank, store)
        with pytest.raises(AssertionError, match="_local_scalar_dense"), NoReading():
            bool(torch.ones(()) == 1)
        with NoReading():
            clean = flipped.replicas.compare()
        if rank == 1:
            flip(next(iter(flipped.trainer.model.state.padded_weights.values())), 3, 2)
        with NoReading():
            damaged = flipped.replicas.compare()
        return bool(clean), bool(damaged), bool(flipped.replicas.differences)

    results = run_on(case.ranks, body, LIMIT)
    assert not any(clean for clean, _, _ in results)
    assert any(damaged for _, damaged, _ in results)
    assert all(damaged == explained for _, damaged, explained in results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("numel", [1, 3, 4, 6, 8, 24])
def test_any_bit_changes_the_checksum_of_its_part(dtype: torch.dtype, numel: int) -> None:
    x = torch.randn(3 * numel).to(dtype)
    before = checksums(x, 3)
    for element in range(numel):
        for bit in range(8 * dtype.itemsize):
            flip(x, numel + element, bit)
            assert (checksums(x, 3) != before).tolist() == [False, True, False]
            flip(x, numel + element, bit)
    assert torch.equal(checksums(x, 3), before)


def test_a_checksum_does_not_depend_on_where_the_tensor_begins() -> None:
    x = torch.randn(25).bfloat16()
    assert torch.equal(checksums(x[1:], 2), checksums(x[1:].clone(), 2))


def differences(*triples: tuple[int, int]) -> list[Difference]:
    return [Difference(rank, "w", other) for rank, other in triples]


@pytest.mark.parametrize(
    "found, data, odd",
    [
        (differences((2, 0)), 4, [2]),
        (differences((1, 0), (2, 0), (3, 0)), 4, [0]),  # an owner that all others accuse
        (differences((0, 0), (1, 0), (2, 0), (3, 0)), 4, [0]),  # itself, too
        (differences((0, 0)), 4, [0]),
        (differences((1, 0)), 2, [1]),
        (differences((2, 0), (2, 1), (3, 0)), 4, [2, 3]),
        ([], 4, []),
    ],
)
def test_who_is_odd(found: list[Difference], data: int, odd: list[int]) -> None:
    assert [one.rank for one in odd_ones(found, data)] == odd
