"""Faults planted in the package, each of a kind that a layout could have; all must be found."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from megallama.dist.handle import Done
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
    """Gradients are reduced when the first micro-batch's have landed."""

    def too_soon(run: Any, *given: Any, **named: Any) -> Any:
        trainer.zero.expect_last_micro_batch()
        trainer.zero.expect_last_micro_batch = lambda: None  # type: ignore[method-assign]
        return run(*given, **named)

    _around(trainer.step, "run", too_soon)


def _not_waited_for(trainer: Trainer) -> None:
    """Reduced gradients are read without waiting for them, and come late."""
    worker = trainer.zero.groups.data._worker

    def hold_up(expect: Any) -> None:
        worker.submit(lambda: time.sleep(0.5), 0)
        expect()

    _around(trainer.zero, "expect_last_micro_batch", hold_up)
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
    entropy = trainer.model.head.output.cross_entropy
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
}
