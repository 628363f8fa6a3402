"""What is alive besides the saved sets, at the moments of a step that can be its worst.

A moment is a point of one layer's pass (or the head's, or the embedding's). Its row names every
tensor that this pass has there; what the policy saved and has not been used up is there as well.
Names are those of `autograd.layer`; `whole n2` is n2 gathered from the tensor ranks, `part dn2` a
rank's part of a sum that is scattered as dn2.
"""

from __future__ import annotations

from dataclasses import dataclass

from megallama.config.schema import Config
from megallama.spec.grid import Grid
from megallama.spec.saved import POLICIES
from megallama.spec.shards import vocab_rows

#: Bytes in which a CPU thread packs the operands of a 16-bit weight gradient
#: (`kernels.linear_wgrad.SCRATCH`: words for each of the two).
WGRAD_SCRATCH = 2 * (5 << 16) * 4


@dataclass(frozen=True)
class Device:
    """What kernels' scratch depends on: `type`, cpu or cuda, and a CPU's threads."""

    type: str = "cpu"
    threads: int = 1


@dataclass(frozen=True)
class Moment:
    """`alive`: what the pass has; `gone`: what the layer had saved, and is freed by then;
    `again`: what it has where W13's forward is made again."""

    name: str
    alive: str
    gone: str = ""
    again: str = ""


#: A layer's forward; from its second half on, because attention takes less. z is in the making.
FORWARD = (Moment("W2's forward", "x2, n2, whole n2, gate_up, act, z, part z"),)

#: The backward with B and W joined, weight gradients put off to the next waits. SwiGLU's gradient
#: takes gate_up's memory, and act that of its own gradient. dz, the gradient that the layer was
#: given, lives to the layer's end.
JOINED = (
    Moment(
        "W13's dgrad",
        "x, lse, qkv, o, x2, n2, whole n2, dz, whole dz, gate_up, act, dn2, part dn2",
    ),
    Moment(
        "W2's wgrad",
        "x, lse, qkv, o, x2, n2, whole n2, dz, whole dz, gate_up, act, dn2, part dn2,"
        " scratch of the wgrad",
    ),
    Moment(
        "attention's backward",
        "x, lse, qkv, o, dz, whole n2, gate_up, dx2, whole dx2, n1, whole n1, do, dqkv,"
        " copies of dqkv, scratch of attention",
        gone="x2, n2",
    ),
    Moment(
        "W13's wgrad",
        "x, lse, qkv, o, dz, whole n2, gate_up, dx2, whole dx2, n1, whole n1, scratch of the wgrad",
        gone="x2, n2",
    ),
    Moment(
        "W13's wgrad, second half",
        "x, o, dz, whole n2, gate_up, dx2, whole dx2, n1, whole n1, dqkv, dn1, part dn1,"
        " scratch of the wgrad",
        gone="x2, n2, lse, qkv",
    ),
)

#: As above in the layer below, while the last weight gradients of the layer above are made.
BELOW = Moment(
    "Wqkv's wgrad, in the layer below",
    "x, lse, qkv, o, x2, n2, whole n2, dz, whole dz,"
    " above: whole dx2, above: o, above: dqkv, above: whole n1, scratch of the wgrad",
)

#: The same with `parallel.overlap: none`: every weight gradient is made where its operands are.
AT_ONCE = (
    Moment(
        "W13's dgrad",
        "x, lse, qkv, o, x2, n2, whole n2, dz, whole dz, gate_up, act, dn2, part dn2",
    ),
    Moment(
        "W2's wgrad",
        "x, lse, qkv, o, x2, n2, whole n2, dz, whole dz, gate_up, act, dn2, scratch of the wgrad",
    ),
    Moment(
        "attention's backward",
        "x, lse, qkv, o, dz, dx2, whole dx2, n1, whole n1, do, dqkv,"
        " copies of dqkv, scratch of attention",
        gone="x2, n2, gate_up",
    ),
    Moment(
        "Wqkv's wgrad",
        "x, o, dz, dx2, whole dx2, n1, whole n1, do, dqkv, dn1, scratch of the wgrad",
        gone="x2, n2, gate_up, lse, qkv",
    ),
)

#: B alone. What it leaves for W so far (dz, act, dgate_up in gate_up's memory, n2) is named here,
#: and not counted with the states.
SPLIT = (
    Moment(
        "W13's dgrad",
        "x, lse, qkv, o, x2, n2, dz, whole dz, gate_up, act, dn2, part dn2",
        again="whole n2",
    ),
    Moment(
        "attention's backward",
        "x, lse, qkv, o, dz, act, gate_up, n2, dx2, whole dx2, n1, do, dqkv,"
        " copies of dqkv, scratch of attention",
        gone="x2",
    ),
)

