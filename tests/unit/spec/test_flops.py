"""FLOPs a token against figures computed by hand, and peaks by device."""

from __future__ import annotations

import pytest

from megallama.config.schema import Model
from megallama.spec.flops import flops_per_token, flops_per_token_6n, peak_flops
from tests.harness import model_config
from tests.reference import Shape


def by_gemm(shape: Shape, length: int) -> float:
    """Multiply-adds GEMM by GEMM: each forward two FLOPs, each backward twice the forward."""
    width = shape.d_model // shape.heads
    d, queries, keys = shape.d_model, shape.heads * width, shape.kv_heads * width
    projections = d * queries + 2 * d * keys + queries * d + 3 * d * shape.ffn
    attention = 2 * queries * length / 2  # scores, and values; a token sees half of them
    return 3 * 2 * (shape.layers * (projections + attention) + shape.vocab * d)


@pytest.mark.parametrize("shape", [Shape(), Shape(kv_heads=4), Shape(kv_heads=1)], ids=str)
def test_gemm_by_gemm(shape):
    assert flops_per_token(model_config(shape), 40) == by_gemm(shape, 40)


def test_65b_by_hand():
    """80·(4·8192² + 3·8192·22016) = 64,760,053,760 and 32,000·8192 = 262,144,000 weights.

    Six FLOPs each, and 6·80·8192·2048 = 8,053,063,680 of attention. The paper's 380 tokens/s/GPU
    are then 151 TFLOP/s, 48% of an A100's peak.
    """
    flops = flops_per_token(Model(preset="llama-65b"), 2048)
    assert flops == 388_560_322_560 + 1_572_864_000 + 8_053_063_680 == 398_186_250_240
    assert 380 * flops / peak_flops("NVIDIA A100-SXM4-80GB") == pytest.approx(0.485, abs=5e-4)


def test_grouped_queries_by_hand():
    """Llama 2 70B: 2 + 2·8/64 = 2.25 squares of D a layer for attention."""
    expected = 6 * (80 * (2.25 * 8192**2 + 3 * 8192 * 28672) + 32000 * 8192) + 6 * 80 * 8192 * 4096
    assert flops_per_token(Model(preset="llama2-70b"), 4096) == expected


def test_the_plain_figure_is_six_a_parameter():
    assert flops_per_token_6n(65_285_660_672) == 391_713_964_032


@pytest.mark.parametrize(
    "device, peak",
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        # Variants of less power are slower under nearly the same name.
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200 NVL", 835e12),
    ],
)
def test_known_peaks(device, peak):
    assert peak_flops(device) == peak


@pytest.mark.parametrize(
    "device", ["cpu", "", "Tesla V100-SXM2-16GB", "NVIDIA A10", "NVIDIA L40S", "AMD EPYC 7763"]
)
def test_an_unknown_device_has_no_peak(device):
    assert peak_flops(device) is None


def test_a_name_that_contains_a_known_one_is_another_device():
    assert peak_flops("NVIDIA RTX A1000") is None
    assert peak_flops("NVIDIA RTX A1000 Laptop GPU") is None
