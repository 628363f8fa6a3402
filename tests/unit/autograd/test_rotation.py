"""RoPE's frequencies and angles."""

from __future__ import annotations

import math

import pytest
import torch

from megallama.autograd.rotation import rope_frequencies, rotation_at
from megallama.config.schema import RopeScaling


def test_frequencies_in_closed_form():
    expected = [1.0, 10_000 ** (-1 / 4), 10_000 ** (-2 / 4), 10_000 ** (-3 / 4)]
    assert rope_frequencies(8, 10_000.0).tolist() == pytest.approx(expected, rel=1e-15)


def test_scaling_keeps_short_wavelengths_and_slows_long_ones():
    scaling = RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192
    )
    plain = rope_frequencies(128, 500_000.0)
    ratio = rope_frequencies(128, 500_000.0, scaling) / plain
    wavelengths = 2 * math.pi / plain
    assert (ratio[wavelengths < 8192 / 4] == 1).all()
    assert torch.allclose(ratio[wavelengths > 8192], torch.tensor(0.125, dtype=torch.float64))
    between = (wavelengths > 8192 / 4) & (wavelengths < 8192)
    assert between.any()
    assert ((ratio[between] > 0.125) & (ratio[between] < 1)).all()
    assert (ratio.diff() <= 0).all()


def test_angles_are_exact_at_far_positions():
    """Angles are made in fp64: at position 100,000 an fp32 angle is off by thousandths."""
    position = torch.tensor([100_000])
    rotation = rotation_at(position, rope_frequencies(4, 10_000.0), torch.float32)
    expected = [math.cos(100_000.0), math.cos(100_000 / 100)]
    assert rotation.cos.flatten().tolist() == pytest.approx(expected, abs=6e-8)
    assert rotation.cos.shape == rotation.sin.shape == (1, 1, 2)
    assert rotation.cos.dtype == torch.float32
