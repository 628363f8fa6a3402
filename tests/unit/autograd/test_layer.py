"""The order of a layer's work: DESIGN §4's table of what hides under what.

The layer is given linears, norms, tokens and a queue that log. `start` and `wait` are a
collective's two ends; what is logged between them runs while it is in flight. F, B and W are a
forward, a backward for activations and a backward for weights; with two chunks of tokens, what
works on one of them has its number at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from megallama.autograd import layer as module
from megallama.autograd.filling import fill_all, filled
from megallama.autograd.layer import DecoderLayer, Heads, Positions
from megallama.autograd.linear import linear_dgrad, linear_forward, linear_wgrad
from megallama.autograd.passes import Pass, WgradQueue, drive
from megallama.autograd.rotation import rope_frequencies, rotation_at
from megallama.autograd.segments import Segments
from megallama.autograd.stash import Saved, Stash
from megallama.dist.handle import Done
from megallama.kernels.rms_norm import add_rms_norm_forward, rms_norm_backward, rms_norm_forward
from megallama.kernels.swiglu import swiglu_forward
from megallama.spec.saved import POLICIES
from tests.unit.autograd.pairs import random

HEADS = Heads(queries=4, keys=2, width=4)
D, F, T = 16, 6, 6


def marked(x: Tensor, name: str, like: Tensor | None = None) -> Tensor:
    """x with the name that its collective gets, and the number of the chunk that `like` is of."""
    x.role = name  # type: ignore[attr-defined]
    x.chunk_number = getattr(like, "chunk_number", "")  # type: ignore[attr-defined]
    return x


def chunk_of(x: Tensor) -> str:
    return getattr(x, "chunk_number", "")


@dataclass
class Recorded:
    """A collective in flight."""

    log: list[str]
    name: str
    value: Tensor
    cover: int = 1

    def __post_init__(self) -> None:
        self.log.append(f"start {self.name}")

    def wait(self) -> Tensor:
        self.log.append(f"wait {self.name}")
        return self.value


class RecordedTokens:
    """One process that logs its collectives by the names of what they gather or scatter."""

    def __init__(self, log: list[str], chunks: int) -> None:
        self.log, self.chunks = log, chunks

    def whole_rows(self, t: int) -> int:
        return t

    def split(self, x: Tensor) -> Sequence[Tensor]:
        pieces = x.chunk(self.chunks)
        for number, piece in enumerate(pieces):
            if self.chunks > 1:
                piece.chunk_number = f" {number}"  # type: ignore[attr-defined]
        return pieces

    def gather_chunk(self, x: Tensor) -> Recorded:
        return Recorded(self.log, f"gather {x.role}{chunk_of(x)}", x)  # type: ignore[attr-defined]

    def scatter_chunk(self, y: Tensor) -> Recorded:
        return Recorded(self.log, f"scatter {y.role}{chunk_of(y)}", y)  # type: ignore[attr-defined]

    gather, scatter = gather_chunk, scatter_chunk


class RecordedLinear:
    def __init__(self, log: list[str], name: str, outputs: int, inputs: int, dx: str = "") -> None:
        self.log, self.name, self.dx = log, name, dx
        self.w = random(outputs, inputs, seed=len(name)) * inputs**-0.5
        self.dw = torch.zeros_like(self.w)

    def weight(self) -> Done[Tensor]:
        return Done(self.w)

    def forward(self, x: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
        self.log.append(f"F {self.name}{chunk_of(x)}")
        return marked(linear_forward(x, w, out), self.name, x)

    def dgrad(self, dy: Tensor, w: Tensor) -> Tensor:
        self.log.append(f"B {self.name}")
        return marked(linear_dgrad(dy, w), self.dx)

    def wgrad(self, dy: Tensor, x: Tensor, part: int = 0, parts: int = 1) -> None:
        self.log.append(f"W {self.name}" + (f" {part + 1}/{parts}" if parts > 1 else ""))
        linear_wgrad(dy.chunk(parts, 1)[part], x, self.dw.chunk(parts)[part])


class RecordedNorm:
    def __init__(self, log: list[str], name: str, output: str, dx: str) -> None:
        self.log, self.name, self.output, self.dx = log, name, output, dx
        self.w, self.dw = 1 + 0.2 * random(D), torch.zeros(D, dtype=torch.float64)

    def weight(self) -> Done[Tensor]:
        return Done(self.w)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        self.log.append(f"F {self.name}{chunk_of(x)}")
        return marked(rms_norm_forward(x, w, 1e-5), self.output, x)

    def add_forward(self, x: Tensor, y: Tensor, w: Tensor, out: Tensor) -> Tensor:
        self.log.append(f"F {self.name}{chunk_of(out)}")
        return marked(add_rms_norm_forward(x, y, w, 1e-5, out=out)[1], self.output, out)

    def backward(self, dn: Tensor, x: Tensor, w: Tensor, residual: Tensor | None = None) -> Tensor:
        self.log.append(f"B {self.name}")
        dx = rms_norm_backward(dn, x, w, self.dw, 1e-5, residual=residual)
        return marked(dx, self.dx)


def build(policy: str, chunks: int = 1) -> tuple[DecoderLayer, list[str], Positions]:
    log: list[str] = []
    qkv = (HEADS.queries + 2 * HEADS.keys) * HEADS.width
    layer = DecoderLayer(
        HEADS,
        RecordedTokens(log, chunks),
        (
            RecordedNorm(log, "norm1", "n1", "dz"),
            RecordedLinear(log, "wqkv", qkv, D, "dn1"),
            RecordedLinear(log, "wo", D, D),
        ),
        (
            RecordedNorm(log, "norm2", "n2", "dx2"),
            RecordedLinear(log, "w13", 2 * F, D, "dn2"),
            RecordedLinear(log, "w2", D, F),
        ),
        POLICIES[policy],
    )
    rotation = rotation_at(torch.arange(T), rope_frequencies(HEADS.width, 1e4), torch.float64)
    return layer, log, Positions(rotation, Segments((T,)))


def stacked(
    layer: DecoderLayer, times: int, x: Tensor, positions: Positions, stash: Stash | None
) -> Pass[Tensor]:
    """The layer several times, one above the other."""
    filling = filled(x, layer.tokens.chunks)
    for key in range(times):
        filling = yield from layer.forward(filling, positions, stash, key)
    return (yield from fill_all(filling))


def downwards(
    layer: DecoderLayer, sets: Sequence[Saved], positions: Positions, queue: WgradQueue
) -> Pass[Tensor]:
    """Its backward through the saved sets, the uppermost first."""
    dz = marked(random(T, D, seed=1), "dz")
    for saved in sets:
        for name in saved.keys() & {"n1", "n2"}:
            marked(saved[name], name)
        dz = yield from layer.backward(dz, positions, saved, queue)
    return dz


def run(policy: str, chunks: int = 1) -> tuple[list[str], list[str]]:
    """What the forward and the backward log."""
    layer, log, positions = build(policy, chunks)
    stash, queue = Stash(), WgradQueue()
    drive(stacked(layer, 1, random(T, D), positions, stash))
    forward = log.copy()
    log.clear()
    drive(downwards(layer, [stash.take(0)], positions, queue), queue)
    return forward, log


def collectives(log: list[str]) -> list[str]:
    return [entry.removeprefix("start ") for entry in log if entry.startswith("start")]


def in_flight(log: list[str], name: str) -> list[str]:
    """The GEMMs and norms that run while the collective is in flight."""
    between = log[log.index(f"start {name}") : log.index(f"wait {name}")]
    return [entry for entry in between if entry[0] in "FBW"]


FORWARD = ["gather n1", "scatter wo", "gather n2", "scatter w2"]
# DESIGN §4, "Backward with B and W joined".
BACKWARD = ["gather dz", "gather n2", "scatter dn2", "gather dx2", "gather n1", "scatter dn1"]


@pytest.mark.parametrize("policy", ["linear_outputs", "all", "no_gate_up"])
def test_collectives_start_in_the_documented_order(policy):
    forward, backward = run(policy)
    assert collectives(forward) == FORWARD
    assert collectives(backward) == BACKWARD


def test_a_recomputing_backward_first_repeats_the_forward_s_collectives():
    assert collectives(run("no_attention_output")[1]) == BACKWARD  # o needs no collective
    assert collectives(run("layer_input")[1]) == ["gather n1", "scatter wo", *BACKWARD]


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_collective_is_waited_for_once(policy, chunks):
    for log in run(policy, chunks):
        started = [entry[6:] for entry in log if entry.startswith("start ")]
        waited = [entry[5:] for entry in log if entry.startswith("wait ")]
        assert sorted(started) == sorted(waited)


def test_what_hides_what():
    """The backward table of DESIGN §4, row by row, over two layers one below the other."""
    layer, log, positions = build("linear_outputs")
    queue, saved = WgradQueue(), []
    for seed in (0, 1):
        stash = Stash()
        drive(stacked(layer, 1, random(T, D, seed=seed), positions, stash))
        saved.append(stash.take(0))
    log.clear()
    drive(downwards(layer, saved, positions, queue), queue)
    lower = len(log) - log[::-1].index("start gather dz") - 1
    upper, below = log[:lower], log[lower:]
    assert in_flight(upper, "scatter dn1") == ["W w13 2/2"]
    # n2 is recomputed meanwhile
    assert in_flight(below, "gather dz") == ["F norm2", "W wo", "W wqkv"]
    # The wait for dz comes after this start, so the layer above's last W stands here too.
    assert in_flight(below, "gather n2") == ["W wo", "W wqkv", "B w2", "B w13"]
    assert in_flight(below, "scatter dn2") == ["W w2"]
    assert in_flight(below, "gather dx2") == ["F norm1", "W w13 1/2"]
    assert in_flight(below, "gather n1")[-2:] == ["B wo", "B wqkv"]


@pytest.fixture
def swiglu_logs(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """Has the forward's SwiGLU, which belongs to nobody, write to a log."""

    def arrange(log: list[str]) -> None:
        def forward(gate_up: Tensor, *rest: Any) -> Tensor:
            log.append(f"F swiglu{chunk_of(gate_up)}")
            return marked(swiglu_forward(gate_up, *rest), "act", gate_up)

        monkeypatch.setattr(module, "swiglu_forward", forward)

    return arrange


