"""The output projection and the cross-entropy over a vocabulary shard, fused and chunked.

Shapes: T tokens, c the tokens of a chunk; D model width; v this rank's share of the vocabulary,
padding included.

All logits of a micro-batch never exist together: each chunk's are computed, turned into their own
gradient in place, and used for all three GEMMs while they are there. So the forward returns the
gradient of its input as well, and the logits are computed once rather than twice. With several
tensor ranks the softmax needs two numbers of every token from each; they travel under the next
chunk's logits, where there is a next chunk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from megallama.autograd.linear import linear_dgrad, linear_forward, linear_wgrad
from megallama.autograd.passes import Pass
from megallama.dist.handle import Handle
from megallama.kernels.cross_entropy import (
    cross_entropy_,
    cross_entropy_gradient_,
    cross_entropy_statistics,
)
from megallama.spec.labels import IGNORE
from megallama.spec.logits import CHUNK_BYTES, chunk_count, chunk_length

#: A weight gradient that is yet to be added.
Wgrad = Callable[[], None]


@dataclass(frozen=True)
class VocabShard:
    """Rows `first` … `first + rows` of a vocabulary, held by one of `ranks` tensor ranks.

    `gather` makes a vector of every rank into a matrix (ranks, n).
    """

    first: int
    rows: int
    ranks: int
    gather: Callable[[Tensor], Handle[Tensor]]


class _Chunk(NamedTuple):
    """A chunk whose logits are there, and their statistics on their way where they are asked for.

    `out_cD`: where the gradient of `x_cD` goes; None in an evaluation.
    """

    x_cD: Tensor
    labels_c: Tensor
    out_cD: Tensor | None
    logits_cv: Tensor
    statistics: Handle[Tensor] | None


class LinearCrossEntropy:
    """loss = cross-entropy(x·wᵀ, labels), with reused buffers for the logits.

    Buffers are kept because a fresh 64 MiB costs more in page faults than its GEMM takes.
    """

    def __init__(self, vocab: VocabShard) -> None:
        self.vocab = vocab
        self._buffers: dict[int, Tensor] = {}

    def forward(self, x_TD: Tensor, w_vD: Tensor, labels_T: Tensor) -> Pass[Tensor]:
        """Each token's loss (T,), zero where the label is IGNORE; fp32 or wider."""
        losses: list[Tensor] = []

        def finish(chunk: _Chunk) -> Pass[None]:
            loss_c, _ = yield from self._combine(chunk)
            losses.append(loss_c)

        yield from self._each_chunk(x_TD, w_vD, labels_T, None, finish)
        return torch.cat(losses)

    def forward_backward(
        self, x_TD: Tensor, w_vD: Tensor, labels_T: Tensor, dw_vD: Tensor
    ) -> Pass[tuple[Tensor, Tensor, Wgrad]]:
        """Return the losses (T,) and this shard's part of the gradient (T, D) of their sum.

        The weight's gradient is added into `dw_vD`, that of the last chunk by what is returned
        third: it can hide what is done with the gradient.
        """
        losses: list[Tensor] = []
        dx_TD = torch.empty_like(x_TD)
        count = chunk_count(*self._shape(x_TD, w_vD))
        wgrads: list[Wgrad] = []

        def finish(chunk: _Chunk) -> Pass[None]:
            loss_c = yield from self._to_gradient(chunk)
            losses.append(loss_c)
            linear_dgrad(chunk.logits_cv, w_vD, out=chunk.out_cD)
            wgrads.append(partial(linear_wgrad, chunk.logits_cv, chunk.x_cD, dw_vD))
            if len(losses) < count:
                wgrads.pop()()

        yield from self._each_chunk(x_TD, w_vD, labels_T, dx_TD, finish)
        return torch.cat(losses), dx_TD, wgrads.pop()

    def _each_chunk(
        self,
        x_TD: Tensor,
        w_vD: Tensor,
        labels_T: Tensor,
        dx_TD: Tensor | None,
        finish: Callable[[_Chunk], Pass[None]],
    ) -> Pass[None]:
        """Start each chunk, and finish it after the next one's start where ranks are waited for."""
        ahead = 1 if self.vocab.ranks > 1 else 0
        length = chunk_length(*self._shape(x_TD, w_vD))
        started: deque[_Chunk] = deque()
        outputs = repeat(None) if dx_TD is None else dx_TD.split(length)
        pieces = zip(x_TD.split(length), labels_T.split(length), outputs, strict=False)
        for index, piece in enumerate(pieces):
            started.append(self._start(*piece, w_vD, index % (ahead + 1)))
            if len(started) > ahead:
                yield from finish(started.popleft())
        while started:
            yield from finish(started.popleft())

    def _start(
        self, x_cD: Tensor, labels_c: Tensor, out_cD: Tensor | None, w_vD: Tensor, buffer: int
    ) -> _Chunk:
        vocab, logits_cv = self.vocab, self._logits(buffer, len(x_cD), w_vD)
        linear_forward(x_cD, w_vD, out=logits_cv)
        statistics = None
        if vocab.ranks > 1 or out_cD is None:
            mine = cross_entropy_statistics(logits_cv, labels_c, vocab.first, vocab.rows)
            statistics = vocab.gather(mine.view(1, -1))
        return _Chunk(x_cD, labels_c, out_cD, logits_cv, statistics)

    def _to_gradient(self, chunk: _Chunk) -> Pass[Tensor]:
        """Turn the logits in place into the gradient of the losses (c,), which are returned."""
        vocab, logits_cv, labels_c = self.vocab, chunk.logits_cv, chunk.labels_c
        if vocab.ranks == 1:
            return cross_entropy_(logits_cv, labels_c, vocab.rows)
        loss_c, lse_c = yield from self._combine(chunk)
        cross_entropy_gradient_(logits_cv, labels_c, lse_c, vocab.first, vocab.rows)
        return loss_c

    def _combine(self, chunk: _Chunk) -> Pass[tuple[Tensor, Tensor]]:
        """The losses and the whole vocabulary's log Σ exp: (c,), (c,)."""
        assert chunk.statistics is not None
        statistics = yield chunk.statistics
        log_sums, targets = statistics.view(self.vocab.ranks, 2, -1).unbind(1)
        lse_c = log_sums.logsumexp(0)
        return (lse_c - targets.sum(0)).where(chunk.labels_c != IGNORE, 0.0), lse_c

    def _shape(self, x_TD: Tensor, w_vD: Tensor) -> tuple[int, int, int, int]:
        """What `spec.logits` asks."""
        itemsize, device = x_TD.element_size(), x_TD.device.type
        if x_TD.is_meta:  # a dry run: bf16 trains on GPUs, what is wider on CPUs
            device = "cuda" if itemsize == 2 else "cpu"
        return len(x_TD), len(w_vD), itemsize, CHUNK_BYTES[device]

    def _logits(self, buffer: int, tokens: int, w_vD: Tensor) -> Tensor:
        """A view (c, v) of a buffer, which grows to the largest shape asked for."""
        numel = tokens * len(w_vD)
        held = self._buffers.get(buffer)
        if held is None or held.numel() < numel or held.device != w_vD.device:
            held = self._buffers[buffer] = w_vD.new_empty(numel)
        return held[:numel].view(tokens, -1)