#: W alone: a layer's state and what it gathers.
WEIGHTS = (
    Moment(
        "W2's wgrad",
        "dz, act, dgate_up, n2, dx2, o, dqkv, n1, whole dz, whole n2, scratch of the wgrad",
    ),
    Moment(
        "W13's wgrad",
        "dgate_up, whole n2, dx2, whole dx2, o, dqkv, n1, whole n1, scratch of the wgrad",
    ),
    Moment("Wqkv's wgrad", "dx2, whole dx2, o, dqkv, n1, whole n1, scratch of the wgrad"),
)
#: Where a W is that fills the waits of a B, at each moment of SPLIT: each has four waits a layer.
BESIDE = (WEIGHTS[0], WEIGHTS[2])

#: The output projection with the loss; the logits are a buffer of their own.
HEAD = (
    Moment("the loss", "x, whole n, part dn, dn, loss, scratch of the loss"),
    Moment("the output's wgrad", "x, whole n, part dn, dn, loss, scratch of the wgrad"),
)
EMBEDDING = (Moment("the embedding's backward", "dx, whole dx, masked dx"),)


class Workspaces:
    """The bytes of every tensor that the rows name, of one rank of a grid."""

    def __init__(self, config: Config, grid: Grid, itemsize: int, device: Device) -> None:
        model, train, parallel = config.model, config.train, config.parallel
        tensor, wide = grid.tensor, max(itemsize, 4)
        tokens = train.micro_batch * train.sequence_length
        #: A gather makes a new tensor; a sum over tensor ranks does.
        self._gathers = parallel.sequence_parallel and tensor > 1
        self._scatters = tensor > 1 or not parallel.sequence_parallel
        self._policy = POLICIES[train.saved_activations]
        self.whole = tokens * model.d_model * itemsize
        self.stream = self.whole // tensor if parallel.sequence_parallel else self.whole
        heads, kv_heads = model.heads // tensor, max(1, model.kv_heads // tensor)
        o, kv = (tokens * n * model.head_width * itemsize for n in (heads, kv_heads))
        threads = device.threads if device.type == "cpu" else 0
        scratch = 0 if threads else o // itemsize * 4 + (2 * o if kv < o else 0)
        act = tokens * model.ffn // tensor * itemsize
        v_rows = vocab_rows(model.vocab, tensor)
        self._sizes = {
            **dict.fromkeys(("qkv", "dqkv"), o + 2 * kv),
            **dict.fromkeys(("o", "do"), o),
            "lse": tokens * heads * wide,
            "act": act,
            **dict.fromkeys(("gate_up", "dgate_up"), 2 * act),
            "loss": tokens * wide,
            # On a CPU a thread works in a row of wide logits, and packs a wgrad's operands.
            "scratch of the loss": min(threads, tokens) * v_rows * wide,
            "scratch of the wgrad": threads * WGRAD_SCRATCH if itemsize < wide else 0,
            # PyTorch's CUDA kernel returns new tensors, which are copied to where they belong;
            # flash-attn's writes there at once, but whether it is installed is not known here.
            "copies of dqkv": o + 2 * kv if device.type == "cuda" else 0,
            # The CUDA kernels sum dq in fp32, and dk and dv of grouped heads head by head.
            "scratch of attention": scratch,
            "masked dx": tokens * model.d_model * wide,
        }

    def layer(self, moment: Moment) -> dict[str, int]:
        """What a layer has at a moment of its passes, its own saved set included."""
        names = _names(moment.alive) | (self._policy - _names(moment.gone))
        return self._bytes(names if "gate_up" in self._policy else names | _names(moment.again))

    def apart(self, moment: Moment) -> dict[str, int]:
        """What there is at a moment of the head, the embedding or a W."""
        return self._bytes(_names(moment.alive))

    def _bytes(self, names: set[str]) -> dict[str, int]:
        return {name: self._size(name) for name in sorted({self._tensor(name) for name in names})}

    def _tensor(self, name: str) -> str:
        """A gathered tensor is the shard itself where there is nothing to gather."""
        if not self._gathers:
            name = name.replace("whole ", "")
        return name if self._scatters else name.replace("part ", "")

    def _size(self, name: str) -> int:
        name = name.removeprefix("above: ")
        if name.startswith(("whole ", "part ")):
            return self.whole
        return self._sizes.get(name, self.stream)


def _names(text: str) -> set[str]:
    return set(text.split(", ")) if text else set()
