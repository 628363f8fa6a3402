"""Faults planted in one rank of a job, or in a few; `megallama check` must find every one.

A fault is another config of a rank, or a change to its trainer before its first step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from megallama.check.job import faults
from megallama.check.matching import Fault, Ranks
from megallama.check.program import Book
from megallama.check.rehearse import How, rehearse
from megallama.dist.group import COVER
from megallama.dist.handle import Done, Handle
from megallama.parallel.pipeline import Pipeline
from megallama.spec.grid import Place, make_grid
from megallama.spec.schedules.actions import Action, Compute, Fused, Receive, Send
from megallama.spec.schedules.messages import whole_lists
from megallama.spec.schedules.plain import one_f_one_b
from megallama.train.build import Trainer
from tests.layouts.case import Case

Plant = Callable[[Trainer], None]


@dataclass(frozen=True)
class Planted:
    """`case`: the layout; `ranks`: those with the fault; `other`: what their case has otherwise;
    `kind` and `says`: of the fault that is to be found."""

    case: str
    ranks: tuple[int, ...]
    kind: str
    says: str
    plant: Plant | None = None
    other: str = ""


def find(planted: Planted) -> Fault | None:
    """Rehearse every rank by itself, those with the fault so, and check the job."""
    case, book = Case.parse(planted.case), Book()
    config, odd = case.config(1.0), Case.parse(f"{planted.case} {planted.other}").config(1.0)
    grid = make_grid(config, case.ranks)
    rehearsals = []
    for rank in range(grid.size):
        wrong = rank in planted.ranks
        place = Place(make_grid(odd, case.ranks) if wrong else grid, rank)
        how = How(planted.plant if wrong else None, steps=2)
        rehearsals.append(rehearse(odd if wrong else config, place, book, how))
    job = Ranks(rehearsals, range(grid.size), [one.members for one in rehearsals])
    return faults(job, config)


def around(owner: Any, name: str, change: Callable[..., Any]) -> None:
    """Replace a method by `change(method, …)`."""
    method = getattr(owner, name)
    setattr(owner, name, lambda *given, **named: change(method, *given, **named))


def _lists(trainer: Trainer, change: Callable[[Sequence[Action]], Sequence[Action]]) -> None:
    """Change this rank's list of actions."""
    config, data = trainer.config, trainer.place.grid.data
    pipeline: Pipeline = trainer.step.pipelines.train(
        config.train.global_batch // (config.train.micro_batch * data)
    )
    actions = list(pipeline.schedule.actions)
    actions[pipeline.rank] = tuple(change(actions[pipeline.rank]))
    pipeline.schedule = replace(pipeline.schedule, actions=tuple(actions))


def _swapped(actions: Sequence[Action], kind: type[Action], first: int = 0) -> list[Action]:
    """The first two actions of a kind from `first` on, each in the other's place."""
    found = [index for index, action in enumerate(actions) if isinstance(action, kind)]
    one, other = found[first : first + 2]
    changed = list(actions)
    changed[one], changed[other] = actions[other], actions[one]
    return changed


def _without(actions: Sequence[Action], kind: type[Action]) -> list[Action]:
    """All but the last of a kind."""
    last = max(index for index, action in enumerate(actions) if isinstance(action, kind))
    return [action for index, action in enumerate(actions) if index != last]


class _Later:
    """The handle of a gather that another one overtakes."""

    cover = COVER

    def __init__(self, gather: Callable[[Tensor], Handle[Tensor]], x: Tensor) -> None:
        self._gather, self._x = gather, x
        self._handle: Handle[Tensor] | None = None

    def start(self) -> None:
        self._handle = self._gather(self._x)

    def wait(self) -> Tensor:
        if self._handle is None:
            self.start()
        assert self._handle is not None
        return self._handle.wait()


