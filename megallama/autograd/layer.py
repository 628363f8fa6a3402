"""The decoder layer: its forward pass, and the backward pass that mirrors it.

Shapes: T tokens of the micro-batch, t the tokens of this rank's sequence shard, c a chunk of
either; D model width; h this rank's share of the (H + 2K)·E columns of the query-key-value
projection, H query heads, K key/value heads, E head width; f this rank's share of the feed-forward
width F.

    n1 = norm(x)      qkv = n1·Wqkvᵀ, rotated     o = attention(qkv)     x2 = x + o·Woᵀ
    n2 = norm(x2)     gate, up = n2·W13ᵀ          act = silu(gate)·up    z = x2 + act·W2ᵀ

Of these the policy says which are saved (`megallama.spec.saved`); the backward recomputes the rest
with the forward's own steps, so every policy gives the same bits. Each collective is started where
its operand is ready and yielded where its result is needed; what stands between the two hides it.

The forward takes the tokens in one chunk or two. Attention needs all of them; everything from Wo to
the next layer's Wqkv is done chunk by chunk, and with two chunks one's collectives run under the
other's GEMMs. So a layer hands on passes that are not finished: a `Filling`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count

import torch
from torch import Tensor

from megallama.autograd.attention import attention_backward, attention_forward
from megallama.autograd.filling import Fill, Filling, Sum, fill_all, fill_and_normalise, filled
from megallama.autograd.passes import PAUSE, Pass, WgradQueue, in_turns
from megallama.autograd.protocols import Linear, Norm, Tokens
from megallama.autograd.rotation import Rotation
from megallama.autograd.segments import Segments
from megallama.autograd.stash import Saved, Stash
from megallama.dist.handle import Covered, Done, Handle
from megallama.kernels.rope import rope_backward, rope_forward
from megallama.kernels.swiglu import swiglu_backward, swiglu_forward


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
        tokens: Tokens,
        attention: tuple[Norm, Linear, Linear],
        feed_forward: tuple[Norm, Linear, Linear],
        saves: frozenset[str],
    ) -> None:
        self.heads, self.tokens = heads, tokens
        self.norm1, self.wqkv, self.wo = attention
        self.norm2, self.w13, self.w2 = feed_forward
        self.saves = saves

    def forward(
        self, x: Filling, positions: Positions, stash: Stash | None, key: Hashable
    ) -> Pass[Filling]:
        """Return the layer's output. Without a stash nothing is saved: evaluation."""
        x_tD = x.x_tD
        saves = self.saves if stash is not None else frozenset()
        n1_tD = torch.empty_like(x_tD) if "n1" in saves else None
        n2_tD = torch.empty_like(x_tD) if "n2" in saves else None
        qkv_Th = yield from self._project_qkv(x_tD, x.passes, n1_tD, positions)
        o_Th, lse_TH = self._attend(qkv_Th, positions)
        x2_tD, z_tD = torch.empty_like(x_tD), torch.empty_like(x_tD)
        w13_fD = yield self.w13.weight()
        gate_up_Tf = qkv_Th.new_empty(len(qkv_Th), len(w13_fD)) if "gate_up" in saves else None
        residuals = yield from self._project_out(o_Th, x_tD)
        passes = yield from self._feed_forward(residuals, x2_tD, n2_tD, gate_up_Tf)
        if stash is not None:
            saved = dict(x=x_tD, n1=n1_tD, qkv=qkv_Th, o=o_Th, lse=lse_TH)
            saved |= dict(x2=x2_tD, n2=n2_tD, gate_up=gate_up_Tf)
            stash.put(key, {n: t for n, t in saved.items() if n in saves and t is not None})
        return Filling(z_tD, passes)

    def backward(
        self, dz_tD: Tensor, positions: Positions, saved: Saved, wgrads: WgradQueue | Saved
    ) -> Pass[Tensor]:
        """Return dx (t, D).

        `wgrads`: a queue, to which the weight gradients go, or an empty dict, which becomes what
        `backward_weights` needs to make them later (`megallama.spec.saved.WEIGHT_STATE`).
        """
        yield from self._restore(saved, positions)
        dx2_tD = yield from self._feed_forward_backward(dz_tD, saved, wgrads)
        return (yield from self._attention_backward(dx2_tD, positions, saved, wgrads))

    def backward_weights(self, state: Saved) -> Pass[None]:
        """Add the weight gradients of a backward that left them.

        The state is this rank's shards: whole tensors would be four times the residual stream, kept
        from B to W. Each gather is started a GEMM before it is needed.
        """
        dz, n2 = self.tokens.gather(state.pop("dz")), self.tokens.gather(state.pop("n2"))
        self.w2.wgrad((yield dz), state.pop("act"))
        n2_TD, dgate_up_Tf = (yield n2), state.pop("dgate_up")
        del dz, n2  # a handle keeps its value
        dx2 = self.tokens.gather(state.pop("dx2"))
        self.w13.wgrad(dgate_up_Tf, n2_TD, part=0, parts=2)
        n1 = self.tokens.gather(state.pop("n1"))
        self.w13.wgrad(dgate_up_Tf, n2_TD, part=1, parts=2)
        del n2_TD, dgate_up_Tf
        self.wo.wgrad((yield dx2), state.pop("o"))
        del dx2
        self.wqkv.wgrad(state.pop("dqkv"), (yield n1))

    # The forward's steps. Those up to attention, a recomputing backward takes again.

    def _project_qkv(
        self,
        x_tD: Tensor,
        before: Sequence[Fill],
        n1_tD: Tensor | None,
        positions: Positions,
    ) -> Pass[Tensor]:
        """qkv (T, h), once the passes `before` have filled x; n1 is kept where asked for."""
        norm_w, w_hD = (yield self.norm1.weight()), (yield self.wqkv.weight())
        qkv_Th = x_tD.new_empty(self.tokens.whole_rows(len(x_tD)), len(w_hD))

        def chunk(fill: Fill, x_cD: Tensor, n1_cD: Tensor | None, qkv_ch: Tensor) -> Pass[None]:
            n_cD = yield from fill_and_normalise(fill, x_cD, self.norm1, norm_w)
            if n1_cD is not None:
                n1_cD.copy_(n_cD)
            self.wqkv.forward((yield self.tokens.gather_chunk(n_cD)), w_hD, out=qkv_ch)

        pieces = zip(before, *map(self._chunks, (x_tD, n1_tD, qkv_Th)), strict=True)
        yield from in_turns([chunk(*piece) for piece in pieces])
        rope_forward(self.heads.rotated(qkv_Th), *positions.rotation)
        return qkv_Th

    def _attend(self, qkv_Th: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        o_THE, lse_TH = attention_forward(*self.heads.split(qkv_Th), positions.segments)
        return o_THE.flatten(1), lse_TH

    def _project_out(self, o_Th: Tensor, x_tD: Tensor) -> Pass[Sequence[Fill]]:
        """Passes that fill the chunks of x2."""
        w_Dh = yield self.wo.weight()

        def chunk(index: int, o_ch: Tensor, x_cD: Tensor) -> Fill:
            out_CD = self.wo.forward(o_ch, w_Dh)
            if index:
                # The first chunk's all-gather goes before this reduce-scatter. From here on the
                # second chunk is a turn behind: one computes while the other communicates.
                yield PAUSE
            return Sum(x_cD, (yield self.tokens.scatter_chunk(out_CD)))

        pieces = zip(count(), *map(self.tokens.split, (o_Th, x_tD)), strict=False)
        return [chunk(*piece) for piece in pieces]

    def _feed_forward(
        self,
        before: Sequence[Fill],
        x2_tD: Tensor,
        n2_tD: Tensor | None,
        gate_up_Tf: Tensor | None,
    ) -> Pass[Sequence[Fill]]:
        """Passes that fill the chunks of z, each after the one before that fills x2.

        n2 and gate_up are kept where there is room for them.
        """
        norm_w = yield self.norm2.weight()
        w13_fD, w2_Df = (yield self.w13.weight()), (yield self.w2.weight())

        def chunk(fill: Fill, x2_cD: Tensor, n2_cD: Tensor | None, kept_Cf: Tensor | None) -> Fill:
            n_cD = yield from fill_and_normalise(fill, x2_cD, self.norm2, norm_w)
            if n2_cD is not None:
                n2_cD.copy_(n_cD)
            n_CD = yield self.tokens.gather_chunk(n_cD)
            gate_up_Cf = self.w13.forward(n_CD, w13_fD, out=kept_Cf)
            yield PAUSE  # the other chunk's norm and the start of its all-gather fit in here
            out_CD = self.w2.forward(swiglu_forward(gate_up_Cf), w2_Df)
            del n_CD, gate_up_Cf
            return Sum(x2_cD, (yield self.tokens.scatter_chunk(out_CD)))

        pieces = zip(before, *map(self._chunks, (x2_tD, n2_tD, gate_up_Tf)), strict=True)
        return [chunk(*piece) for piece in pieces]

    def _chunks(self, x: Tensor | None) -> Sequence[Tensor | None]:
        return [None] * self.tokens.chunks if x is None else self.tokens.split(x)

    # The backward.

    def _restore(self, saved: Saved, positions: Positions) -> Pass[None]:
        """Recompute what the attention half did not save."""
        if "qkv" not in saved:
            x = filled(saved["x"], self.tokens.chunks)
            saved["qkv"] = yield from self._project_qkv(x.x_tD, x.passes, None, positions)
        if "o" not in saved:
            saved["o"], saved["lse"] = self._attend(saved["qkv"], positions)
        if "x2" not in saved:
            x2_tD = torch.empty_like(saved["x"])
            passes = yield from self._project_out(saved["o"], saved["x"])
            saved["x2"] = yield from fill_all(Filling(x2_tD, passes))

    def _feed_forward_backward(
        self, dz_tD: Tensor, saved: Saved, wgrads: WgradQueue | Saved
    ) -> Pass[Tensor]:
        dz = self.tokens.gather(dz_tD)
        x2_tD, norm_w = saved.pop("x2"), (yield self.norm2.weight())
        n2_tD = saved.pop("n2") if "n2" in saved else self.norm2.forward(x2_tD, norm_w)
        n2: Handle[Tensor] = Done(n2_tD)
        if isinstance(wgrads, WgradQueue) or "gate_up" not in saved:
            n2 = self.tokens.gather(n2_tD)
        dz_TD = yield dz
        del dz  # a handle keeps its value
        dact_Tf = self.w2.dgrad(dz_TD, (yield self.w2.weight()))
        w13 = yield self.w13.weight()
        if "gate_up" in saved:
            gate_up_Tf = saved.pop("gate_up")
        else:
            n2_TD = yield n2
            n2 = Done(n2_TD)  # a handle is waited for once
            gate_up_Tf = n2_TD.new_empty(len(n2_TD), len(w13))
            pieces = zip(self.tokens.split(n2_TD), self.tokens.split(gate_up_Tf), strict=True)
            for n2_CD, gate_up_Cf in pieces:  # the forward's own GEMMs, bit for bit
                self.w13.forward(n2_CD, w13, out=gate_up_Cf)
        dgate_up_Tf, act_Tf = swiglu_backward(dact_Tf, gate_up_Tf, out=gate_up_Tf, act=dact_Tf)
        dn2 = self.tokens.scatter(self.w13.dgrad(dgate_up_Tf, w13))
        if isinstance(wgrads, WgradQueue):
            n2_TD = yield Covered(n2)
            wgrads.defer(partial(self.w2.wgrad, dz_TD, act_Tf))
            wgrads.defer(partial(self.w13.wgrad, dgate_up_Tf, n2_TD, part=0, parts=2))
            wgrads.defer(partial(self.w13.wgrad, dgate_up_Tf, n2_TD, part=1, parts=2))
        else:
            wgrads.update(dz=dz_tD, act=act_Tf, dgate_up=dgate_up_Tf, n2=n2_tD)
        del dz_TD, n2, dact_Tf, gate_up_Tf, act_Tf, dgate_up_Tf
        return self.norm2.backward((yield dn2), x2_tD, norm_w, residual=dz_tD)

    def _attention_backward(
        self, dx2_tD: Tensor, positions: Positions, saved: Saved, wgrads: WgradQueue | Saved
    ) -> Pass[Tensor]:
        dx2 = self.tokens.gather(dx2_tD)
        x_tD, norm_w = saved.pop("x"), (yield self.norm1.weight())
        n1_tD = saved.pop("n1") if "n1" in saved else self.norm1.forward(x_tD, norm_w)
        joined = isinstance(wgrads, WgradQueue)
        n1 = self.tokens.gather(n1_tD) if joined else Done(n1_tD)
        dx2_TD = yield dx2
        del dx2
        do_Th = self.wo.dgrad(dx2_TD, (yield self.wo.weight()))
        o_Th = saved["o"]
        dqkv_Th = self._attend_backward(do_Th, positions, saved)
        dn1 = self.tokens.scatter(self.wqkv.dgrad(dqkv_Th, (yield self.wqkv.weight())))
        if isinstance(wgrads, WgradQueue):
            n1_TD = yield Covered(n1)
            pair = partial(self.wo.wgrad, dx2_TD, o_Th), partial(self.wqkv.wgrad, dqkv_Th, n1_TD)
            wgrads.defer(partial(_run, *pair))  # about as long as each of the three pieces above
            del pair
        else:
            wgrads.update(dx2=dx2_tD, o=o_Th, dqkv=dqkv_Th, n1=n1_tD)
        del dx2_TD, n1, do_Th, dqkv_Th, o_Th
        return self.norm1.backward((yield dn1), x_tD, norm_w, residual=dx2_tD)

    def _attend_backward(self, do_Th: Tensor, positions: Positions, saved: Saved) -> Tensor:
        """Return the gradient of the projection's output, before the rotation (T, h)."""
        qkv_Th, width = saved.pop("qkv"), self.heads.width
        dqkv_Th = torch.empty_like(qkv_Th)
        attention_backward(
            do_Th.unflatten(-1, (-1, width)),
            self.heads.split(qkv_Th),
            saved.pop("o").unflatten(-1, (-1, width)),
            saved.pop("lse"),
            positions.segments,
            out=self.heads.split(dqkv_Th),
        )
        rope_backward(self.heads.rotated(dqkv_Th), *positions.rotation)
        return dqkv_Th


def _run(*wgrads: Callable[[], None]) -> None:
    for wgrad in wgrads:
        wgrad()
