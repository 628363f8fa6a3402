"""The order of a layer's work: DESIGN §4's table of what hides under what.

The layer is given linears, norms and a queue that log. `start` and `wait` are a collective's two
ends; what is logged between them runs while it is in flight.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from megallama.autograd.layer import DecoderLayer, Heads, Positions
from megallama.autograd.linear import linear_dgrad, linear_forward, linear_wgrad
from megallama.autograd.norm import rms_norm_backward, rms_norm_forward
from megallama.autograd.passes import WgradQueue, drive
from megallama.autograd.rope import rope_frequencies, rotation_at
from megallama.autograd.segments import Segments
from megallama.autograd.stash import Stash
from megallama.dist.handle import Done
from megallama.spec.saved import POLICIES
from tests.unit.autograd.pairs import random

HEADS = Heads(queries=4, keys=2, width=4)
D, F, T = 16, 6, 5


@dataclass
class Recorded:
    """A collective in flight."""

    log: list[str]
    name: str
    value: torch.Tensor
    collective: bool = True

    def __post_init__(self) -> None:
        self.log.append(f"start {self.name}")

    def wait(self) -> torch.Tensor:
        self.log.append(f"wait {self.name}")
        return self.value


class RecordedGroup:
    """One process that logs its collectives; what a linear gathers or scatters names them."""

    rank, size = 0, 1

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def all_gather(self, x: torch.Tensor, name: str = "") -> Recorded:
        return Recorded(self.log, f"gather {name}", x)

    def reduce_scatter(self, x: torch.Tensor, name: str = "") -> Recorded:
        return Recorded(self.log, f"scatter {name}", x)


class RecordedLinear:
    def __init__(self, log: list[str], name: str, outputs: int, inputs: int) -> None:
        self.log, self.name, self.group = log, name, RecordedGroup(log)
        self.w = random(outputs, inputs, seed=len(name)) * inputs**-0.5
        self.dw = torch.zeros_like(self.w)

    def gather(self, x):
        return self.group.all_gather(x, self.name)

    def scatter(self, y):
        return self.group.reduce_scatter(y, self.name)

    def weight(self):
        return Done(self.w)

    def forward(self, x, w):
        self.log.append(f"F {self.name}")
        return linear_forward(x, w)

    def dgrad(self, dy, w):
        self.log.append(f"B {self.name}")
        return linear_dgrad(dy, w)

    def wgrad(self, dy, x):
        self.log.append(f"W {self.name}")
        linear_wgrad(dy, x, self.dw)


class RecordedNorm:
    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name
        self.w, self.dw = 1 + 0.2 * random(D), torch.zeros(D, dtype=torch.float64)

    def weight(self):
        return Done(self.w)

    def forward(self, x, w):
        self.log.append(f"F {self.name}")
        return rms_norm_forward(x, w, 1e-5)

    def backward(self, dn, x, w):
        self.log.append(f"B {self.name}")
        return rms_norm_backward(dn, x, w, self.dw, 1e-5)


def build(policy: str) -> tuple[DecoderLayer, list[str], Positions]:
    log: list[str] = []
    qkv = (HEADS.queries + 2 * HEADS.keys) * HEADS.width
    layer = DecoderLayer(
        HEADS,
        (
            RecordedNorm(log, "norm1"),
            RecordedLinear(log, "wqkv", qkv, D),
            RecordedLinear(log, "wo", D, D),
        ),
        (
            RecordedNorm(log, "norm2"),
            RecordedLinear(log, "w13", 2 * F, D),
            RecordedLinear(log, "w2", D, F),
        ),
        POLICIES[policy],
    )
    rotation = rotation_at(torch.arange(T), rope_frequencies(HEADS.width, 1e4), torch.float64)
    return layer, log, Positions(rotation, Segments((T,)))


def run(policy: str) -> tuple[list[str], list[str]]:
    """What the forward and the backward log."""
    layer, log, positions = build(policy)
    stash = Stash()
    drive(layer.forward(random(T, D), positions, stash, 0))
    forward = log.copy()
    log.clear()
    queue = WgradQueue()
    drive(layer.backward(random(T, D, seed=1), positions, stash.take(0), queue), queue)
    return forward, log


def collectives(log: list[str]) -> list[str]:
    return [entry.removeprefix("start ") for entry in log if entry.startswith("start")]


def in_flight(log: list[str], name: str) -> list[str]:
    """The GEMMs and norms that run while the collective is in flight."""
    between = log[log.index(f"start {name}") : log.index(f"wait {name}")]
    return [entry for entry in between if entry[0] in "FBW"]


FORWARD = ["gather wqkv", "scatter wo", "gather w13", "scatter w2"]
# dz, n2; dn2; dx2, n1; dn1: DESIGN §4, "Backward with B and W joined".
BACKWARD = ["gather w2", "gather w13", "scatter w13", "gather wo", "gather wqkv", "scatter wqkv"]


@pytest.mark.parametrize("policy", ["linear_outputs", "all", "no_gate_up"])
def test_collectives_start_in_the_documented_order(policy):
    forward, backward = run(policy)
    assert collectives(forward) == FORWARD
    assert collectives(backward) == BACKWARD


def test_a_recomputing_backward_first_repeats_the_forward_s_collectives():
    assert collectives(run("no_attention_output")[1]) == BACKWARD  # o needs no collective
    assert collectives(run("layer_input")[1]) == ["gather wqkv", "scatter wo", *BACKWARD]


@pytest.mark.parametrize("policy", POLICIES)
def test_every_collective_is_waited_for_once(policy):
    for log in run(policy):
        started = [entry[6:] for entry in log if entry.startswith("start ")]
        waited = [entry[5:] for entry in log if entry.startswith("wait ")]
        assert sorted(started) == sorted(waited)


def test_what_hides_what():
    """The backward table of DESIGN §4, row by row, over two layers one below the other."""
    layer, log, positions = build("linear_outputs")
    queue, saved = WgradQueue(), []
    for seed in (0, 1):
        stash = Stash()
        drive(layer.forward(random(T, D, seed=seed), positions, stash, 0))
        saved.append(stash.take(0))
    log.clear()

    def backward():
        dz = random(T, D, seed=2)
        for one in saved:
            dz = yield from layer.backward(dz, positions, one, queue)

    drive(backward(), queue)
    lower = len(log) - log[::-1].index("start gather w2") - 1
    upper, below = log[:lower], log[lower:]
    assert in_flight(upper, "scatter wqkv") == ["W wo"]
    assert in_flight(below, "gather w2") == ["F norm2", "W wqkv"]  # n2 is recomputed meanwhile
    # The wait for dz comes after this start, so the layer above's last W stands here too.
    assert in_flight(below, "gather w13") == ["W wqkv", "B w2", "B w13"]
    assert in_flight(below, "scatter w13") == ["W w2"]
    assert in_flight(below, "gather wo") == ["F norm1", "W w13"]
    assert in_flight(below, "gather wqkv")[-2:] == ["B wo", "B wqkv"]


@pytest.mark.parametrize("policy", POLICIES)
def test_each_weight_gradient_runs_once_and_in_one_order(policy):
    _, log = run(policy)
    assert [entry for entry in log if entry[0] == "W"] == ["W w2", "W w13", "W wo", "W wqkv"]


def test_without_a_stash_nothing_is_kept():
    layer, _, positions = build("all")
    stash = Stash()
    x = random(T, D)
    trained = drive(layer.forward(x, positions, stash, 0))
    evaluated = drive(layer.forward(x, positions, None, 0))
    assert torch.equal(trained, evaluated)
    assert set(stash.take(0)) == POLICIES["all"]
    assert len(stash) == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_the_stash_holds_the_policy_s_names(policy):
    layer, _, positions = build(policy)
    stash = Stash()
    drive(layer.forward(random(T, D), positions, stash, 0))
    assert set(stash.take(0)) == POLICIES[policy]
