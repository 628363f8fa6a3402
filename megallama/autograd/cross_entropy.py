"""The output projection and the cross-entropy over a vocabulary shard, fused and chunked.

Shapes: T tokens, c the tokens of a chunk, r the rows of a piece; D model width; v this rank's share
of the vocabulary, padding included.

All logits of a micro-batch never exist together: each chunk's are computed, turned into their own
gradient in place, and used for all three GEMMs while they are there. So the forward returns the
gradient of its input as well, and the logits are computed once rather than twice. The softmax needs
two numbers of every token from the other tensor ranks; they travel under the next chunk's logits,
where there is a next chunk.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from megallama.autograd.linear import linear_dgrad, linear_wgrad
from megallama.autograd.passes import Pass
from megallama.dist.handle import Handle
from megallama.spec.labels import IGNORE
from megallama.spec.logits import CHUNK_BYTES, chunk_length

#: Bytes of fp32 rows in the softmax at a time: within a CPU's last-level cache; on a GPU, enough
#: that launching costs little.
SOFTMAX_BYTES = {"cpu": 16 << 20, "cuda": 512 << 20}


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
    """A chunk whose logits are there and whose statistics are on their way."""

    x_cD: Tensor
    labels_c: Tensor
    logits_cv: Tensor
    statistics: Handle[Tensor]


class LinearCrossEntropy:
    """loss = cross-entropy(x·wᵀ, labels), with reused buffers for the logits.

    Buffers are kept because a fresh 64 MiB costs more in page faults than its GEMM takes.
    """

    def __init__(self, vocab: VocabShard) -> None:
        self.vocab = vocab
        self._buffers: dict[str, Tensor] = {}

    def forward(self, x_TD: Tensor, w_vD: Tensor, labels_T: Tensor) -> Pass[Tensor]:
        """Each token's loss (T,), zero where the label is IGNORE; fp32 or wider."""
        losses: list[Tensor] = []

        def finish(chunk: _Chunk) -> Pass[None]:
            loss_c, _ = yield from self._combine(chunk)
            losses.append(loss_c)

        yield from self._each_chunk(x_TD, w_vD, labels_T, finish)
        return torch.cat(losses)

    def forward_backward(
        self, x_TD: Tensor, w_vD: Tensor, labels_T: Tensor, dw_vD: Tensor
    ) -> Pass[tuple[Tensor, Tensor, Wgrad]]:
        """Return the losses (T,) and this shard's part of the gradient (T, D) of their sum.

        The weight's gradient is added into `dw_vD`, that of the last chunk by what is returned
        third: it can hide what is done with the gradient.
        """
        losses: list[Tensor] = []
        wgrads: list[Wgrad] = []
        dx_TD = torch.empty_like(x_TD)
        pieces = dx_TD.split(self._chunk_length(x_TD, w_vD))
        outputs, chunks = iter(pieces), len(pieces)

        def finish(chunk: _Chunk) -> Pass[None]:
            loss_c, lse_c = yield from self._combine(chunk)
            losses.append(loss_c)
            dlogits_cv = self._to_gradient(chunk, lse_c)
            next(outputs).copy_(linear_dgrad(dlogits_cv, w_vD))
            wgrads.append(partial(linear_wgrad, dlogits_cv, chunk.x_cD, dw_vD))
            if len(losses) < chunks:
                wgrads.pop()()

        yield from self._each_chunk(x_TD, w_vD, labels_T, finish)
        return torch.cat(losses), dx_TD, wgrads.pop()

    def _each_chunk(
        self,
        x_TD: Tensor,
        w_vD: Tensor,
        labels_T: Tensor,
        finish: Callable[[_Chunk], Pass[None]],
    ) -> Pass[None]:
        """Start each chunk, and finish it after the next one's start where ranks are waited for."""
        ahead = 1 if self.vocab.ranks > 1 else 0
        length = self._chunk_length(x_TD, w_vD)
        started: deque[_Chunk] = deque()
        pieces = zip(x_TD.split(length), labels_T.split(length), strict=True)
        for index, (x_cD, labels_c) in enumerate(pieces):
            started.append(self._start(x_cD, w_vD, labels_c, f"logits {index % (ahead + 1)}"))
            if len(started) > ahead:
                yield from finish(started.popleft())
        while started:
            yield from finish(started.popleft())

    def _start(self, x_cD: Tensor, w_vD: Tensor, labels_c: Tensor, buffer: str) -> _Chunk:
        logits_cv = self._buffer(buffer, (len(x_cD), w_vD.shape[0]), x_cD)
        torch.mm(x_cD, w_vD.T, out=logits_cv)
        logits_cv[:, self.vocab.rows :] = -math.inf  # padding has no probability and no gradient
        statistics = self.vocab.gather(self._statistics(logits_cv, labels_c))
        return _Chunk(x_cD, labels_c, logits_cv, statistics)

    def _statistics(self, logits_cv: Tensor, labels_c: Tensor) -> Tensor:
        """This shard's log Σ exp of every token, then its target's logit, or 0: (1, 2c)."""
        pieces = zip(*self._pieces(logits_cv, labels_c), strict=True)
        log_sums, targets = zip(*(self._piece_statistics(*piece) for piece in pieces), strict=True)
        return torch.cat([*log_sums, *targets])[None]

    def _piece_statistics(self, logits_rv: Tensor, labels_r: Tensor) -> tuple[Tensor, Tensor]:
        p_rv = self._widened(logits_rv)
        index_r1, mine_r1 = self._target(labels_r)
        target_r = p_rv.gather(1, index_r1).where(mine_r1, 0.0)[:, 0]
        # A shard of nothing but padding has no largest logit.
        largest_r1 = p_rv.amax(1, keepdim=True).clamp_min_(torch.finfo(p_rv.dtype).min)
        sum_r = p_rv.sub_(largest_r1).exp_().sum(1)
        return largest_r1[:, 0] + sum_r.log_(), target_r

    def _combine(self, chunk: _Chunk) -> Pass[tuple[Tensor, Tensor]]:
        """The losses and the whole vocabulary's log Σ exp: (c,), (c,)."""
        statistics = yield chunk.statistics
        log_sums, targets = statistics.view(self.vocab.ranks, 2, -1).unbind(1)
        lse_c = log_sums.logsumexp(0)
        return (lse_c - targets.sum(0)).where(chunk.labels_c != IGNORE, 0.0), lse_c

    def _to_gradient(self, chunk: _Chunk, lse_c: Tensor) -> Tensor:
        """Turn the logits in place into the gradient softmax − one-hot, zero where ignored."""
        pieces = self._pieces(chunk.logits_cv, chunk.labels_c, lse_c)
        for logits_rv, labels_r, lse_r in zip(*pieces, strict=True):
            p_rv = self._widened(logits_rv).sub_(lse_r[:, None]).exp_()
            index_r1, mine_r1 = self._target(labels_r)
            p_rv.scatter_add_(1, index_r1, mine_r1.to(p_rv.dtype).neg_())
            logits_rv.copy_(p_rv.mul_((labels_r != IGNORE)[:, None]))
        return chunk.logits_cv

    def _target(self, labels_r: Tensor) -> tuple[Tensor, Tensor]:
        """The label's column of this shard, 0 where it is elsewhere; whether it is here: (r, 1)."""
        column_r1 = labels_r[:, None] - self.vocab.first
        mine_r1 = (column_r1 >= 0) & (column_r1 < self.vocab.rows)
        return column_r1.where(mine_r1, 0), mine_r1

    def _widened(self, logits_rv: Tensor) -> Tensor:
        wide = torch.promote_types(logits_rv.dtype, torch.float32)
        return self._buffer("softmax", logits_rv.shape, logits_rv, wide).copy_(logits_rv)

    def _pieces(self, logits_cv: Tensor, *others: Tensor) -> list[Sequence[Tensor]]:
        """Tensors with a row a token, cut into pieces that fit the softmax's buffer."""
        budget = SOFTMAX_BYTES[logits_cv.device.type]
        rows = max(1, budget // (4 * logits_cv.shape[1]))
        return [x.split(rows) for x in (logits_cv, *others)]

    def _chunk_length(self, x_TD: Tensor, w_vD: Tensor) -> int:
        budget = CHUNK_BYTES[x_TD.device.type]
        return chunk_length(len(x_TD), w_vD.shape[0], x_TD.element_size(), budget)

    def _buffer(
        self, name: str, shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        """A view of the named buffer, which grows to the largest shape asked for."""
        numel = math.prod(shape)
        held = self._buffers.get(name)
        if held is None or held.numel() < numel or held.device != like.device:
            held = self._buffers[name] = like.new_empty(numel, dtype=dtype or like.dtype)
        return held[:numel].view(*shape)
