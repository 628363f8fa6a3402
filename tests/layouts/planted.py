"""Faults planted in the package, each of a kind that a layout could have; all must be found."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from megallama.autograd.stash import Stash
from megallama.dist.handle import Done
from megallama.parallel.pipeline import Pipeline
from megallama.spec.schedules.actions import Action, Compute, Receive
from megallama.train.build import Trainer


@dataclass(frozen=True)
class Fault:
    """How a fault is planted in a rank's trainer, a case that shows it, and what is said then."""

    plant: Callable[[Trainer], None]
    case: str
    found: str


def _around(owner: Any, name: str, change: Callable[..., Any]) -> None:
    """Replace a method by `change(method, …)`."""
    method = getattr(owner, name)
    setattr(owner, name, lambda *given, **named: change(method, *given, **named))


def _is(trainer: Trainer, tensor: int, data: int) -> bool:
    place = trainer.place
    return (place.along("tensor"), place.along("data")) == (tensor, data)


def _one_gradient(trainer: Trainer) -> None:
    """One rank's part of one gradient is off by 1e-9 of itself."""
    if not _is(trainer, 1, 1):
        return
    gradient = trainer.model.state.own_gradients["layers.0.w2"]
    _around(trainer.zero, "finish_gradients", lambda f: (f(), gradient.mul_(1 + 1e-9)))


def _norms_apart(trainer: Trainer) -> None:
    """The norms' gradients are left as each tensor rank has them."""
    trainer.zero._norm_gradients = lambda: []  # type: ignore[method-assign]


def _half_a_key(trainer: Trainer) -> None:
    """Replicated key/value heads count half."""
    parts = trainer.zero._key_value_gradients

    def halved() -> None:
        for part in parts():
            part.mul_(0.5)

    _around(trainer.zero, "finish_gradients", lambda f: (f(), halved()))


def _early(trainer: Trainer) -> None:
    """Gradients are reduced when the first micro-batch's have landed, and before the next's do."""
    zero, state = trainer.zero, trainer.model.state
    _around(zero.groups.data, "reduce_scatter_rows", lambda f, *given: Done(f(*given).wait()))
    _around(zero, "expect", lambda expect, micro_batches: expect(1))

    def once(landed: Any, name: str) -> None:
        if zero._bucket_of[state.parameter_of[name]] in zero._missing:
            landed(name)

    _around(state, "on_landed", once)


def _not_waited_for(trainer: Trainer) -> None:
    """Reduced gradients are read without waiting for them, and come after the update."""
    worker, updated = trainer.zero.groups.data._worker, threading.Event()

    def hold_up(expect: Any, micro_batches: int) -> None:
        updated.clear()
        worker.submit(updated.wait, 0)
        expect(micro_batches)

    def update(step: Any, lr: float, divisor: Tensor) -> None:
        step(lr, divisor)
        updated.set()

    _around(trainer.zero, "expect", hold_up)
    _around(trainer.optimizer, "step", update)
    _around(trainer.zero, "finish_gradients", lambda f: (trainer.zero._reducing.clear(), f()))


def _own_tokens(trainer: Trainer) -> None:
    """A data rank divides by its own valid tokens."""

    def divided(step: Any, lr: float, divisor: Tensor) -> None:
        step(lr, divisor * (1 + 0.5 * trainer.place.along("data")))

    _around(trainer.optimizer, "step", divided)


def _rate(trainer: Trainer) -> None:
    """Updates are 0.2% too large: far below the weights' tolerance in fp32."""
    _around(trainer.optimizer, "step", lambda step, lr, divisor: step(lr * 1.002, divisor))


def _padding(trainer: Trainer) -> None:
    """Padding of the vocabulary has probability."""
    head = trainer.model.chunks[0].head
    assert head is not None
    entropy = head.output.cross_entropy
    rows = len(trainer.model.state.weights["output"])
    entropy.vocab = replace(entropy.vocab, rows=rows)


