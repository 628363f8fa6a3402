"""The decoder layer: its forward pass, and the backward pass that mirrors it.

Shapes: T tokens of the micro-batch, t the tokens of this rank's sequence shard; D model width;
h this rank's share of the (H + 2K)·E columns of the query-key-value projection, H query heads,
K key/value heads, E head width; f this rank's share of the feed-forward width F.

    n1 = norm(x)      qkv = n1·Wqkvᵀ, rotated     o = attention(qkv)     x2 = x + o·Woᵀ
    n2 = norm(x2)     gate, up = n2·W13ᵀ          act = silu(gate)·up    z = x2 + act·W2ᵀ

Of these the policy says which are saved (`megallama.spec.saved`); the backward recomputes the rest
with the forward's own steps, so every policy gives the same bits. Each collective is started where
its operand is ready and yielded where its result is needed; what stands between the two hides it.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megallama.autograd.attention import attention_backward, attention_forward
from megallama.autograd.passes import Pass, WgradQueue
from megallama.autograd.protocols import Linear, Norm
from megallama.autograd.rope import Rotation, rope_backward, rope_forward
from megallama.autograd.segments import Segments
from megallama.autograd.stash import Saved, Stash
from megallama.autograd.swiglu import swiglu_backward, swiglu_forward
from megallama.dist.handle import Done


@dataclass(frozen=True)
class Positions:
    """Where a micro-batch's tokens stand: their rotations, and the segments they attend within."""

    rotation: Rotation
    segments: Segments