def test_what_hides_what_in_a_forward_of_two_chunks(swiglu_logs):
    """From one layer's attention to the next one's, written out."""
    layer, log, positions = build("linear_outputs", chunks=2)
    swiglu_logs(log)
    drive(stacked(layer, 2, random(T, D), positions, None))
    first, second = (i for i, entry in enumerate(log) if entry == "F wo 0")
    assert log[first:second] == [
        *("F wo 0", "start scatter wo 0"),
        "F wo 1",
        *("wait scatter wo 0", "F norm2 0", "start gather n2 0"),
        "start scatter wo 1",
        *("wait gather n2 0", "F w13 0"),
        *("wait scatter wo 1", "F norm2 1", "start gather n2 1"),
        *("F swiglu 0", "F w2 0", "start scatter w2 0"),
        *("wait gather n2 1", "F w13 1"),
        *("wait scatter w2 0", "F norm1 0", "start gather n1 0"),
        *("F swiglu 1", "F w2 1", "start scatter w2 1"),
        *("wait gather n1 0", "F wqkv 0"),
        *("wait scatter w2 1", "F norm1 1", "start gather n1 1"),
        *("wait gather n1 1", "F wqkv 1"),
    ]
    assert log[second:][:18] == log[first:second][:18], "the layer above does the same"
    between = log[first:second]
    # A reduce-scatter, the norm after it and its all-gather, under GEMMs of the other chunk.
    assert gemms_under(between, "scatter wo 0", "gather n2 0") == ["F wo 1"]
    assert gemms_under(between, "scatter wo 1", "gather n2 1") == ["F w13 0", "F w2 0"]
    assert gemms_under(between, "scatter w2 0", "gather n1 0") == ["F w13 1", "F w2 1"]
    assert gemms_under(between, "scatter w2 1", "gather n1 1") == ["F wqkv 0"]


