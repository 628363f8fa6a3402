"""The configs that ship: shapes, recipes, headers; and the page of other systems' names."""

from __future__ import annotations

from pathlib import Path

import pytest

from megallama.config import load_config
from megallama.config.aliases import from_megatron_markdown
from megallama.config.presets import PRESETS
from megallama.config.schema import Model

ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

# name: parameters in billions, tokens in units of 1e12, lr, sequence length; as published
PUBLISHED = {
    "llama-7b": (6.7, 1.0, 3e-4, 2048),
    "llama-13b": (13.0, 1.0, 3e-4, 2048),
    "llama-33b": (32.5, 1.4, 1.5e-4, 2048),
    "llama-65b": (65.2, 1.4, 1.5e-4, 2048),
    "llama2-7b": (6.74, 2.0, 3e-4, 4096),
    "llama2-13b": (13.0, 2.0, 3e-4, 4096),
    "llama2-34b": (33.7, 2.0, 1.5e-4, 4096),
    "llama2-70b": (69.0, 2.0, 1.5e-4, 4096),
    "llama3-8b": (8.03, 15.6, 3e-4, 8192),
}


def parameters(model: Model) -> int:
    """Embedding and output, then for each layer attention, SwiGLU and two norms; a last norm."""
    attention = (2 + 2 * model.kv_heads / model.heads) * model.d_model**2
    layer = attention + 3 * model.d_model * model.ffn + 2 * model.d_model
    ends = 1 if model.tie_embeddings else 2
    return int(ends * model.vocab * model.d_model + model.layers * layer + model.d_model)


def test_the_presets_and_the_demo_have_configs():
    assert {path.stem for path in CONFIGS} == {*PRESETS, "cpu-tiny"}
    assert set(PUBLISHED) == set(PRESETS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_loads_and_opens_with_its_launch_command(path):
    load_config(path)
    command = f"# megallama train configs/{path.name}"
    assert path.read_text().splitlines()[0].startswith(command)


@pytest.mark.parametrize("name", PUBLISHED)
def test_shape_and_recipe_are_the_published_ones(name):
    billions, tera_tokens, lr, sequence_length = PUBLISHED[name]
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    assert parameters(config.model) / 1e9 == pytest.approx(billions, rel=0.01)
    assert config.model.head_width == 128
    assert config.train.tokens == round(tera_tokens * 1e12)
    assert config.optimizer.lr == lr
    assert config.train.sequence_length == sequence_length
    assert config.train.global_batch * sequence_length == 2**22  # 4M tokens a step
    assert config.optimizer.betas == (0.9, 0.95)
    assert (config.optimizer.weight_decay, config.optimizer.grad_clip) == (0.1, 1.0)
    if name != "llama3-8b":
        assert config.optimizer.warmup_steps == 2000
        assert config.optimizer.min_lr == pytest.approx(lr / 10)
    assert not config.data.is_empty


def test_llama1_mixture_is_the_papers():
    for size in ("7b", "13b", "33b", "65b"):
        mixture = load_config(ROOT / "configs" / f"llama-{size}.yaml").data.mixture
        assert [source.weight for source in mixture] == [67, 15, 4.5, 4.5, 4.5, 2.5, 2]


def test_demo():
    config = load_config(ROOT / "configs" / "cpu-tiny.yaml")
    assert config.run.name == "demo"
    assert parameters(config.model) == 1_000_576
    assert config.train.precision == "fp32"


def test_the_page_of_other_names_is_the_table():
    page = (ROOT / "docs" / "from-megatron.md").read_text()
    assert page == from_megatron_markdown() + "\n", "print it again, as the page says"
