"""The parameter table against an independent one and against published sizes."""

from __future__ import annotations

import dataclasses

import pytest

from megallama.config.presets import PRESETS
from megallama.config.schema import Model
from megallama.spec.parameters import parameter_table
from tests.harness import model_config
from tests.reference import Shape, parameter_shapes

SHAPES = [
    Shape(layers=3),
    Shape(kv_heads=1),
    Shape(kv_heads=4, tie_embeddings=True),
    Shape(d_model=36, heads=3, kv_heads=3),
]

#: Parameters of the released weights (`model.safetensors.index.json` or a sum over the files).
PUBLISHED = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-34b": 33_743_970_304,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parts_are_the_reference_s_weights(shape):
    table = parameter_table(model_config(shape))
    parts = [(part.name, part.shape) for parameter in table for part in parameter.parts]
    assert len(dict(parts)) == len(parts), "a name comes twice"
    assert dict(parts) == parameter_shapes(shape)
    for parameter in table:
        assert parameter.numel == sum(part.numel for part in parameter.parts)
        assert parameter.decays == (len(parameter.shape) == 2)
        assert parameter.decays == (parameter.shard_dim is not None), "norms are whole everywhere"


@pytest.mark.parametrize("preset", PRESETS)
def test_published_sizes(preset):
    table = parameter_table(Model(preset=preset))
    assert sum(parameter.numel for parameter in table) == PUBLISHED[preset]


def test_every_preset_has_a_published_size():
    assert PUBLISHED.keys() == PRESETS.keys()


def test_the_order_and_the_shards():
    """Column-parallel weights are divided by outputs, row-parallel ones by inputs."""
    table = parameter_table(model_config(Shape(layers=1)))
    assert [(p.name, p.shape, p.shard_dim, p.layer) for p in table] == [
        ("tok_embeddings", (61, 32), 0, None),
        ("layers.0.attention_norm", (32,), None, 0),
        ("layers.0.wqkv", (64, 32), 0, 0),
        ("layers.0.wo", (32, 32), 1, 0),
        ("layers.0.ffn_norm", (32,), None, 0),
        ("layers.0.w13", (88, 32), 0, 0),
        ("layers.0.w2", (32, 44), 1, 0),
        ("norm", (32,), None, None),
        ("output", (61, 32), 0, None),
    ]


def test_a_tied_model_has_no_output_projection():
    tied = parameter_table(model_config(Shape(tie_embeddings=True)))
    untied = parameter_table(model_config(Shape()))
    assert tied == untied[:-1]
    with pytest.raises(dataclasses.FrozenInstanceError):
        tied[0].name = "other"
