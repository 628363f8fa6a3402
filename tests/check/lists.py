"""Changes to a rank's list of actions before its first step, of which `planted` has the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from megallama.dist.handle import Done
from megallama.parallel.pipeline import Pipeline
from megallama.spec.schedules.actions import Action, Compute, Fused, Receive, Send
from megallama.spec.schedules.messages import whole_lists
from megallama.spec.schedules.plain import one_f_one_b
from megallama.train.build import Trainer


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


def send_left_out(trainer: Trainer) -> None:
    _lists(trainer, lambda actions: _without(actions, Send))


def receives_swapped(trainer: Trainer) -> None:
    _lists(trainer, lambda actions: _swapped(actions, Receive))


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
