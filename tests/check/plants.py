"""Changes to a rank's trainer before its first step, of which `planted` has the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megallama.dist.group import COVER, SingleGroup
from megallama.dist.handle import Done, Handle
from megallama.train.build import Trainer


def around(owner: Any, name: str, change: Callable[..., Any]) -> None:
    """Replace a method by `change(method, …)`."""
    method = getattr(owner, name)
    setattr(owner, name, lambda *given, **named: change(method, *given, **named))


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


def _at_gather(trainer: Trainer, number: int, change: Callable[..., Any]) -> None:
    """In place of the `number`th gather, from 1, what `change(gather, x, out)` does."""
    group, calls = trainer.model.tokens.group, []

    def gather(method: Any, x: Tensor, out: Any = None) -> Any:
        calls.append(1)
        return change(method, x, out) if len(calls) == number else method(x, out)

    around(group, "all_gather", gather)


def _nothing(trainer: Trainer, x: Tensor) -> Done[Tensor]:
    """What a gather of x would give, from nobody."""
    return Done(x.new_empty(len(x) * trainer.model.tokens.group.size, *x.shape[1:]))


def half_a_gather(trainer: Trainer) -> None:
    """One gather of half the tokens."""

    def half(gather: Any, x: Tensor, out: Any) -> Any:
        gather(x[: len(x) // 2])
        return _nothing(trainer, x)

    _at_gather(trainer, 3, half)


def one_gather_less(trainer: Trainer) -> None:
    """A gather is left out, late in the step."""
    _at_gather(trainer, 17, lambda gather, x, out: _nothing(trainer, x))


def one_gather_more(trainer: Trainer) -> None:
    """A gather is issued twice."""

    def twice(gather: Any, x: Tensor, out: Any) -> Any:
        gather(x)
        return gather(x, out)

    _at_gather(trainer, 9, twice)


def wide_gather(trainer: Trainer) -> None:
    """A gather of fp32 in place of fp64."""
    group = trainer.model.tokens.group
    around(group, "all_gather", lambda method, x, out=None: _narrowed(method, x))


def _narrowed(method: Any, x: Tensor) -> Any:
    return Done(method(x.float()).wait().to(x.dtype))


def sends_swapped(trainer: Trainer) -> None:
    """Two messages leave in the other order."""
    around(trainer.groups["pipeline 0>1"], "send", _relabelled)


def _relabelled(method: Any, x: Tensor, peer: int, label: str) -> Any:
    swap = {"activations of F(0, 0)": "activations of F(0, 1)"}
    return method(x, peer, swap.get(label, label))


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


def sum_left_out(trainer: Trainer) -> None:
    """A rank takes its own part of the step's sum for the whole."""
    trainer.step.tally.world = SingleGroup("world")


def weights_not_waited_for(trainer: Trainer) -> None:
    """The weights of an update are taken for here while they are on their way."""
    trainer.model.state.weight = lambda name: Done(trainer.model.state.weights[name])  # type: ignore[method-assign]
    trainer.model.state.arriving.clear()

    def changing(method: Any) -> Any:
        trainer.model.state.arriving.clear()
        return method()

    around(trainer.zero, "changing_weights", changing)


def scatter_not_waited_for(trainer: Trainer) -> None:
    """One sum over tensor ranks is taken for done as it begins."""
    group, calls = trainer.model.tokens.group, []

    def scatter(method: Any, x: Tensor, wire: Any = None) -> Any:
        calls.append(1)
        handle = method(x, wire)
        return Done(x[: len(x) // group.size]) if len(calls) == 5 else handle

    around(group, "reduce_scatter", scatter)


def sends_not_waited_for(trainer: Trainer) -> None:
    """What is sent may be written over before it has left."""
    link = trainer.groups["pipeline 0>1"]
    around(link, "send", lambda method, *given: Done(method(*given) and None))


def gradients_not_waited_for(trainer: Trainer) -> None:
    """The update does not wait for the sums of gradients."""
    around(trainer.zero, "finish_gradients", lambda method: trainer.zero._reducing.clear())


def norms_over_data_ranks(trainer: Trainer) -> None:
    """A group of the right size with the wrong members."""
    groups = trainer.zero.groups
    trainer.zero.groups = replace(groups, tensor=groups.data)


def narrow_gradients(trainer: Trainer) -> None:
    trainer.zero.wire = torch.bfloat16


def bucket_kept(trainer: Trainer) -> None:
    """The first bucket's updated weights do not leave."""
    kept = trainer.model.state.padded_weights[trainer.zero.buckets[0][0]]

    def gather(method: Any, tensors: Sequence[Tensor]) -> Any:
        return Done(None) if tensors[0] is kept else method(tensors)

    around(trainer.zero.groups.data, "all_gather_rows", gather)


def an_update_more(trainer: Trainer) -> None:
    """Weights leave twice."""

    def finish(method: Any) -> None:
        method()
        with trainer.zero.changing_weights():
            pass

    around(trainer.zero, "finish_gradients", finish)
