"""The real model's passes on one of several tensor ranks, with every kernel and collective logged.

The model is built as a run builds it; only the group is not there: its collectives return tensors
of the right shape. What is logged is worked out from the tensors that kernels are handed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megallama.autograd import cross_entropy, layer
from megallama.autograd.passes import Beside, WgradQueue, both, drive
from megallama.autograd.stash import Stash
from megallama.config.schema import Config
from megallama.dist.group import Blocking, SingleGroup
from megallama.model.chunk import MicroBatch, ModelChunk
from megallama.model.llama import Llama
from megallama.parallel import linear, norm, vocab
from megallama.parallel.state import ParameterState
from megallama.parallel.tokens import TokenShards
from megallama.spec.grid import Grid, Place
from megallama.spec.stages import Chunk, rank_tables

Entry = tuple[Any, ...]


@dataclass(eq=False)
class Flying:
    """A collective under way, by its number."""

    log: list[Entry]
    number: int
    value: Tensor
    cover: int

    def wait(self) -> Tensor:
        self.log.append(("wait", self.number))
        return self.value


class Alone:
    """Rank 0 of `size` ranks, the others of which are not there."""

    name, rank = "tensor", 0

    def __init__(self, size: int, log: list[Entry]) -> None:
        self.size, self.log, self.count = size, log, 0

    def all_gather(self, x: Tensor, out: Tensor | None = None) -> Flying:
        whole = x.repeat(self.size, *[1] * (x.dim() - 1))
        sent = (self.size - 1) * x.numel() * x.element_size()
        return self._start("all_gather", sent, whole if out is None else out.copy_(whole), 1)

    def reduce_scatter(self, x: Tensor, wire: torch.dtype | None = None) -> Flying:
        mine = x[: len(x) // self.size].clone()
        sent = (self.size - 1) * mine.numel() * x.element_size()
        return self._start("reduce_scatter", sent, mine, 1)

    def all_reduce(self, x: Tensor) -> Flying:
        sent = 2 * (self.size - 1) * -(-x.numel() // self.size) * x.element_size()
        return self._start("all_reduce", sent, x.clone(), 2)

    def _start(self, operation: str, sent: int, value: Tensor, cover: int) -> Flying:
        self.log.append(("start", self.count, operation, sent))
        self.count += 1
        return Flying(self.log, self.count - 1, value, cover)


def size(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def log_kernels(patch: Callable[[Any, str, Any], None], log: list[Entry]) -> None:
    """Have every kernel of the passes add itself to the log; `patch` as monkeypatch.setattr."""

    def wrap(module: Any, name: str, entry: Callable[..., Entry]) -> None:
        real = getattr(module, name)

        def logged(*args: Any, **kwargs: Any) -> Any:
            log.append(entry(*args, **kwargs))
            return real(*args, **kwargs)

        patch(module, name, logged)

    for module in (linear, cross_entropy):
        wrap(module, "linear_forward", lambda x, w, out=None: ("gemm", len(x), len(w), x.shape[1]))
        wrap(module, "linear_dgrad", lambda dy, w, out=None: ("gemm", len(dy), w.shape[1], len(w)))
        wrap(module, "linear_wgrad", lambda dy, x, dw: ("gemm", dy.shape[1], x.shape[1], len(x)))
    wrap(layer, "attention_forward", lambda q, *rest: ("attend forward", len(q), q[0].numel()))
    wrap(
        layer,
        "attention_backward",
        lambda do, qkv, o, lse, s, out: ("attend backward", len(do), do[0].numel()),
    )
    for name in ("rope_forward", "rope_backward"):
        wrap(layer, name, lambda x, cos, sin: ("rotate", 2 * size(x)))
    wrap(layer, "swiglu_forward", lambda x: ("activation", size(x) * 3 // 2))
    wrap(
        layer,
        "swiglu_backward",
        lambda dact, x, out, act: ("activation_backward", size(dact, x, out, act)),
    )
    wrap(norm, "rms_norm_forward", lambda x, w, eps: ("norm", size(x, x)))
    wrap(norm, "add_rms_norm_forward", lambda x, y, w, eps, out: ("norm", size(x, y, out, out)))
    wrap(
        norm,
        "rms_norm_backward",
        lambda dn, x, w, dw, eps, residual, out: ("norm_backward", size(dn, x, residual, out)),
    )
    wrap(cross_entropy, "cross_entropy_statistics", lambda z, *rest: ("loss", size(z)))
    wrap(cross_entropy, "cross_entropy_gradient_", lambda z, *rest: ("loss", 2 * size(z)))
    wrap(cross_entropy, "cross_entropy_", lambda z, *rest: ("loss", 3 * size(z)))
    wrap(vocab, "embedding_forward", lambda *rest: ("embedding",))
    wrap(vocab, "embedding_backward", lambda *rest: ("embedding",))


class RealPasses:
    """A config's only chunk, and its passes over random tokens. `chunk`: its ends and layers."""

    def __init__(self, config: Config, chunk: Chunk, log: list[Entry]) -> None:
        train, parallel = config.train, config.parallel
        self.config, self.log = config, log
        place = Place(Grid(tensor=parallel.tensor), 0)
        group: Any = Alone(parallel.tensor, log) if parallel.tensor > 1 else SingleGroup()
        if parallel.overlap == "none":
            group = Blocking(group)
        ((_, table),) = rank_tables(config, place)
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[train.precision]
        state = ParameterState(table, dtype, torch.device("cpu"))
        for weight in state.weights.values():
            torch.nn.init.normal_(weight, std=0.1)
        self.tokens = TokenShards(group, parallel.sequence_parallel, parallel.forward_chunks)
        model = Llama(config.model, state, self.tokens, train.saved_activations, [chunk])
        self.chunk: ModelChunk = model.chunks[chunk.index]
        self.dtype, self.queue = dtype, WgradQueue(parallel.overlap != "none")
        self.count = train.micro_batch * train.sequence_length
        ids = torch.randint(config.model.vocab, (self.count,))
        lengths = [[train.sequence_length]] * train.micro_batch
        self.batch = MicroBatch(ids, ids, model.positions(lengths))

    def issued(self, kind: str) -> Sequence[Entry]:
        """What a pass of this kind logs (`plan.passtimes.issued`); what it needs runs before."""
        stash, other, state = Stash(), Stash(), Stash()
        if kind != "F":
            drive(self._forward(stash))
        if kind in ("W", "B+", "W-"):
            drive(self._forward(other))
            drive(self._backward(other, state))
        self.log.clear()
        if kind == "F":
            drive(self._forward(stash))
        elif kind == "BW":
            drive(self._backward(stash, self.queue), self.queue)
        elif kind == "B":
            drive(self._backward(stash, state))
        elif kind == "W":
            drive(self.chunk.backward_weights(self.batch, state))
        elif kind == "FB":
            pair = both(self._forward(other), self._backward(stash, self.queue))
            drive(pair, self.queue)
        else:
            weights = Beside(self.chunk.backward_weights(self.batch, state))
            drive(self._backward(stash, Stash()), weights)
            if kind == "W-":
                self.log.clear()
                weights.finish()
        return _numbered(self.log)

    def _forward(self, stash: Stash) -> Any:
        return self.chunk.forward(self.batch, self._stream(self.chunk.embedding is None), stash)

    def _backward(self, stash: Stash, wgrads: WgradQueue | Stash) -> Any:
        dz = self._stream(self.chunk.head is None)
        return self.chunk.backward(self.batch, dz, stash, wgrads)

    def _stream(self, needed: bool) -> Tensor | None:
        shape = self.tokens.shard_rows(self.count), self.config.model.d_model
        return torch.randn(shape).to(self.dtype) if needed else None


def _numbered(log: Sequence[Entry]) -> list[Entry]:
    """Collectives by their place in this log; a wait for one of an earlier pass has -1."""
    places: dict[int, int] = {}
    found = []
    for entry in log:
        if entry[0] == "start":
            places[entry[1]] = len(places)
            entry = ("start", places[entry[1]], *entry[2:])
        elif entry[0] == "wait":
            entry = ("wait", places.get(entry[1], -1))
        found.append(entry)
    return found