def gathers_swapped(trainer: Trainer) -> None:
    """The backward gathers n2 before dz: both have one shape, and the data would be mixed up."""
    tokens, late = trainer.model.tokens, list[_Later]()
    gather = tokens.gather

    def swapped(x: Tensor) -> Handle[Tensor]:
        if not late:
            late.append(_Later(gather, x))
            return late[0]
        handle = gather(x)
        late.pop().start()
        return handle

    tokens.gather = swapped  # type: ignore[method-assign]


def sums_for_scatters(trainer: Trainer) -> None:
    """An all-reduce in place of a reduce-scatter."""
    group = trainer.model.tokens.group

    def scatter(_: Any, x: Tensor, wire: Any = None) -> Any:
        return Done(group.all_reduce(x).wait()[: len(x) // group.size])

    around(group, "reduce_scatter", scatter)


def half_a_gather(trainer: Trainer) -> None:
    """One gather of half the tokens."""
    group, calls = trainer.model.tokens.group, []

    def gather(method: Any, x: Tensor, out: Any = None) -> Any:
        calls.append(1)
        if len(calls) != 3:
            return method(x, out)
        method(x[: len(x) // 2])
        return Done(x.new_empty(len(x) * group.size, *x.shape[1:]))

    around(group, "all_gather", gather)


def one_gather_less(trainer: Trainer) -> None:
    """A gather is left out, late in the step."""
    group, calls = trainer.model.tokens.group, []

    def gather(method: Any, x: Tensor, out: Any = None) -> Any:
        calls.append(1)
        if len(calls) == 17:
            return Done(x.new_empty(len(x) * group.size, *x.shape[1:]))
        return method(x, out)

    around(group, "all_gather", gather)


def one_gather_more(trainer: Trainer) -> None:
    """A gather is issued twice."""
    group, calls = trainer.model.tokens.group, []

    def gather(method: Any, x: Tensor, out: Any = None) -> Any:
        calls.append(1)
        if len(calls) == 9:
            method(x)
        return method(x, out)

    around(group, "all_gather", gather)


def wide_gather(trainer: Trainer) -> None:
    """A gather of fp32 in place of fp64."""
    group = trainer.model.tokens.group
    around(group, "all_gather", lambda method, x, out=None: _narrowed(method, x))


def _narrowed(method: Any, x: Tensor) -> Any:
    return Done(method(x.float()).wait().to(x.dtype))


def send_left_out(trainer: Trainer) -> None:
    _lists(trainer, lambda actions: _without(actions, Send))


def sends_swapped(trainer: Trainer) -> None:
    """Two messages leave in the other order."""
    around(trainer.groups["pipeline 0>1"], "send", _relabelled)


def _relabelled(method: Any, x: Tensor, peer: int, label: str) -> Any:
    swap = {"activations of F(0, 0)": "activations of F(0, 1)"}
    return method(x, peer, swap.get(label, label))


def receives_swapped(trainer: Trainer) -> None:
    _lists(trainer, lambda actions: _swapped(actions, Receive))


def half_a_message(trainer: Trainer) -> None:
    """Half of an activation is sent."""
    link = trainer.groups["pipeline 0>1"]
    around(link, "send", lambda method, x, *rest: method(x[: len(x) // 2], *rest))


def norms_apart(trainer: Trainer) -> None:
    trainer.zero._norm_gradients = lambda: []  # type: ignore[method-assign]


def heads_apart(trainer: Trainer) -> None:
    trainer.zero._key_value_gradients = lambda: []  # type: ignore[method-assign]


def tied_apart(trainer: Trainer) -> None:
    trainer.zero.groups = replace(trainer.zero.groups, tied=None)


def buckets_reversed(trainer: Trainer) -> None:
    """The updated weights leave in the other order."""
    trainer.zero.buckets = trainer.zero.buckets[::-1]


def buckets_of_equal_layers_swapped(trainer: Trainer) -> None:
    """Of the updated weights two layers' leave in the other order: of one shape, from one line."""
    head, one, other, *rest = trainer.zero.buckets
    trainer.zero.buckets = (head, other, one, *rest)


def bucket_split(trainer: Trainer) -> None:
    """A bucket's gradients leave as two."""
    group = trainer.zero.groups.data

    def reduce(method: Any, tensors: Sequence[Tensor], wire: Any = None) -> Any:
        method(tensors[:1], wire)
        return method(tensors[1:], wire) if len(tensors) > 1 else Done(None)

    around(group, "reduce_scatter_rows", reduce)


def bucket_short(trainer: Trainer) -> None:
    """A parameter of each bucket is left out."""
    group = trainer.zero.groups.data
    around(group, "reduce_scatter_rows", lambda method, t, wire=None: method(t[:-1] or t, wire))


def crosswise(trainer: Trainer) -> None:
    """Two sums, over data and over tensor ranks: each rank waits for one before it goes to the
    other, and its neighbours take them the other way round."""
    zero, place = trainer.zero, trainer.place
    first = (place.along("tensor") + place.along("data")) % 2 == 0
    data, tensor = trainer.groups["data"], trainer.groups["tensor"]
    own = next(iter(trainer.model.state.own_gradients.values()))

    def finish(method: Any) -> None:
        for group in (data, tensor) if first else (tensor, data):
            group.all_reduce(own[:1]).wait()
        method()

    around(zero, "finish_gradients", finish)


def no_warm_up(trainer: Trainer) -> None:
    """1F1B's list with its pairs fused, and no more than the warm-up that it has."""
    pipeline = trainer.step.pipelines.train(trainer.config.train.global_batch)
    schedule = pipeline.schedule
    ranks = [_fused(list_) for list_ in one_f_one_b(schedule.stages, schedule.micro_batches)]
    lists = whole_lists([ranks[0], *map(slots, schedule.actions[1:])], schedule.owners)
    pipeline.schedule = replace(schedule, actions=lists)


def slots(actions: Sequence[Action]) -> list[Compute | Fused]:
    """What is computed in a list."""
    return [action for action in actions if isinstance(action, Compute | Fused)]


def _fused(actions: Sequence[Any]) -> list[Any]:
    found, index = [], 0
    while index < len(actions):
        pair = actions[index : index + 2]
        if [one.kind for one in pair if isinstance(one, Compute)] == ["F", "BW"]:
            found.append(Fused(*pair))
            index += 2
        else:
            found.append(actions[index])
            index += 1
    return found


def receive_first(trainer: Trainer) -> None:
    """A rank waits for the gradient of a micro-batch before it sends its activations."""
    receive = trainer.groups["pipeline 1>0"].receive

    def waits(out: Tensor, peer: int, label: str) -> Any:
        return Done(receive(out, peer, label).wait())

    trainer.groups["pipeline 1>0"].receive = waits  # type: ignore[method-assign]
    _lists(trainer, _receives_first)


def _receives_first(actions: Sequence[Action]) -> list[Action]:
    received = [action for action in actions if isinstance(action, Receive)]
    return [received[0], *(action for action in actions if action != received[0])]


TWO = "tensor=2 data=1"
STAGES = "tensor=1 data=1 pipeline=2 micro_batches=3"
PLANTED = {
    "gathers swapped": Planted(TWO, (1,), "mismatch", "all_gather", gathers_swapped),
    "sums for scatters": Planted(TWO, (1,), "mismatch", "all_reduce", sums_for_scatters),
    "half a gather": Planted(TWO, (0,), "mismatch", "[4, 32]", half_a_gather),
    "a gather less": Planted(TWO, (1,), "mismatch", "", one_gather_less),
    "a gather more": Planted(TWO, (0,), "mismatch", "", one_gather_more),
    "a gather in fp32": Planted(TWO, (1,), "mismatch", "float32", wide_gather),
    "a send less": Planted(STAGES, (0,), "mismatch", "", send_left_out),
    "sends swapped": Planted(STAGES, (0,), "mismatch", "", sends_swapped),
    "receives swapped": Planted(f"{STAGES} schedule=gpipe", (1,), "mismatch", "", receives_swapped),
    "half a message": Planted(STAGES, (0,), "mismatch", "[8, 32]", half_a_message),
    "norms apart": Planted("tensor=2 data=2", (3,), "mismatch", "", norms_apart),
    "heads apart": Planted("tensor=4 data=1 kv_heads=2", (2,), "mismatch", "", heads_apart),
    "tied apart": Planted(f"{STAGES} tied=True", (0,), "mismatch", "", tied_apart),
    "buckets reversed": Planted("tensor=1 data=2", (1,), "mismatch", "", buckets_reversed),
    "equal buckets swapped": Planted(
        "tensor=1 data=2", (1,), "mismatch", "layers.1.", buckets_of_equal_layers_swapped
    ),
    "a bucket in two": Planted("tensor=1 data=2", (1,), "mismatch", "", bucket_split),
    "a bucket too short": Planted("tensor=1 data=2", (0,), "mismatch", "", bucket_short),
    "crosswise": Planted("tensor=2 data=2", (0, 1, 2, 3), "deadlock", "circle", crosswise),
    "no warm-up": Planted(f"{STAGES} schedule=1f1b-fused", (0,), "deadlock", "circle", no_warm_up),
    "receive first": Planted(STAGES, (0,), "deadlock", "circle", receive_first),
    "whole sequences": Planted(TWO, (1,), "mismatch", "", other="sequence_parallel=False"),
    "another micro-batch": Planted(
        f"{TWO} micro_batches=2", (0,), "mismatch", "", other="micro_batches=1 micro_batch=2"
    ),
    "another precision": Planted(TWO, (1,), "mismatch", "", other="precision=fp32"),
    "another wire": Planted("tensor=1 data=2", (1,), "mismatch", "", other="wire=bf16"),
    "another policy": Planted(TWO, (1,), "mismatch", "", other="policy=layer_input"),
    "another schedule": Planted(
        "tensor=2 data=1 pipeline=2 micro_batches=3", (3,), "mismatch", "", other="schedule=zb-h1"
    ),
    "another split on a rank": Planted(
        "tensor=2 data=1 pipeline=2 layers=4 stage_layers=2,2",
        (3,),
        "mismatch",
        "",
        other="stage_layers=1,3",
    ),
    "another split on a stage": Planted(
        "tensor=1 data=1 pipeline=2 layers=4 stage_layers=2,2",
        (1,),
        "weights",
        "layers.1.attention_norm",
        other="stage_layers=1,3",
    ),
    "another vocabulary": Planted(TWO, (1,), "weights", "", other="vocab=62"),
    "another width": Planted(TWO, (1,), "weights", "", other="ffn=44"),
    "a layer more": Planted(TWO, (1,), "mismatch", "", other="layers=3"),
    "an early step": Planted("tensor=1 data=2", (0,), "mismatch", "", other="early=True"),
    "two chunks": Planted(TWO, (1,), "mismatch", "", other="overlap=full"),
    "tied": Planted("tensor=1 data=2", (1,), "mismatch", "", other="tied=True"),
    "heads shared": Planted("tensor=1 data=2", (1,), "mismatch", "", other="kv_heads=4"),
    "another batch": Planted("tensor=1 data=2", (1,), "mismatch", "", other="micro_batches=2"),
    "another number of chunks": Planted(
        "tensor=1 data=1 pipeline=2 layers=4",
        (1,),
        "mismatch",
        "",
        other="schedule=zb-v",
    ),
    "another grid": Planted(
        "tensor=2 data=1 pipeline=2 layers=4", (2,), "groups", "", other="tensor=4 pipeline=1"
    ),
}
