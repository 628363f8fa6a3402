"""ZeRO's buckets: when each is reduced and gathered, and in which order, by a group that records.

The model is a real one on data rank 0 of two; its group lets the other rank's share be zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from megallama.autograd.passes import WgradQueue, drive
from megallama.autograd.stash import Stash
from megallama.dist.group import SingleGroup
from megallama.dist.handle import Done
from megallama.model.initial import initialize
from megallama.model.llama import Llama
from megallama.parallel.state import ParameterState
from megallama.parallel.tokens import TokenShards
from megallama.parallel.zero import Zero, ZeroGroups
from megallama.spec.grid import Grid, Place
from megallama.spec.parameters import EMBEDDING, FINAL_NORM, OUTPUT, parameter_table
from megallama.spec.shards import shard_table
from tests.harness import flat, forward_backward, lone_state, micro_batch, model_config, whole
from tests.reference import Shape, random_batch

CPU = torch.device("cpu")


@dataclass
class Waited:
    log: list[str]
    name: str
    value: Any = None
    cover: int = 1

    def wait(self) -> Any:
        self.log.append(f"wait {self.name}")
        return self.value


@dataclass
class RecordingGroup:
    """One of two ranks, whose sums are what this rank gives and whose gathers change nothing."""

    log: list[str]
    names: dict[int, str] = field(default_factory=dict)
    seen: dict[str, list[Tensor]] = field(default_factory=dict)
    wires: set[Any] = field(default_factory=set)
    rank, size = 0, 2

    def know(self, *kinds: Mapping[str, Tensor]) -> None:
        for kind in kinds:
            self.names |= {tensor.data_ptr(): name for name, tensor in reversed(kind.items())}

    def reduce_scatter_rows(self, tensors: Sequence[Tensor], wire: Any = None) -> Waited:
        self.wires.add(wire)
        return self._start("reduce", tensors)

    def all_gather_rows(self, tensors: Sequence[Tensor]) -> Waited:
        return self._start("gather", tensors)

    def all_reduce(self, x: Tensor) -> Waited:
        self.log.append(f"sum {x.numel()}")
        return Waited(self.log, f"sum {x.numel()}", 2 * x, cover=2)

    def _start(self, what: str, tensors: Sequence[Tensor]) -> Waited:
        names = " ".join(self.names[tensor.data_ptr()] for tensor in tensors)
        assert all(len(tensor) % self.size == 0 for tensor in tensors)
        self.seen[names] = [tensor.clone() for tensor in tensors]
        self.log.append(f"{what} {names}")
        return Waited(self.log, f"{what} {names}")


@dataclass
class Rig:
    """A model, its Zero, and what both said."""

    shape: Shape
    model: Llama
    zero: Zero
    group: RecordingGroup
    log: list[str]

    @property
    def state(self) -> ParameterState:
        return self.model.state

    def forward(self, seed: int, stash: Stash) -> Any:
        batch = micro_batch(self.model, *random_batch(self.shape, 2, 6, seed))
        drive(self.model.chunks[0].forward(batch, None, stash))
        return batch

    def micro_batch(self, seed: int) -> None:
        stash, queue = Stash(), WgradQueue()
        batch = self.forward(seed, stash)
        drive(self.model.chunks[0].backward(batch, None, stash, queue), queue)

    def reduced(self) -> list[str]:
        return [e.removeprefix("reduce ") for e in self.log if e.startswith("reduce ")]


def rig(tied: bool = False, wire: torch.dtype | None = None, **changes: Any) -> Rig:
    shape = Shape(tie_embeddings=tied, **changes)
    config = model_config(shape)
    shards = shard_table(parameter_table(config), Place(Grid(data=2), 0))
    state = ParameterState(shards, torch.float64, CPU, (EMBEDDING, OUTPUT) if tied else ())
    log: list[str] = []
    group = RecordingGroup(log)
    group.know(state.padded_weights, state.padded_gradients)
    zero = Zero(state, ZeroGroups(group, SingleGroup(), SingleGroup()), wire)
    source = lone_state([shard.parameter for shard in shards], torch.float64)
    initialize(source, 0)
    for name, weight in state.weights.items():
        weight.copy_(source.masters[EMBEDDING if name == OUTPUT else name])
    model = Llama(config, state, TokenShards(SingleGroup()), "linear_outputs", [whole(config)])
    return Rig(shape, model, zero, group, log)


def bucket(layer: int) -> str:
    return " ".join(f"layers.{layer}.{name}" for name in ("wqkv", "wo", "w13", "w2"))


FIRST = " ".join(
    (
        EMBEDDING,
        *(f"layers.{i}.{name}" for i in range(2) for name in ("attention_norm", "ffn_norm")),
        FINAL_NORM,
    )
)
NAMES = {
    True: [bucket(1), bucket(0), FIRST],
    False: [OUTPUT, bucket(1), bucket(0), FIRST],
}


@pytest.mark.parametrize("tied", [False, True])
def test_buckets_are_reduced_in_the_last_micro_batch_alone_from_the_last_layer_down(tied):
    one = rig(tied)
    one.zero.expect(3)
    one.micro_batch(0)
    one.micro_batch(1)
    assert one.log == [], "nothing is reduced before the last"
    stash, queue = Stash(), WgradQueue()
    batch = one.forward(2, stash)
    assert one.reduced() == NAMES[tied][:-3], "the output's gradient is born in the forward"
    drive(one.model.chunks[0].backward(batch, None, stash, queue), queue)
    assert one.log == [f"reduce {names}" for names in NAMES[tied]], "and none is waited for"
    one.zero.finish_gradients()
    assert one.log[len(NAMES[tied]) :] == [f"wait reduce {names}" for names in NAMES[tied]]


@pytest.mark.parametrize("tied", [False, True])
def test_a_bucket_leaves_as_soon_as_its_last_gradient_has_landed(tied):
    one = rig(tied)
    landed = one.state.on_landed

    def noted(name: str) -> None:
        one.log.append(f"landed {name}")
        landed(name)

    one.state.on_landed = noted
    one.zero.expect(1)
    one.micro_batch(0)
    gradients = [entry for entry in one.log if entry.startswith("landed")]
    assert len(gradients) == len(set(gradients)) == len(one.state.gradients)
    for names in one.reduced():
        mine = {f"landed {name}" for name in names.split()}
        if tied and EMBEDDING in names:
            mine.add(f"landed {OUTPUT}")
        at = one.log.index(f"reduce {names}")
        assert one.log[at - 1] == max(mine, key=one.log.index)


def test_what_is_reduced_is_the_sum_over_micro_batches_with_the_tied_gradient_folded_in():
    one = rig(tied=True)
    one.zero.expect(2)
    one.micro_batch(0)
    one.micro_batch(1)
    sent = {
        name: tensor
        for names, tensors in one.group.seen.items()
        for name, tensor in zip(names.split(), tensors, strict=True)
    }
    two = rig(tied=True)
    two.state.on_landed = None
    batches = [random_batch(two.shape, 2, 6, seed) for seed in (0, 1)]
    forward_backward(two.model, *batches)  # folds the tied gradient at its end
    assert sent.keys() == two.state.padded_weights.keys()
    for name, tensor in sent.items():
        assert torch.equal(tensor, two.state.padded_gradients[name]), name


@pytest.mark.parametrize("wire", [None, torch.bfloat16])
def test_gradients_travel_in_the_wire_s_type(wire):
    one = rig(wire=wire)
    one.zero.expect(1)
    one.micro_batch(0)
    assert one.group.wires == {wire}


def test_a_gradient_that_has_not_landed_is_refused():
    one = rig()
    one.zero.expect(1)
    for name in one.state.gradients:
        if name != "layers.0.wo":
            one.state.landed(name)
    with pytest.raises(RuntimeError, match=r"chunk 0: .* not landed for \['layers\.0\.wo'\]"):
        one.zero.finish_gradients()
    assert not any("wait" in entry for entry in one.log)


def test_gradients_of_several_buckets_that_have_not_landed_are_refused():
    one = rig()
    one.zero.expect(1)
    with pytest.raises(RuntimeError, match="gradients have not landed for"):
        one.zero.finish_gradients()


def test_a_step_after_the_first_is_like_it():
    one = rig()
    logs = []
    for seed in (0, 1):
        one.log.clear()
        one.zero.expect(2)
        one.micro_batch(2 * seed)
        one.micro_batch(2 * seed + 1)
        one.zero.finish_gradients()
        logs.append(one.log.copy())
    assert logs[0] == logs[1]


def test_weights_leave_in_the_order_in_which_a_forward_asks_for_them():
    """One handle a bucket, waited for once, by the first that needs a weight of it."""
    one = rig()
    one.zero.expect(2)
    with one.zero.changing_masters():
        one.log.append("masters change")
    order = [FIRST, bucket(0), bucket(1), OUTPUT]
    assert one.log == ["masters change", *(f"gather {names}" for names in order)]
    one.log.clear()
    one.forward(0, Stash())
    assert one.log == [f"wait gather {names}" for names in order]
    one.log.clear()
    one.state.on_landed = None  # the second gradient of the output would leave
    one.forward(1, Stash())
    assert one.log == [], "they have arrived"


def test_masters_change_only_when_no_weight_is_on_its_way():
    """They may be views of what is still being sent: an update would overtake it."""
    one = rig(tied=True)
    with one.zero.changing_masters():
        pass
    embedding = one.model.chunks[0].embedding
    drive(embedding.forward(torch.tensor([0])))  # takes the first bucket's handle
    one.log.clear()
    with one.zero.changing_masters():
        one.log.append("masters change")
    waits = one.log[: one.log.index("masters change")]
    assert waits == [f"wait gather {bucket(0)}", f"wait gather {bucket(1)}"]
    assert one.log[3:] == [f"gather {names}" for names in (FIRST, bucket(0), bucket(1))]


def test_the_cover_of_a_weight_is_its_bucket_s_until_that_has_arrived():
    one = rig()
    with one.zero.changing_masters():
        pass
    first, second = (one.state.weight(f"layers.0.{name}") for name in ("wqkv", "wo"))
    assert (first.cover, second.cover) == (1, 1)
    assert first.wait() is one.state.weights["layers.0.wqkv"]
    assert second.cover == 0
    assert second.wait() is one.state.weights["layers.0.wo"]
    assert one.log.count(f"wait gather {bucket(0)}") == 1
    assert isinstance(one.state.weight("layers.0.wo"), Done)


def test_masters_are_rounded_before_their_weights_leave():
    shape = Shape()
    shards = shard_table(parameter_table(model_config(shape)), Place(Grid(data=2), 1))
    state = ParameterState(shards, torch.bfloat16, CPU)
    log: list[str] = []
    group = RecordingGroup(log)
    group.know(state.padded_weights)
    zero = Zero(state, ZeroGroups(group, None, SingleGroup()))
    with zero.changing_masters():
        for master in state.masters.values():
            master.normal_()
    for names, tensors in group.seen.items():
        for name, tensor in zip(names.split(), tensors, strict=True):
            half = len(tensor) // 2
            assert torch.equal(tensor[half:], state.masters[name].bfloat16()), name
            assert not tensor[:half].any(), "the other rank's rows are to come"


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("kv_heads, tensor_ranks", [(1, 4), (2, 4), (4, 4)])
def test_parts_of_a_sum_are_added_after_the_buckets(kv_heads, tensor_ranks, sequence_parallel):
    """Norms over the tensor ranks, where each saw some tokens; heads over the ranks that hold
    them. This rank's rows alone, and no other gradient."""
    config = model_config(Shape(kv_heads=kv_heads))
    place = Place(Grid(tensor=tensor_ranks, data=2), 0)
    state = ParameterState(shard_table(parameter_table(config), place), torch.float64, CPU)
    log: list[str] = []
    single, summing = SingleGroup(), RecordingGroup(log)
    sharing = tensor_ranks // kv_heads
    groups = ZeroGroups(
        single, summing if sequence_parallel else None, summing if sharing > 1 else single
    )
    zero = Zero(state, groups)
    zero.expect(1)
    for name, gradient in state.padded_gradients.items():
        gradient.fill_(1.0)
        state.landed(name)
    zero.finish_gradients()
    doubled = {
        piece.part.name
        for piece, gradient in state.pieces(state.own_gradients)
        if (gradient == 2).all()
    }
    untouched = {
        piece.part.name
        for piece, gradient in state.pieces(state.own_gradients)
        if (gradient == 1).all()
    }
    assert not doubled & untouched
    norms = {name for name in doubled | untouched if "norm" in name}
    heads = {n for n in doubled | untouched if n.endswith(("wk.weight", "wv.weight"))}
    assert len(norms) == 5
    assert doubled == (norms if sequence_parallel else set()) | (heads if sharing > 1 else set())
    starts = [entry for entry in log if entry.startswith("sum")]
    assert log[: len(starts)] == starts, "both are under way before either is waited for"
    assert len(starts) == sequence_parallel + (sharing > 1)
    others = [g for n, g in state.padded_gradients.items() if n.endswith("w2")]
    assert all((gradient == 1).all() for gradient in others)


def test_padding_of_a_gradient_is_not_this_model_s():
    """Rows beyond a parameter's own stay zero, in what the passes write and what travels."""
    one = rig(vocab=61, ffn=45)
    one.zero.expect(1)
    one.micro_batch(0)
    padded = [s for s in one.state.table if s.padded_rows > s.shape[0]]
    assert {s.name for s in padded} == {EMBEDDING, OUTPUT}
    for shard in padded:
        assert not one.state.padded_gradients[shard.name][shard.shape[0] :].any()
        assert flat({"g": one.state.gradients[shard.name]}).any()