def gemms_under(log: list[str], first: str, last: str) -> list[str]:
    between = log[log.index(f"start {first}") : log.index(f"wait {last}")]
    return [entry for entry in between if entry.startswith("F w")]


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_recomputed_takes_the_forward_s_own_gemms(policy, chunks):
    """Which is why every policy gives the same bits."""
    forward, backward = run(policy, chunks)
    assert {e for e in backward if e.startswith("F w")} <= set(forward)


@pytest.mark.parametrize("policy", POLICIES)
def test_each_weight_gradient_runs_once_and_in_one_order(policy):
    _, log = run(policy)
    done = [entry for entry in log if entry[0] == "W"]
    assert done == ["W w2", "W w13 1/2", "W w13 2/2", "W wo", "W wqkv"]


@pytest.mark.parametrize("chunks", [1, 2])
def test_without_a_stash_nothing_is_kept(chunks):
    layer, _, positions = build("all", chunks)
    stash = Stash()
    x = random(T, D)
    trained = drive(stacked(layer, 1, x, positions, stash))
    evaluated = drive(stacked(layer, 1, x, positions, None))
    assert torch.equal(trained, evaluated)
    assert set(stash.take(0)) == POLICIES["all"]
    assert len(stash) == 0


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_stash_holds_the_policy_s_names(policy, chunks):
    layer, _, positions = build(policy, chunks)
    stash = Stash()
    drive(stacked(layer, 1, random(T, D), positions, stash))
    assert set(stash.take(0)) == POLICIES[policy]


def everything(policy: str, chunks: int) -> dict[str, Tensor]:
    """What a forward and a backward over two layers make."""
    layer, _, positions = build(policy, chunks)
    stash, queue = Stash(), WgradQueue()
    z = drive(stacked(layer, 2, random(T, D), positions, stash))
    sets = [stash.take(key) for key in (1, 0)]
    kept = {f"{name} {i}": t.clone() for i, saved in enumerate(sets) for name, t in saved.items()}
    dx = drive(downwards(layer, sets, positions, queue), queue)
    weights = {name: part.dw for name, part in vars(layer).items() if hasattr(part, "dw")}
    assert len(weights) == 6
    return {"z": z, "dx": dx, **kept, **weights}


@pytest.mark.parametrize("policy", POLICIES)
def test_two_chunks_compute_what_one_does(policy):
    one, two = everything(policy, 1), everything(policy, 2)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.allclose(two[name], tensor, rtol=1e-12, atol=1e-14), name


@pytest.mark.parametrize("chunks", [1, 2])
def test_every_policy_gives_the_same_bits(chunks):
    whole = everything("all", chunks)
    for policy in POLICIES:
        for name, tensor in everything(policy, chunks).items():
            assert torch.equal(tensor, whole[name]), (policy, name)
