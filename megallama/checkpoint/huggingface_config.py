"""`config.json` of a Hugging Face LLaMA, of transformers 4 and 5, and our model section."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megallama.config.schema import Config
from megallama.errors import ConfigError

_SHAPE = {
    "d_model": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "ffn": "intermediate_size",
    "vocab": "vocab_size",
}
_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_context": "original_max_position_embeddings",
}
#: What a key must be, where it is there, for the model to be one that is trained here.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "sliding_window": (None,),
    "quantization_config": (None,),
}
_TYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}


def model_from_json(given: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The model section that `config.json` describes; absent keys have transformers' defaults.

    Raises:
        ConfigError: a key is missing, or asks for what LLaMA as trained here does not have.
    """
    if given.get("model_type") != "llama":
        raise _refusal(path, "model_type", given.get("model_type"), "convert one of type llama")
    for key, plain in _PLAIN.items():
        if given.get(key, plain[0]) not in plain:
            raise _refusal(path, key, given[key], "megallama has LLaMA without it alone")
    for key in _SHAPE.values():
        if type(given.get(key)) is not int:
            raise _refusal(path, key, given.get(key), "set it to a whole number")
    model = {ours: given[theirs] for ours, theirs in _SHAPE.items()}
    width, heads = given["hidden_size"], given["num_attention_heads"]
    head_width = given.get("head_dim")
    if head_width is not None and head_width * heads != width:
        remedy = f"heads of hidden_size / num_attention_heads = {width}/{heads} alone are trained"
        raise _refusal(path, "head_dim", head_width, remedy)
    model["kv_heads"] = given.get("num_key_value_heads") or heads
    if "rms_norm_eps" not in given:  # a default taken in silence would be another model
        raise _refusal(path, "rms_norm_eps", None, "set it to what the model was trained with")
    model["norm_eps"] = given["rms_norm_eps"]
    model["tie_embeddings"] = given.get("tie_word_embeddings", False)
    return model | _rope_from_json(given, path)


def config_to_json(
    config: Config, precision: str, token_ids: Mapping[str, int | list[int] | None]
) -> dict[str, Any]:
    """`config.json` of a model, with what transformers 4 and what 5 reads."""
    model = config.model
    rope: dict[str, Any] = {"rope_type": "default"}
    if model.rope_scaling:
        numbers = {theirs: getattr(model.rope_scaling, ours) for ours, theirs in _SCALING.items()}
        rope = {"rope_type": "llama3", **numbers}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: getattr(model, ours) for ours, theirs in _SHAPE.items()},
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_width,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "max_position_embeddings": config.train.sequence_length,
        "rope_theta": model.rope_theta,  # these two for transformers 4
        "rope_scaling": rope if model.rope_scaling else None,
        "rope_parameters": {"rope_theta": model.rope_theta, **rope},
        "torch_dtype": _TYPES[precision],  # for transformers 4
        "dtype": _TYPES[precision],
        **{f"{token}_token_id": token_ids.get(token) for token in ("bos", "eos", "pad")},
    }


def _rope_from_json(given: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`: transformers 5 has both in `rope_parameters`."""
    rope: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        value = given.get(key) or {}
        if not isinstance(value, Mapping):
            raise _refusal(path, key, value, "make it an object or null")
        rope |= value
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise _refusal(path, "rope_type", kind, "megallama has default and llama3")
    partial = rope.get("partial_rotary_factor", given.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise _refusal(path, "partial_rotary_factor", partial, "megallama turns whole heads")
    theta = rope.get("rope_theta", given.get("rope_theta", 10000.0))
    if kind == "default":
        return {"rope_theta": theta}
    for key in _SCALING.values():
        if key not in rope:
            raise _refusal(path, f"rope_scaling.{key}", None, "rope_type llama3 needs it")
    numbers = {ours: rope[theirs] for ours, theirs in _SCALING.items()}
    return {"rope_theta": theta, "rope_scaling": numbers}


def _refusal(path: Path, key: str, value: object, remedy: str) -> ConfigError:
    said = f"{key} is missing" if value is None else f"{key}={value}"
    return ConfigError(f"{path}: {said}; {remedy}")
