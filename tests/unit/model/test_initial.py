"""Initial weights: functions of the seed, the tensor's name and the global index alone."""

from __future__ import annotations

import hashlib
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.model import initial
from megallama.model.initial import fill, initialize
from megallama.parallel.state import ParameterState
from megallama.spec.grid import Grid, Place
from megallama.spec.parameters import Part, parameter_table
from megallama.spec.shards import shard_table
from tests.harness import flat, lone_state, model_config, parts
from tests.reference import Shape


def filled(part: Part, seed: int = 0) -> torch.Tensor:
    return rectangle(part, (0,) * len(part.shape), part.shape, seed)


def rectangle(
    part: Part, start: tuple[int, ...], shape: tuple[int, ...], seed: int = 0
) -> torch.Tensor:
    tensor = torch.full(shape, torch.nan, dtype=torch.float64)
    fill(tensor, part, start, seed)
    return tensor


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 13),
    data=st.data(),
    block=st.integers(1, 64),
    seed=st.integers(0, 2**40),
)
@settings(max_examples=150, deadline=None)
def test_any_rectangle_is_the_slice_of_the_whole(rows, columns, data, block, seed):
    """Bit for bit, however many elements are made at a time: row, column and both-way shards."""
    first, last = sorted(data.draw(st.tuples(*[st.integers(0, rows)] * 2)))
    left, right = sorted(data.draw(st.tuples(*[st.integers(0, columns)] * 2)))
    if left == right:
        left, right = 0, columns
    part = Part("layers.3.attention.wq.weight", (rows, columns), 0.02)
    whole = filled(part, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(initial, "BLOCK_ELEMENTS", block)
        found = rectangle(part, (first, left), (last - first, right - left), seed)
        assert torch.equal(found, whole[first:last, left:right])


@given(length=st.integers(1, 40), cuts=st.tuples(st.integers(0, 40), st.integers(0, 40)))
@settings(deadline=None)
def test_a_norm_is_ones_wherever_it_is_cut(length, cuts):
    first, last = sorted(min(cut, length) for cut in cuts)
    found = rectangle(Part("norm.weight", (length,), None), (first,), (last - first,))
    assert torch.equal(found, torch.ones(last - first, dtype=torch.float64))


@pytest.mark.parametrize(
    "start, shape",
    [
        ((0, 3 * 2752), (8192, 2752)),  # w2 of 65B on the fourth of eight tensor ranks
        ((3 * 2048, 3 * 2752), (2048, 2752)),  # and on the last of four data ranks
        ((1024, 0), (1024, 22016)),  # whole rows
    ],
    ids=str,
)
def test_a_large_rectangle_is_made_block_by_block_and_nothing_beside_it(monkeypatch, start, shape):
    """A shard of 65B takes 32 MiB of fp64 at a time, not its 180 MiB or the whole's 1.4 GiB."""
    part = Part("layers.0.feed_forward.w2.weight", (8192, 22016), 0.02)
    made: list[tuple[int, int]] = []

    def uniform(name: str, seed: int, first: int, count: int) -> np.ndarray:
        made.append((first, count))
        return np.full(count, 0.5)

    monkeypatch.setattr(initial, "_uniform", uniform)
    tensor = torch.full(shape, torch.nan, dtype=torch.bfloat16)
    fill(tensor, part, start, 0)
    assert not tensor.any(), "the median is zero, and every element has it"
    assert max(count for _, count in made) <= initial.BLOCK_ELEMENTS == 1 << 22
    assert sum(count for _, count in made) == tensor.numel()
    rows = [divmod(first, 22016) for first, _ in made]
    assert rows == sorted(rows)
    assert rows[0] == start
    assert {column for _, column in rows} == {start[1]}


@given(names=st.lists(st.text(min_size=1), min_size=2, max_size=2, unique=True))
@settings(max_examples=30, deadline=None)
def test_names_and_seeds_have_streams_of_their_own(names):
    tensors = [filled(Part(name, (4, 4), 1.0), seed) for name in names for seed in (0, 1)]
    values = torch.stack(tensors).flatten()
    assert len(values.unique()) == len(values)


def test_a_known_value():
    """A change of the generator would make every run start elsewhere: it must not be an accident.

    Philox 4×64 (numpy's) keyed by BLAKE2b of "7/w", its first word's upper 53 bits through the
    normal's inverse distribution function (the standard library's).
    """
    key = int.from_bytes(hashlib.blake2b(b"7/w", digest_size=16).digest(), "little")
    words = np.random.Philox(key=key).random_raw(6)
    expected = [NormalDist(0, 3).inv_cdf(((word >> 11) + 0.5) / 2**53) for word in words.tolist()]
    assert filled(Part("w", (2, 3), 3.0), 7).flatten().tolist() == pytest.approx(expected, 1e-12)


@pytest.mark.parametrize("std", [1.0, 0.02])
def test_the_distribution_is_normal(std):
    values = filled(Part("w", (400, 500), std)).flatten()
    count = values.numel()
    assert abs(values.mean()) < 4 * std / math.sqrt(count)
    assert abs(values.std() / std - 1) < 4 / math.sqrt(2 * count)
    # Kolmogorov and Smirnov's distance, whose 0.999 quantile is 1.95 / √n.
    cumulative = torch.special.ndtr(values.sort().values / std)
    ranks = (torch.arange(count) + 0.5) / count
    assert (cumulative - ranks).abs().max() < 1.95 / math.sqrt(count)
    pairs = torch.corrcoef(torch.stack([values[:-1], values[1:]]))
    assert abs(pairs[0, 1]) < 4 / math.sqrt(count)


def states(**changes) -> ParameterState:
    table = parameter_table(model_config(Shape(**changes)))
    return lone_state(table, torch.float64)


def test_standard_deviations_by_tensor():
    state = states(d_model=64, ffn=176, vocab=512, layers=3, heads=4)
    initialize(state, 5)
    for name, tensor in parts(state, state.masters).items():
        if "norm" in name:
            assert (tensor == 1).all(), name
        else:
            residual = name.endswith(("wo.weight", "w2.weight"))
            expected = 0.02 / math.sqrt(6) if residual else 0.02
            assert abs(tensor.std() / expected - 1) < 5 / math.sqrt(2 * tensor.numel()), name
            assert abs(tensor.mean()) < 5 * expected / math.sqrt(tensor.numel()), name


def test_tensors_do_not_depend_on_the_table_around_them():
    table = parameter_table(model_config(Shape()))
    forward = lone_state(table, torch.float64)
    reverse = lone_state(tuple(reversed(table)), torch.float64)
    part = lone_state((table[3], table[-1]), torch.float64)
    for state in (forward, reverse, part):
        initialize(state, 3)
    tensors = parts(forward, forward.masters)
    for state in (reverse, part):
        for name, tensor in parts(state, state.masters).items():
            assert torch.equal(tensor, tensors[name]), name


GRIDS = [Grid(tensor=2), Grid(data=3), Grid(tensor=4, data=2), Grid(tensor=8, data=3)]


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.tensor}x{g.data}")
def test_every_ranks_shard_is_the_slice_of_the_whole(grid, kv_heads):
    """Bit for bit, with the wq wk wv w1 w3 rows and the wo w2 columns of each; padding is zero."""
    shape = Shape(d_model=32, heads=8, kv_heads=kv_heads, ffn=48, vocab=61)
    table = parameter_table(model_config(shape))
    whole = lone_state(table, torch.float32)
    initialize(whole, 11)
    tensors = parts(whole, whole.masters)
    seen = {name: torch.zeros_like(tensor, dtype=torch.bool) for name, tensor in tensors.items()}
    for rank in range(grid.size):
        shards = shard_table(table, Place(grid, rank))
        state = ParameterState(shards, torch.float32, torch.device("cpu"))
        initialize(state, 11)
        for piece, tensor in state.pieces(state.masters):
            assert torch.equal(tensor, tensors[piece.part.name][piece.region])
            seen[piece.part.name][piece.region] = True
            tensor.zero_()
        assert not flat(state.masters).any(), "padding"
    assert all(mask.all() for mask in seen.values())


def test_bf16_weights_are_the_masters_rounded():
    table = parameter_table(model_config(Shape()))
    wide = lone_state(table, torch.float64)
    low = lone_state(table, torch.bfloat16)
    for state in (wide, low):
        initialize(state, 1)
        state.round_masters()
    assert flat(low.masters).dtype == torch.float32
    assert torch.equal(flat(low.masters), flat(wide.masters).float())
    assert torch.equal(flat(low.weights), flat(low.masters).bfloat16())
