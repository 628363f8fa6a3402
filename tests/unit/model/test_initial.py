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
from megallama.model.initial import fill_rows, initialize
from megallama.parallel.state import ParameterState
from megallama.spec.parameters import Part, parameter_table
from tests.harness import model_config
from tests.reference import Shape

CPU = torch.device("cpu")


def filled(part: Part, seed: int = 0, first: int = 0, count: int | None = None) -> torch.Tensor:
    rows = part.shape[0] - first if count is None else count
    tensor = torch.full((rows, *part.shape[1:]), torch.nan, dtype=torch.float64)
    fill_rows(tensor, part, seed, first)
    return tensor


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 13),
    cuts=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    block=st.integers(1, 64),
    seed=st.integers(0, 2**40),
)
@settings(max_examples=150, deadline=None)
def test_any_rows_are_the_slice_of_the_whole(rows, columns, cuts, block, seed):
    """Bit for bit, however many elements are made at a time."""
    first, last = sorted(min(cut, rows) for cut in cuts)
    part = Part("layers.3.attention.wq.weight", (rows, columns), 0.02)
    whole = filled(part, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(initial, "ROWS_ELEMENTS", block)
        assert torch.equal(filled(part, seed, first, last - first), whole[first:last])


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
    return ParameterState(table, torch.float64, CPU)


def test_standard_deviations_by_tensor():
    state = states(d_model=64, ffn=176, vocab=512, layers=3, heads=4)
    initialize(state, 5)
    for name, tensor in state.parts(state.masters):
        if "norm" in name:
            assert (tensor == 1).all(), name
        else:
            residual = name.endswith(("wo.weight", "w2.weight"))
            expected = 0.02 / math.sqrt(6) if residual else 0.02
            assert abs(tensor.std() / expected - 1) < 5 / math.sqrt(2 * tensor.numel()), name
            assert abs(tensor.mean()) < 5 * expected / math.sqrt(tensor.numel()), name


def test_tensors_do_not_depend_on_the_table_around_them():
    table = parameter_table(model_config(Shape()))
    forward = ParameterState(table, torch.float64, CPU)
    reverse = ParameterState(tuple(reversed(table)), torch.float64, CPU)
    part = ParameterState((table[3], table[-1]), torch.float64, CPU)
    for state in (forward, reverse, part):
        initialize(state, 3)
    tensors = dict(forward.parts(forward.masters))
    for state in (reverse, part):
        for name, tensor in state.parts(state.masters):
            assert torch.equal(tensor, tensors[name]), name


def test_bf16_weights_are_the_masters_rounded():
    table = parameter_table(model_config(Shape()))
    wide = ParameterState(table, torch.float64, CPU)
    low = ParameterState(table, torch.bfloat16, CPU)
    for state in (wide, low):
        initialize(state, 1)
    assert low.flat_masters.dtype == torch.float32
    assert torch.equal(low.flat_masters, wide.flat_masters.float())
    assert torch.equal(low.flat_weights, low.flat_masters.bfloat16())
