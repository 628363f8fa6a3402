"""The output projection and the cross-entropy, fused and chunked over tokens.

All logits of a micro-batch never exist together: each chunk's are computed, turned into their own
gradient in place, and used for all three GEMMs while they are there. So the forward returns the
gradient of its input as well, and the logits are computed once rather than twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megallama.autograd.linear import linear_dgrad, linear_wgrad
from megallama.spec.labels import IGNORE

#: Bytes of logits held at a time. On a CPU (2 cores, V=32,000, bf16) chunks below 1,000 tokens lose
#: more to the fp32 accumulation of the weight gradient than they gain in cache. On a GPU it is
#: 8,192 tokens at V=128k; chosen, not measured.
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 2 << 30}
#: Bytes of fp32 rows in the softmax at a time: within a CPU's last-level cache; on a GPU, enough
#: that launching costs little.
SOFTMAX_BYTES = {"cpu": 16 << 20, "cuda": 512 << 20}


class LinearCrossEntropy:
    """loss = cross-entropy(x·wᵀ, labels), with reused buffers for the logits.

    Buffers are kept because a fresh 64 MiB costs more in page faults than its GEMM takes.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def forward(self, x_TD: Tensor, w_VD: Tensor, labels_T: Tensor) -> Tensor:
        """Each token's loss (T,), zero where the label is IGNORE; fp32 or wider."""
        losses = []
        for x_cD, labels_c in self._chunks(x_TD, w_VD, labels_T):
            losses.append(self._loss(self._logits(x_cD, w_VD), labels_c, gradient=False))
        return torch.cat(losses)

    def forward_backward(
        self, x_TD: Tensor, w_VD: Tensor, labels_T: Tensor, dw_VD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the losses (T,) and dx (T, D) of their sum, and add into `dw_VD`."""
        losses, dx_TD = [], torch.empty_like(x_TD)
        outputs = dx_TD.split(self._chunk_length(x_TD, w_VD))
        chunks = self._chunks(x_TD, w_VD, labels_T)
        for (x_cD, labels_c), dx_cD in zip(chunks, outputs, strict=True):
            logits_cV = self._logits(x_cD, w_VD)
            losses.append(self._loss(logits_cV, labels_c, gradient=True))
            dx_cD.copy_(linear_dgrad(logits_cV, w_VD))
            linear_wgrad(logits_cV, x_cD, dw_VD)
        return torch.cat(losses), dx_TD

    def _chunks(self, x_TD: Tensor, w_VD: Tensor, labels_T: Tensor) -> zip[tuple[Tensor, Tensor]]:
        length = self._chunk_length(x_TD, w_VD)
        return zip(x_TD.split(length), labels_T.split(length), strict=True)

    def _chunk_length(self, x_TD: Tensor, w_VD: Tensor) -> int:
        """Tokens a chunk: as even as the budget allows."""
        budget = CHUNK_BYTES[x_TD.device.type] // (w_VD.shape[0] * x_TD.element_size())
        chunks = -(-len(x_TD) // max(1, budget))
        return -(-len(x_TD) // chunks)

    def _logits(self, x_cD: Tensor, w_VD: Tensor) -> Tensor:
        out = self._buffer("logits", (len(x_cD), w_VD.shape[0]), x_cD)
        return torch.mm(x_cD, w_VD.T, out=out)

    def _loss(self, logits_cV: Tensor, labels_c: Tensor, gradient: bool) -> Tensor:
        """Losses (c,); with `gradient` the logits become their own gradient."""
        budget = SOFTMAX_BYTES[logits_cV.device.type]
        rows = max(1, budget // (4 * logits_cV.shape[1]))
        pieces = zip(logits_cV.split(rows), labels_c.split(rows), strict=True)
        return torch.cat([self._loss_rows(*piece, gradient) for piece in pieces])

    def _loss_rows(self, logits_rV: Tensor, labels_r: Tensor, gradient: bool) -> Tensor:
        """With m the row's largest logit and p the softmax, log Σexp = m − log(max p)."""
        wide = torch.promote_types(logits_rV.dtype, torch.float32)
        valid_r = labels_r != IGNORE
        index_r1 = labels_r.where(valid_r, 0)[:, None]
        p_rV = self._buffer("softmax", logits_rV.shape, logits_rV, wide)
        target_r = logits_rV.gather(1, index_r1)[:, 0].to(wide)
        largest_r = logits_rV.amax(1).to(wide)
        torch.softmax(p_rV.copy_(logits_rV), dim=1, out=p_rV)
        loss_r = (largest_r - p_rV.amax(1).log_() - target_r).where(valid_r, 0.0)
        if gradient:
            p_rV.scatter_add_(1, index_r1, torch.full_like(index_r1, -1, dtype=wide))
            logits_rV.copy_(p_rV.mul_(valid_r[:, None]))
        return loss_r

    def _buffer(
        self, name: str, shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        """A view of the named buffer, which grows to the largest shape asked for."""
        numel = math.prod(shape)
        held = self._buffers.get(name)
        if held is None or held.numel() < numel or held.device != like.device:
            held = self._buffers[name] = like.new_empty(numel, dtype=dtype or like.dtype)
        return held[:numel].view(*shape)
