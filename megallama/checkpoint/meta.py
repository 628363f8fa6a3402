"""Meta's releases: `params.json` and `consolidated.NN.pth`, one file a model-parallel rank.

Names are those of the parameter table. Meta's RoPE turns neighbouring elements of a head, the
passes here its halves: the rows of every query and key head are put in the other order. A tied
embedding is written twice, because Meta's code knows no tying; read back, equal ones are tied.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megallama.checkpoint.meta_params import model_from_params, params_of
from megallama.checkpoint.pth import pth_file, write_block
from megallama.checkpoint.pth_reader import PthFile
from megallama.checkpoint.tensor_files import as_bytes, foreign_file, read_json
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
from megallama.spec.parameters import parameter_table

PARAMS = "params.json"
CONTEXT = 2048  # tokens, LLaMA 1's and the default of Meta's code: params.json says nothing of it
EMBEDDING, OUTPUT = "tok_embeddings.weight", "output.weight"
FREQUENCIES = "rope.freqs"  # in LLaMA 1 and 2; they follow from the config

#: Along which dimension each tensor is divided among the files; None: all have the whole.
Dims = Mapping[str, Literal[0, 1] | None]


class MetaWeights:
    """The weights of a directory of `consolidated.NN.pth`, read a block at a time.

    Every byte is checked against the archive's checksums when it is opened; code in a file is
    refused, not run.

    Raises:
        ConfigError: it holds a model that megallama does not have, or no such files.
        CorruptError: a file is damaged or missing, a tensor is missing or of another shape, or one
            that all files have whole is not the same in all.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / PARAMS
        params = read_json(foreign_file(directory, PARAMS))
        self._shards = [PthFile(foreign_file(directory, name)) for name in _names(directory)]
        embedding_dim, vocab = self._embedding(params.get("dim"))
        shape = model_from_params(params, vocab, path)
        context = params.get("max_seq_len", CONTEXT)
        model = config_of(shape, context, "fp32", path).model
        self._dims = _dims(model, embedding_dim)
        dtypes = self._check(model)
        shape["tie_embeddings"] = self._is_tied(vocab)
        self.config = config_of(shape, context, narrowest_precision(dtypes, directory), path)

    def blocks(self, name: str) -> Iterator[Tensor]:
        (rows, *_), row_bytes = part_shapes(self.config.model)[name], self._row_bytes(name)
        width = self.config.model.head_width
        for first, count in row_blocks(rows, row_bytes, width if _is_rotated(name) else 1):
            block = self._rows(name, first, count)
            yield halves_from_pairs(block, width) if _is_rotated(name) else block

    def _row_bytes(self, name: str) -> int:
        first = self._shards[0].tensors[name]
        whole = math.prod(first.shape[1:]) * first.dtype.itemsize
        return whole * len(self._shards) if self._dims[name] == 1 else whole

    def _rows(self, name: str, first: int, count: int) -> Tensor:
        """Some rows of the whole tensor."""
        if self._dims[name] is None:
            return self._shards[0].read(name, first, count)
        if self._dims[name] == 1:
            return torch.cat([shard.read(name, first, count) for shard in self._shards], 1)
        height = self._shards[0].tensors[name].shape[0]
        pieces = []
        for n, shard in enumerate(self._shards):
            begin, end = max(first, n * height), min(first + count, (n + 1) * height)
            if begin < end:
                pieces.append(shard.read(name, begin - n * height, end - begin))
        return torch.cat(pieces)

    def _embedding(self, width: object) -> tuple[Literal[0, 1], int]:
        """How the embedding is divided, and its rows: columns in LLaMA 1 and 2, rows in Llama 3."""
        shard = self._shards[0]
        embedding = shard.tensors.get(EMBEDDING)
        if embedding is None or len(embedding.shape) != 2:
            raise CorruptError(
                f"{shard.path}: matrix {EMBEDDING!r} is missing; fetch the file again"
            )
        rows, columns = embedding.shape
        return (0, rows * len(self._shards)) if columns == width else (1, rows)

    def _check(self, model: Model) -> set[torch.dtype]:
        """Hold every file against the model; gives the types of its tensors."""
        expected = _shard_shapes(model, self._dims, len(self._shards))
        if not self._has_output():
            del expected[OUTPUT]
        dtypes = set()
        for shard in self._shards:
            path, tensors = shard.path, shard.tensors
            for name, shape in expected.items():
                found = tensors[name].shape if name in tensors else "none"
                if found != shape:
                    raise CorruptError(
                        f"{path}: tensor {name!r} has shape {found}, {PARAMS} and "
                        f"{len(self._shards)} files make it {shape}; fetch the directory again"
                    )
                dtypes.add(tensors[name].dtype)
            for name in sorted(tensors.keys() - expected.keys() - {FREQUENCIES}):
                raise ConfigError(
                    f"{path}: tensor {name!r} is no weight of a LLaMA as trained here; convert a "
                    "plain release"
                )
        self._refuse_unequal_copies(expected)
        return dtypes

    def _refuse_unequal_copies(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """The norms stand in every file; two trainings' files together would pass for one model."""
        first, *others = self._shards
        for name in (name for name in shapes if self._dims[name] is None):
            kept = as_bytes(first.read(name, 0, shapes[name][0]))
            for shard in others:
                if not np.array_equal(as_bytes(shard.read(name, 0, shapes[name][0])), kept):
                    raise CorruptError(
                        f"{shard.path}: tensor {name!r} is not the one of {first.path.name}; fetch "
                        "the files of one release"
                    )

    def _has_output(self) -> bool:
        return any(OUTPUT in shard.tensors for shard in self._shards)

    def _is_tied(self, vocab: int) -> bool:
        """Whether the output weight is the embedding's, or absent."""
        if not self._has_output():
            return True
        return all(
            torch.equal(self._rows(EMBEDDING, *rows), self._rows(OUTPUT, *rows))
            for rows in row_blocks(vocab, self._row_bytes(EMBEDDING))
        )


def write_meta(
    directory: Path, weights: Weights, precision: str, shards: int, embedding_dim: Literal[0, 1]
) -> None:
    """Write `params.json` and the weights into an empty directory, as `shards` files.

    `embedding_dim`: 1 divides the embedding as the code of LLaMA 1 and 2 expects it, 0 as Llama
    3's does.

    Raises:
        ConfigError: the model is not divided so, or not described by `params.json`; the disk
            refuses; a value is too large for the precision.
        CorruptError: the weights are damaged where they come from.
    """
    model, dtype = weights.config.model, PRECISIONS[precision]
    params = params_of(model)
    dims = _dims(model, embedding_dim)
    shapes = _shard_shapes(model, dims, shards)
    with ExitStack() as files:
        writers = [
            files.enter_context(pth_file(directory / f"consolidated.{n:02d}.pth", shapes, dtype))
            for n in range(shards)
        ]
        for name, dim in dims.items():
            source = EMBEDDING if name == OUTPUT and model.tie_embeddings else name
            blocks: Iterable[Tensor] = weights.blocks(source)
            if _is_rotated(name):
                whole = _whole_heads(blocks, model.head_width)
                blocks = (pairs_from_halves(block, model.head_width) for block in whole)
            with ExitStack() as members:
                places = [members.enter_context(writer.tensor(name)) for writer in writers]
                for n, piece in _divided(blocks, dim, shapes[name], shards):
                    write_block(places[n], cast(piece, precision, name))
    write_atomic(directory / PARAMS, json.dumps(params, indent=2).encode() + b"\n")


def halves_from_pairs(block: Tensor, head_width: int) -> Tensor:
    """Rows of whole heads, from Meta's order (pairs 2e, 2e+1) to ours (pairs e, e + E/2)."""
    return block.view(-1, head_width // 2, 2, block.shape[1]).transpose(1, 2).reshape(block.shape)


def pairs_from_halves(block: Tensor, head_width: int) -> Tensor:
    """The inverse of `halves_from_pairs`."""
    return block.view(-1, 2, head_width // 2, block.shape[1]).transpose(1, 2).reshape(block.shape)


def _is_rotated(name: str) -> bool:
    return name.endswith(("attention.wq.weight", "attention.wk.weight"))


def _whole_heads(blocks: Iterable[Tensor], head_width: int) -> Iterator[Tensor]:
    """The same rows in blocks of whole heads: a checkpoint's slices may end within one."""
    rest: Tensor | None = None
    for block in blocks:
        joined = block if rest is None else torch.cat([rest, block])
        whole = len(joined) // head_width * head_width
        rest = joined[whole:].clone() if whole < len(joined) else None
        if whole:
            yield joined[:whole]


def _divided(
    blocks: Iterable[Tensor], dim: Literal[0, 1] | None, shape: Sequence[int], shards: int
) -> Iterator[tuple[int, Tensor]]:
    """The pieces of a tensor's blocks, each with the file that it belongs to; `shape`: a file's."""
    row = 0
    for block in blocks:
        if dim is None:
            yield from ((n, block) for n in range(shards))
        elif dim == 1:
            yield from enumerate(block.split(shape[1], 1))
        else:
            for n in range(row // shape[0], -(-(row + len(block)) // shape[0])):
                first = n * shape[0] - row
                yield n, block[max(0, first) : first + shape[0]]
        row += len(block)


def _dims(model: Model, embedding_dim: Literal[0, 1]) -> Dims:
    """Every tensor that Meta's files have, and how it is divided."""
    untied = model.model_copy(update={"tie_embeddings": False})
    dims = {part.name: w.shard_dim for w in parameter_table(untied) for part in w.parts}
    return {**dims, EMBEDDING: embedding_dim}


def _shard_shapes(model: Model, dims: Dims, shards: int) -> dict[str, tuple[int, ...]]:
    """The shapes of one file's tensors. Raises ConfigError where they do not divide evenly."""
    if model.kv_heads % shards:
        raise ConfigError(
            f"{shards} files do not divide {model.kv_heads} key/value heads; take a divisor"
        )
    untied = model.model_copy(update={"tie_embeddings": False})
    shapes = part_shapes(untied)
    for name, dim in dims.items():
        if dim is not None:
            shape = list(shapes[name])
            if shape[dim] % shards:
                raise ConfigError(
                    f"{shards} files do not divide {name}, {shape[dim]} wide; take a divisor"
                )
            shape[dim] //= shards
            shapes[name] = tuple(shape)
    return shapes


def _names(directory: Path) -> list[str]:
    names = sorted(path.name for path in directory.glob("consolidated.*.pth"))
    if not names:
        raise ConfigError(f"{directory}: no consolidated.00.pth; name a directory of Meta's")
    for number, name in enumerate(names):
        if name != f"consolidated.{number:02d}.pth":
            raise CorruptError(
                f"{directory}: {name}, but no consolidated.{number:02d}.pth; fetch it too"
            )
    return names
