"""Hugging Face's LlamaForCausalLM directories: `config.json` and safetensors files.

Names change and values do not: transformers rotates the halves of a head, as the passes here do,
so no row is permuted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megallama.checkpoint.huggingface_config import config_to_json, model_from_json
from megallama.checkpoint.tensor_files import (
    DTYPES,
    Stored,
    TensorFile,
    foreign_file,
    read_json,
    write_tensor_file,
)
from megallama.checkpoint.weights import (
    PRECISIONS,
    Weights,
    cast,
    config_of,
    narrowest_precision,
    part_shapes,
    row_blocks,
)
from megallama.config.schema import Model
from megallama.errors import ConfigError, CorruptError
from megallama.files import write_atomic

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
SHARD_BYTES = 5_000_000_000  # of a file at most, as transformers 4 has it; one tensor may be more

_MODULES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}


def huggingface_name(name: str) -> str:
    """transformers' name of the tensor that the parameter table calls `name`."""
    module = name.removesuffix(".weight")
    if not module.startswith("layers."):
        return f"{_MODULES[module]}.weight"
    _, layer, rest = module.split(".", 2)
    return f"model.layers.{layer}.{_MODULES[rest]}.weight"


class HuggingFaceWeights:
    """The weights of a LlamaForCausalLM directory: one safetensors file, or several by an index.

    Raises:
        ConfigError: it holds a model that megallama does not have, or no safetensors.
        CorruptError: a file is damaged, or a tensor is missing or of another shape.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / CONFIG
        given = read_json(foreign_file(directory, CONFIG))
        shape = model_from_json(given, path)
        context = given.get("max_position_embeddings", 2048)  # transformers' default
        self._files = _files_by_tensor(directory)
        model = config_of(shape, context, "fp32", path).model
        dtypes = self._check(directory, model)
        self.config = config_of(shape, context, narrowest_precision(dtypes, directory), path)

    def blocks(self, name: str) -> Iterator[Tensor]:
        theirs = huggingface_name(name)
        file = self._files[theirs]
        stored = file.tensors[theirs]
        for first, rows in row_blocks(stored.shape[0], stored.bytes // stored.shape[0]):
            yield file.read(theirs, first, rows)

    def _check(self, directory: Path, model: Model) -> set[torch.dtype | str]:
        """Hold the files against the model; gives the types of its tensors, words where unknown."""
        dtypes: set[torch.dtype | str] = set()
        extra = set(self._files)
        for name, shape in part_shapes(model).items():
            theirs = huggingface_name(name)
            stored = self._stored(theirs, directory)
            if stored.shape != shape:
                raise CorruptError(
                    f"{self._files[theirs].path}: tensor {theirs!r} has shape {stored.shape}, "
                    f"{CONFIG} makes it {shape}; fetch the directory again"
                )
            dtypes.add(DTYPES.get(stored.dtype, stored.dtype))
            extra.discard(theirs)
        if model.tie_embeddings:  # transformers then takes the embedding's
            extra.discard(huggingface_name("output.weight"))
        # transformers before 4.32 kept RoPE's frequencies, which follow from the config.
        for theirs in sorted(n for n in extra if not n.endswith("rotary_emb.inv_freq")):
            raise ConfigError(
                f"{self._files[theirs].path}: tensor {theirs!r} is no weight of a LLaMA as trained "
                "here (no biases, not quantised); convert a plain LlamaForCausalLM"
            )
        return dtypes

    def _stored(self, theirs: str, directory: Path) -> Stored:
        if theirs not in self._files:
            raise CorruptError(f"{directory}: tensor {theirs!r} is missing; fetch it again")
        return self._files[theirs].tensors[theirs]


def write_huggingface(
    directory: Path,
    weights: Weights,
    precision: str,
    token_ids: Mapping[str, int | list[int] | None],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `config.json` and the weights into an empty directory.

    `precision`: a key of `PRECISIONS`; `token_ids`: those of `bos`, `eos` and `pad`.

    Raises:
        ConfigError: the disk refuses, or a value is too large for the precision.
        CorruptError: the weights are damaged where they come from.
    """
    dtype = PRECISIONS[precision]
    shapes = part_shapes(weights.config.model)
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    groups = _groups(sizes, shard_bytes)
    files = {_file_name(number, len(groups)): names for number, names in enumerate(groups)}

    def blocks(names: Iterable[str]) -> Iterator[Tensor]:
        for name in names:
            for block in weights.blocks(name):
                yield cast(block, precision, name)

    for file, names in files.items():
        theirs = {huggingface_name(name): shapes[name] for name in names}
        write_tensor_file(directory / file, theirs, dtype, blocks(names))
    if len(files) > 1:
        places = {huggingface_name(n): file for file, names in files.items() for n in names}
        body = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        _write_json(directory / INDEX, body)
    _write_json(directory / CONFIG, config_to_json(weights.config, precision, token_ids))


def _file_name(number: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _groups(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Consecutive names whose sizes sum to at most `limit`, one name at least."""
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return groups


def _files_by_tensor(directory: Path) -> dict[str, TensorFile]:
    """The file of every tensor, by transformers' names."""
    if (directory / SINGLE).exists():
        file = TensorFile(foreign_file(directory, SINGLE))
        return dict.fromkeys(file.tensors, file)
    if not (directory / INDEX).exists():
        raise ConfigError(
            f"{directory}: neither {SINGLE} nor {INDEX}; save the model with safe_serialization"
        )
    places = read_json(foreign_file(directory, INDEX)).get("weight_map")
    if not isinstance(places, dict) or not all(_is_plain(file) for file in places.values()):
        raise CorruptError(f"{directory / INDEX}: weight_map names no files; fetch it again")
    files = {
        name: TensorFile(foreign_file(directory, name)) for name in sorted(set(places.values()))
    }
    for tensor, name in places.items():
        if tensor not in files[name].tensors:
            raise CorruptError(
                f"{directory / name}: holds no tensor {tensor!r}, which {INDEX} puts there; fetch "
                "it again"
            )
    return {tensor: files[name] for tensor, name in places.items()}


def _is_plain(name: object) -> bool:
    """Whether it is a file's name without a folder: an index must not lead out of its directory."""
    return isinstance(name, str) and name == Path(name).name and name.endswith(".safetensors")


def _write_json(path: Path, body: Mapping[str, Any]) -> None:
    write_atomic(path, json.dumps(body, indent=2).encode() + b"\n")