def _old_weights(trainer: Trainer) -> None:
    """One data rank goes on with the other rank's old weights."""
    if trainer.place.along("data") != 1:
        return
    group = trainer.zero.groups.data

    def gather(all_gather_rows: Any, tensors: Any) -> Any:
        copies = [tensor.clone() for tensor in tensors]
        all_gather_rows(tensors).wait()
        rows = [len(tensor) // group.size for tensor in tensors]
        for tensor, copy, n in zip(tensors, copies, rows, strict=True):
            tensor[:n] = copy[:n]
        return Done(None)

    _around(group, "all_gather_rows", gather)


def _stage(trainer: Trainer) -> int:
    return trainer.place.along("pipeline")


def _w_left_out(trainer: Trainer) -> None:
    """The last stage never runs the W of its first micro-batch."""
    if _stage(trainer) == 1:
        _change_list(trainer, lambda actions: [a for a in actions if a != Compute("W", 1, 0)])


def _w_again(trainer: Trainer) -> None:
    """The last stage's second W is its first one again."""
    if _stage(trainer) == 1:
        kept: list[Any] = []

        def again(backward_weights: Any, batch: Any, state: Stash) -> Any:
            kept.append((batch, {key: dict(saved) for key, saved in state._sets.items()}))
            if len(kept) == 2:
                batch, state._sets = kept[0]
            return backward_weights(batch, state)

        _around(trainer.model.chunks[1], "backward_weights", again)


def _w_late(trainer: Trainer) -> None:
    """The last stage adds the gradients of two micro-batches in another order."""
    if _stage(trainer) == 1:
        two = Compute("W", 1, 1), Compute("W", 1, 2)
        _change_list(trainer, lambda actions: _swapped(actions, *two))


def _received_for_another(trainer: Trainer) -> None:
    """The last stage posts two receives in another order than their sends."""
    if _stage(trainer) == 1:
        two = [action for action in _list(trainer) if isinstance(action, Receive)][:2]
        _change_list(trainer, lambda actions: _swapped(actions, *two))


def _taken_for_another(trainer: Trainer) -> None:
    """The last stage's second forward takes the first one's activations."""
    if _stage(trainer) == 1:
        inputs: list[Tensor] = []

        def stale(forward: Any, batch: Any, x: Tensor, stash: Any) -> Any:
            inputs.append(x)
            return forward(batch, inputs[0] if len(inputs) == 2 else x, stash)

        _around(trainer.model.chunks[1], "forward", stale)


def _tied_apart(trainer: Trainer) -> None:
    """Tied embeddings each keep the gradient of their own stage."""
    trainer.zero.groups = replace(trainer.zero.groups, tied=None)


def _norm_of_one(trainer: Trainer) -> None:
    """The gradient norm misses a stage."""
    if _stage(trainer) == 1:
        _around(trainer.step.tally, "_gradient_squares", lambda squares: squares().zero_())


def _norm_of_copy(trainer: Trainer) -> None:
    """The gradient norm counts the tied embedding on both stages."""
    if _stage(trainer) == 1:
        table = trainer.model.state.table
        counted = [
            replace(s, own_pieces=tuple(replace(p, owned=True) for p in s.own_pieces))
            for s in table
        ]

        def all_of_it(squares: Any) -> Any:
            trainer.model.state.table = tuple(counted)
            try:
                return squares()
            finally:
                trainer.model.state.table = table

        _around(trainer.step.tally, "_gradient_squares", all_of_it)


def _not_taken_back(trainer: Trainer) -> None:
    """One stage keeps an early update that clipping takes back."""
    if _stage(trainer) == 1:
        trainer.step.early.take_back = lambda: None  # type: ignore[method-assign,union-attr]


def _counts_on(trainer: Trainer) -> None:
    """An update that was taken back still counts, in AdamW's bias corrections."""

    def counted(take_back: Any) -> None:
        take_back()
        trainer.optimizer.updates += 1

    _around(trainer.step.early, "take_back", counted)


def _pipeline(trainer: Trainer) -> Pipeline:
    """This rank's, of a step; it is made once."""
    train = trainer.config.train
    return trainer.step.pipelines.train(train.global_batch // train.micro_batch)


def _list(trainer: Trainer) -> tuple[Action, ...]:
    return _pipeline(trainer).schedule.actions[_stage(trainer)]


def _change_list(trainer: Trainer, change: Callable[[tuple[Action, ...]], list[Action]]) -> None:
    pipeline = _pipeline(trainer)
    actions = list(pipeline.schedule.actions)
    actions[pipeline.rank] = tuple(change(actions[pipeline.rank]))
    pipeline.schedule = replace(pipeline.schedule, actions=tuple(actions))


def _swapped(actions: Sequence[Action], one: Action, other: Action) -> list[Action]:
    swap = {one: other, other: one}
    return [swap.get(action, action) for action in actions]


PIPELINE = "tensor=1 data=1 pipeline=2 micro_batches=2"
PLANTED = {
    "one gradient": Fault(
        _one_gradient, "tensor=2 data=2", "gradient layers.0.feed_forward.w2.weight: relative"
    ),
    "norms apart": Fault(_norms_apart, "tensor=2 data=1", "norm.weight: rank 1 holds other bits"),
    "half a key": Fault(_half_a_key, "tensor=4 data=2 kv_heads=2", "attention.wk.weight: relative"),
    "early reduction": Fault(_early, "tensor=1 data=2 micro_batches=2", "step 1 gradient"),
    "not waited for": Fault(_not_waited_for, "tensor=1 data=2", "step 1 gradient"),
    "own tokens": Fault(_own_tokens, "tensor=1 data=2", "step 1 update"),
    "learning rate": Fault(_rate, "tensor=2 data=1 precision=fp32", "step 1 update"),
    "padding": Fault(_padding, "tensor=8 data=1 vocab=13", "step 1 loss"),
    "old weights": Fault(_old_weights, "tensor=1 data=2", "holds other bits"),
    "W left out": Fault(_w_left_out, f"{PIPELINE} schedule=zb-h2", "chunk 1: gradients have not"),
    "W again": Fault(_w_again, f"{PIPELINE} schedule=zb-h1", "step 1 gradient layers.1"),
    "W late": Fault(
        _w_late,
        "tensor=1 data=1 pipeline=2 micro_batches=3 schedule=zb-h1",
        "gradients layers.1.attention.wk.weight: other bits than in one",
    ),
    "received for another": Fault(
        _received_for_another, f"{PIPELINE} schedule=gpipe", "they differ: rank"
    ),
    "taken for another": Fault(_taken_for_another, PIPELINE, "step 1 loss: relative"),
    "tied apart": Fault(_tied_apart, f"{PIPELINE} tied=True", "tok_embeddings.weight: rank 1"),
    "norm of one": Fault(_norm_of_one, PIPELINE, "step 1 gradient norm: relative"),
    "norm of copy": Fault(_norm_of_copy, f"{PIPELINE} tied=True", "step 1 gradient norm: relative"),
    "not taken back": Fault(_not_taken_back, f"{PIPELINE} early=True", "update"),
    "counts on": Fault(_counts_on, f"{PIPELINE} early=True", "update"),
}