@dataclass(frozen=True)
class Heads:
    """This rank's query heads, key/value heads, and the width of each."""

    queries: int
    keys: int
    width: int

    def split(self, qkv_Th: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of the fused projection: q (T, H, E), k and v (T, K, E)."""
        heads = qkv_Th.unflatten(-1, (-1, self.width))
        q, k, v = heads.split((self.queries, self.keys, self.keys), dim=1)
        return q, k, v

    def rotated(self, qkv_Th: Tensor) -> Tensor:
        """A view of the heads that carry positions: queries and keys together."""
        return qkv_Th.unflatten(-1, (-1, self.width))[:, : self.queries + self.keys]


class DecoderLayer:
    """One layer's passes over the linears and norms that it is given."""

    def __init__(
        self,
        heads: Heads,
        attention: tuple[Norm, Linear, Linear],
        feed_forward: tuple[Norm, Linear, Linear],
        saves: frozenset[str],
    ) -> None:
        self.heads = heads
        self.norm1, self.wqkv, self.wo = attention
        self.norm2, self.w13, self.w2 = feed_forward
        self.saves = saves

    def forward(
        self, x_tD: Tensor, positions: Positions, stash: Stash | None, key: Hashable
    ) -> Pass[Tensor]:
        """Return the layer's output (t, D). Without a stash nothing is saved: evaluation."""
        n1_tD = self.norm1.forward(x_tD, (yield self.norm1.weight()))
        qkv_Th = yield from self._project_qkv(n1_tD, positions)
        o_Th, lse_TH = self._attend(qkv_Th, positions)
        x2_tD = yield from self._project_out(o_Th, x_tD)
        n2_tD = self.norm2.forward(x2_tD, (yield self.norm2.weight()))
        gate_up_Tf = yield from self._project_up(n2_tD)
        z_tD = yield from self._project_down(swiglu_forward(gate_up_Tf), x2_tD)
        if stash is not None:
            saved = dict(x=x_tD, n1=n1_tD, qkv=qkv_Th, o=o_Th, lse=lse_TH)
            saved |= dict(x2=x2_tD, n2=n2_tD, gate_up=gate_up_Tf)
            stash.put(key, {name: t for name, t in saved.items() if name in self.saves})
        return z_tD

    def backward(
        self, dz_tD: Tensor, positions: Positions, saved: Saved, queue: WgradQueue
    ) -> Pass[Tensor]:
        """Return dx (t, D); weight gradients go to the queue."""
        yield from self._restore(saved, positions)
        dx2_tD = yield from self._feed_forward_backward(dz_tD, saved, queue)
        return (yield from self._attention_backward(dx2_tD, positions, saved, queue))

    # The forward's steps, which a recomputing backward takes again.

    def _project_qkv(self, n1_tD: Tensor, positions: Positions) -> Pass[Tensor]:
        n1_TD = yield self.wqkv.gather(n1_tD)
        qkv_Th = self.wqkv.forward(n1_TD, (yield self.wqkv.weight()))
        rope_forward(self.heads.rotated(qkv_Th), positions.rotation)
        return qkv_Th

    def _attend(self, qkv_Th: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        o_THE, lse_TH = attention_forward(*self.heads.split(qkv_Th), positions.segments)
        return o_THE.flatten(1), lse_TH

    def _project_out(self, o_Th: Tensor, x_tD: Tensor) -> Pass[Tensor]:
        out_TD = self.wo.forward(o_Th, (yield self.wo.weight()))
        return (yield self.wo.scatter(out_TD)).add_(x_tD)

    def _project_up(self, n2_tD: Tensor) -> Pass[Tensor]:
        n2_TD = yield self.w13.gather(n2_tD)
        return self.w13.forward(n2_TD, (yield self.w13.weight()))

    def _project_down(self, act_Tf: Tensor, x2_tD: Tensor) -> Pass[Tensor]:
        out_TD = self.w2.forward(act_Tf, (yield self.w2.weight()))
        return (yield self.w2.scatter(out_TD)).add_(x2_tD)

    # The backward.

    def _restore(self, saved: Saved, positions: Positions) -> Pass[None]:
        """Recompute what the attention half did not save."""
        if "qkv" not in saved:
            n1_tD = self.norm1.forward(saved["x"], (yield self.norm1.weight()))
            saved["qkv"] = yield from self._project_qkv(n1_tD, positions)
        if "o" not in saved:
            saved["o"], saved["lse"] = self._attend(saved["qkv"], positions)
        if "x2" not in saved:
            saved["x2"] = yield from self._project_out(saved["o"], saved["x"])

    def _feed_forward_backward(
        self, dz_tD: Tensor, saved: Saved, queue: WgradQueue
    ) -> Pass[Tensor]:
        dz = self.w2.gather(dz_tD)
        x2_tD, norm_w = saved.pop("x2"), (yield self.norm2.weight())
        n2_tD = saved.pop("n2") if "n2" in saved else self.norm2.forward(x2_tD, norm_w)
        n2 = self.w13.gather(n2_tD)
        dz_TD = yield dz
        dact_Tf = self.w2.dgrad(dz_TD, (yield self.w2.weight()))
        w13 = yield self.w13.weight()
        if "gate_up" in saved:
            gate_up_Tf = saved.pop("gate_up")
        else:
            n2_TD = yield n2
            n2 = Done(n2_TD)  # a handle is waited for once
            gate_up_Tf = self.w13.forward(n2_TD, w13)
        dgate_up_Tf, act_Tf = swiglu_backward(dact_Tf, gate_up_Tf)
        dn2 = self.w13.scatter(self.w13.dgrad(dgate_up_Tf, w13))
        n2_TD = yield n2
        queue.defer(partial(self.w2.wgrad, dz_TD, act_Tf))
        queue.defer(partial(self.w13.wgrad, dgate_up_Tf, n2_TD))
        del dact_Tf, gate_up_Tf, act_Tf, dgate_up_Tf
        return self.norm2.backward((yield dn2), x2_tD, norm_w).add_(dz_tD)

    def _attention_backward(
        self, dx2_tD: Tensor, positions: Positions, saved: Saved, queue: WgradQueue
    ) -> Pass[Tensor]:
        dx2 = self.wo.gather(dx2_tD)
        x_tD, norm_w = saved.pop("x"), (yield self.norm1.weight())
        n1_tD = saved.pop("n1") if "n1" in saved else self.norm1.forward(x_tD, norm_w)
        n1 = self.wqkv.gather(n1_tD)
        dx2_TD = yield dx2
        do_Th = self.wo.dgrad(dx2_TD, (yield self.wo.weight()))
        o_Th = saved["o"]
        dqkv_Th = self._attend_backward(do_Th, positions, saved)
        dn1 = self.wqkv.scatter(self.wqkv.dgrad(dqkv_Th, (yield self.wqkv.weight())))
        n1_TD = yield n1
        queue.defer(partial(self.wo.wgrad, dx2_TD, o_Th))
        queue.defer(partial(self.wqkv.wgrad, dqkv_Th, n1_TD))
        del do_Th, dqkv_Th, o_Th
        return self.norm1.backward((yield dn1), x_tD, norm_w).add_(dx2_tD)

    def _attend_backward(self, do_Th: Tensor, positions: Positions, saved: Saved) -> Tensor:
        """Return the gradient of the projection's output, before the rotation (T, h)."""
        qkv_Th, width = saved.pop("qkv"), self.heads.width
        gradients = attention_backward(
            do_Th.unflatten(-1, (-1, width)),
            self.heads.split(qkv_Th),
            saved.pop("o").unflatten(-1, (-1, width)),
            saved.pop("lse"),
            positions.segments,
        )
        dqkv_Th = torch.empty_like(qkv_Th)
        dq, dk, dv = self.heads.split(dqkv_Th)
        rope_backward(gradients[0], positions.rotation, out=dq)
        rope_backward(gradients[1], positions.rotation, out=dk)
        dv.copy_(gradients[2])
        return dqkv_Th
