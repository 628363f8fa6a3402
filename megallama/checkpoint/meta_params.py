"""`params.json` of Meta's releases, LLaMA 1 to Llama 3.1, and our model section."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megallama.config.schema import Model, RopeScaling
from megallama.errors import ConfigError

_SHAPE = {"d_model": "dim", "layers": "n_layers", "heads": "n_heads"}
_THETA = 10000.0  # what LLaMA 1 and 2 have without naming it
_LARGEST = 10**9  # no width or count comes near it, and products of two have a float
_MULTIPLE = 256  # likewise, of the feed-forward width
# Llama 3.1's: use_scaled_rope stands for all four in Meta's code, newer releases name two of them.
_SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
# (dim, n_layers) of Llama 3.2 1B and 3B. Their params.json has the keys of Llama 3.1's, and their
# config.json at Hugging Face has a factor of 32 where Llama 3.1's has 8.
_LLAMA_3_2 = {(2048, 16), (3072, 28)}


def model_from_params(params: Mapping[str, Any], vocab: int, path: Path) -> dict[str, Any]:
    """The model section that `params.json` describes; `vocab`: the rows of the embedding.

    Raises:
        ConfigError: a key is missing, or the vocabulary is another.
    """
    for key in _SHAPE.values():
        if not _is_count(params.get(key)):
            raise ConfigError(f"{path}: {key} is missing or no whole number; set it")
    if "norm_eps" not in params:  # a default taken in silence would be another model
        raise ConfigError(f"{path}: norm_eps is missing; set it to what the model was trained with")
    multiple, multiplier = params.get("multiple_of", _MULTIPLE), params.get("ffn_dim_multiplier")
    if not _is_count(multiple):
        raise ConfigError(
            f"{path}: multiple_of={multiple} is no positive whole number that can be; set it"
        )
    if multiplier is not None and not (
        type(multiplier) in (int, float) and 0 < multiplier < _LARGEST
    ):
        raise ConfigError(
            f"{path}: ffn_dim_multiplier={multiplier} is no number that can be; set it"
        )
    if params.get("vocab_size", -1) not in (-1, vocab):  # LLaMA 1 and 2 leave it to the tokenizer
        raise ConfigError(
            f"{path}: vocab_size={params['vocab_size']}, but the embedding has {vocab} rows; fetch "
            "the files of one release"
        )
    model = {ours: params[theirs] for ours, theirs in _SHAPE.items()}
    model |= {
        "kv_heads": params.get("n_kv_heads") or params["n_heads"],
        "ffn": _ffn(params["dim"], multiple, multiplier),
        "vocab": vocab,
        "norm_eps": params["norm_eps"],
        "rope_theta": params.get("rope_theta", _THETA),
    }
    if params.get("use_scaled_rope"):
        if (
            not params.get("rope_scaling_factor")
            and (params["dim"], params["n_layers"]) in _LLAMA_3_2
        ):
            raise ConfigError(
                f"{path}: rope_scaling_factor is missing, and a model of this shape may be Llama "
                'of 3.1, which has 8, or of 3.2, which has 32; add "rope_scaling_factor": 32 or 8'
            )
        named = {"factor": "rope_scaling_factor", "high_freq_factor": "rope_high_freq_factor"}
        given = {ours: params[theirs] for ours, theirs in named.items() if params.get(theirs)}
        model["rope_scaling"] = {**_SCALING.model_dump(), **given}
    return model


def _is_count(value: object) -> bool:
    return type(value) is int and 0 < value < _LARGEST


def params_of(model: Model) -> dict[str, Any]:
    """`params.json` of a model: the keys that every release knows, and others only where needed.

    Raises:
        ConfigError: its RoPE scaling is none that `params.json` can name.
    """
    params: dict[str, Any] = {theirs: getattr(model, ours) for ours, theirs in _SHAPE.items()}
    params |= {"vocab_size": model.vocab, "norm_eps": model.norm_eps}
    if model.kv_heads != model.heads:
        params["n_kv_heads"] = model.kv_heads
    if model.rope_theta != _THETA:
        params["rope_theta"] = model.rope_theta
    params |= _ffn_params(model)
    scaling = model.rope_scaling
    if scaling is None:
        return params
    for key in ("low_freq_factor", "original_context"):
        if getattr(scaling, key) != getattr(_SCALING, key):
            raise ConfigError(
                f"model.rope_scaling.{key}={getattr(scaling, key)}: Meta's format has "
                f"{getattr(_SCALING, key)} alone; convert to Hugging Face"
            )
    params["use_scaled_rope"] = True
    if scaling.factor != _SCALING.factor:
        params["rope_scaling_factor"] = scaling.factor
    if scaling.high_freq_factor != _SCALING.high_freq_factor:
        params["rope_high_freq_factor"] = scaling.high_freq_factor
    return params


def _ffn(width: int, multiple: int, multiplier: float | None) -> int:
    """The feed-forward width: 8/3 of the model's, scaled, and up to a multiple."""
    ffn = int(8 * width / 3)
    if multiplier is not None:
        ffn = int(multiplier * ffn)
    return -(-ffn // multiple) * multiple


def _ffn_params(model: Model) -> dict[str, Any]:
    """What makes `_ffn` the model's width."""
    if _ffn(model.d_model, _MULTIPLE, None) == model.ffn:
        return {"multiple_of": _MULTIPLE}
    multiple = _MULTIPLE if model.ffn % _MULTIPLE == 0 else model.ffn
    # The half keeps the product's whole part from rounding.
    multiplier = (model.ffn + 0.5) / int(8 * model.d_model / 3)
    return {"multiple_of": multiple, "ffn_dim_multiplier": multiplier}
