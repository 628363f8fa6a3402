"""What tests share: our model built from a shape and named weights, and one step of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megallama.autograd.passes import WgradQueue, drive
from megallama.autograd.stash import Stash
from megallama.config.schema import Model
from megallama.dist.group import SingleGroup
from megallama.model.chunk import HEAD, MicroBatch
from megallama.model.llama import Llama
from megallama.parallel.state import ParameterState, Tensors
from megallama.parallel.tokens import TokenShards
from megallama.spec.grid import ALONE
from megallama.spec.parameters import EMBEDDING, OUTPUT, Parameter, parameter_table
from megallama.spec.shards import shard_table
from megallama.spec.stages import Chunk
from tests.reference import Batch, ShapeLike


class Outcome(NamedTuple):
    """As `tests.reference.Result`, with the bytes that the layers saved in between."""

    loss: Tensor
    logits: Tensor
    grads: dict[str, Tensor]
    saved_bytes: int


def model_config(shape: ShapeLike) -> Model:
    """Our configuration of a test shape."""
    scaling = getattr(shape, "rope_scaling", None)
    return Model(
        d_model=shape.d_model,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        ffn=shape.ffn,
        vocab=shape.vocab,
        rope_theta=shape.rope_theta,
        norm_eps=shape.norm_eps,
        tie_embeddings=shape.tie_embeddings,
        rope_scaling=scaling._asdict() if hasattr(scaling, "_asdict") else scaling,
    )


def lone_state(
    table: Iterable[Parameter], dtype: torch.dtype, tied: bool = False
) -> ParameterState:
    """The buffers of whole parameters: those of a process that is alone."""
    ends = (EMBEDDING, OUTPUT) if tied else ()
    return ParameterState(shard_table(table, ALONE), dtype, torch.device("cpu"), ends)


def parts(state: ParameterState, tensors: Mapping[str, Tensor]) -> Tensors:
    """Views of the global tensors, by their names, in buffers that hold all of each."""
    return {piece.part.name: view for piece, view in state.pieces(tensors)}


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    """A copy of all elements, in order."""
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def put(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy values into tensors of the same names."""
    for name, tensor in tensors.items():
        tensor.copy_(values[name])


def build_model(
    shape: ShapeLike,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype,
    policy: str = "linear_outputs",
) -> Llama:
    """Our model in `dtype`, holding `weights`."""
    config = model_config(shape)
    state = lone_state(parameter_table(config), dtype, config.tie_embeddings)
    put(parts(state, state.masters), weights)
    state.round_masters()
    return Llama(config, state, TokenShards(SingleGroup()), policy, [whole(config)])


def whole(config: Model) -> Chunk:
    """The whole model as one chunk."""
    return Chunk(0, range(config.layers), embedding=True, head=True)


def micro_batch(
    model: Llama, tokens: Tensor, labels: Tensor, lengths: Sequence[Sequence[int]] | None
) -> MicroBatch:
    """(B, S) tokens and labels as our passes take them."""
    samples, length = tokens.shape
    positions = model.positions(lengths or [[length]] * samples)
    return MicroBatch(tokens.flatten(), labels.flatten(), positions)


def forward_backward(model: Llama, *batches: Batch) -> Outcome:
    """Loss, logits and gradients of the summed loss over some micro-batches, under Meta's names."""
    stash, queue = Stash(), WgradQueue()
    losses, logits, saved_bytes = [], [], 0
    model.state.zero_gradients()
    for batch in batches:
        ours = micro_batch(model, *batch)
        losses.append(drive(model.chunks[0].forward(ours, None, stash)).sum())
        head = stash.take(HEAD)
        saved_bytes = stash.bytes_held()
        stash.put(HEAD, head)
        drive(model.chunks[0].backward(ours, None, stash, queue), queue)
        all_logits = drive(model.logits(ours.tokens_T, ours.positions))
        logits.append(all_logits.view(*batch.tokens.shape, -1))
    assert len(stash) == 0, "a saved set was left behind"
    model.state.fold_tied_gradient()
    grads = {n: g.clone() for n, g in parts(model.state, model.state.gradients).items()}
    return Outcome(torch.stack(losses).sum(), torch.cat(logits), grads, saved_bytes)
