"""Saved bytes against DESIGN's figures. That they are the bytes held: test_saved of the model."""

from __future__ import annotations

from typing import get_args

import pytest

from megallama.config.schema import Model, Train
from megallama.spec.saved import POLICIES, WEIGHT_STATE, saved_bytes, weight_state_bytes

BF16, FP32, FP64 = 2, 4, 8
D, H, F = 8192, 64, 22016
M65 = Model(preset="llama-65b")


def test_65b_saves_22_75_d_and_the_log_sum_exp():
    """x, q and k and v, o, x2, gate and up: 2 + 6 + 2 + 2 + 10.75; and fp32 a head."""
    assert 2 + (2 + 4) + 2 + 2 + 4 * F / D == 22.75
    assert saved_bytes(M65, "linear_outputs", BF16) == 22.75 * D + 4 * H == 186_624


@pytest.mark.parametrize(
    "policy, in_units_of_d, statistics",
    [
        ("linear_outputs", 22.75, 4 * H),
        ("all", 26.75, 4 * H),
        ("no_attention_output", 20.75, 0),
        ("no_gate_up", 12, 4 * H),
        ("layer_input", 2, 0),
    ],
)
def test_every_policy_at_65b(policy, in_units_of_d, statistics):
    assert saved_bytes(M65, policy, BF16) == in_units_of_d * D + statistics


def test_grouped_queries_save_fewer_keys():
    """2 + 4·K/H for q, k and v."""
    grouped = Model(preset="llama2-70b")
    expected = 2 + (2 + 4 * 8 / 64) + 2 + 2 + 4 * 28672 / D
    assert saved_bytes(grouped, "linear_outputs", BF16) == expected * D + 4 * H


def test_the_log_sum_exp_is_never_narrower_than_fp32():
    elements = 22.75 * D / 2
    assert saved_bytes(M65, "linear_outputs", FP32) == 4 * elements + 4 * H
    assert saved_bytes(M65, "linear_outputs", FP64) == 8 * elements + 8 * H


def test_the_policies_are_those_that_a_config_may_name():
    field = Train.model_fields["saved_activations"]
    assert set(get_args(field.annotation)) == POLICIES.keys()
    assert field.default == "linear_outputs"


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("tensor", [2, 4, 8])
def test_with_sequence_parallelism_everything_is_divided(policy, tensor):
    one = saved_bytes(M65, policy, BF16, tokens=2048)
    assert one == 2048 * saved_bytes(M65, policy, BF16)
    assert saved_bytes(M65, policy, BF16, 2048, tensor) * tensor == one


@pytest.mark.parametrize(
    "policy, residual_stream",
    [
        ("linear_outputs", 4),  # x and x2
        ("all", 8),  # and n1 and n2
        ("no_attention_output", 4),
        ("no_gate_up", 4),
        ("layer_input", 2),
    ],
)
def test_without_it_the_residual_stream_is_whole_on_every_rank(policy, residual_stream):
    whole = residual_stream * D
    others = saved_bytes(M65, policy, BF16) - whole
    for tensor in (1, 2, 8):
        found = saved_bytes(M65, policy, BF16, 64, tensor, sequence_parallel=False)
        assert found == 64 * (whole + others / tensor)


def test_65b_on_eight_ranks_by_hand():
    """2,048 tokens: 22.75·8192·2048/8 and the log-sum-exp of eight heads of each token."""
    assert saved_bytes(M65, "linear_outputs", BF16, 2048, 8) == 47_710_208 + 2048 * 8 * 4


def test_more_ranks_than_key_value_heads_replicate_them():
    """2 + 4·max(K, tp)/H instead of 2 + 4·K/H, divided by the ranks."""
    model = Model(preset="llama2-70b")
    tokens = 32
    for tensor, held in ((4, 8), (8, 8), (16, 16), (64, 64)):
        in_units_of_d = 2 + (2 + 4 * held / 64) + 2 + 2 + 4 * 28672 / D
        expected = tokens * (in_units_of_d * D + 4 * H) / tensor
        assert saved_bytes(model, "linear_outputs", BF16, 64, tensor) == 2 * expected


def test_what_waits_for_w_at_65b_on_eight_ranks():
    """Of 8,192 tokens a rank has 1,024 of the residual stream's and, of each, 2,752 columns of the
    feed-forward and 8 heads of 128: four tensors of (1024, 8192), the activation and twice that of
    gradients, attention's output and three times that of gradients."""
    stream, act, heads = 1024 * 8192, 8192 * 2752, 8192 * 8 * 128
    expected = 2 * (4 * stream + act + 2 * act + heads + 3 * heads)
    assert weight_state_bytes(M65, BF16, 8192, 8) == expected == 269_484_032
    # Of each token in units of D, all divided by the ranks: 4·2 + 3·2·F/D + 4·2.
    assert expected == 8192 // 8 * (16 * D + 6 * F)


def test_the_parts_of_the_weight_state():
    assert {"dz", "act", "dgate_up", "n2", "dx2", "o", "dqkv", "n1"} == WEIGHT_STATE


def test_the_weight_state_without_sequence_parallelism_and_with_shared_heads():
    """Four whole residual streams; 64 ranks with one query head and one of 8 key/value heads."""
    model = Model(preset="llama2-70b")
    act, width = 28672 // 64, 128
    found = weight_state_bytes(model, FP32, 64, 64, sequence_parallel=False)
    assert found == 4 * 64 * (4 * D + 3 * act + width + 3 * width)
