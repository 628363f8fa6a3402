"""What the ranks of a pipeline do in a real step is what their schedule's lists say."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from megallama.spec.grid import Place, make_grid
from megallama.spec.memory import kept_bytes
from megallama.spec.schedules.actions import Receive, Schedule, Send
from megallama.spec.schedules.build import make_schedule
from megallama.spec.schedules.promises import peak_in_flight, peak_weight_states
from tests.layouts.case import SCHEDULES, Case
from tests.layouts.pool import Pool, Task
from tests.layouts.walks import Labels, Walk, walk

STAGES = 4


def case_of(schedule: str, micro_batches: int) -> Case:
    """Four stages, with chunks of different sizes where a rank has several."""
    virtual = 2 if schedule.startswith("interleaved") else 1
    two = virtual == 2 or schedule == "zb-v"
    return Case(
        pipeline=STAGES,
        schedule=schedule,
        virtual=virtual,
        stage_layers="1,2,1,1,3,1,2,1" if two else "2,1,3,1",
        layers=12 if two else 7,
        micro_batches=micro_batches,
    )


CASES = {
    f"{schedule}-{micro_batches}": case_of(schedule, micro_batches)
    for schedule in SCHEDULES
    for micro_batches in (3, 9)
}


@pytest.fixture(scope="module")
def walks(pool: Pool) -> dict[str, list[Walk]]:
    """A step of each case, by stage."""
    found = {}
    tasks = [Task(case.ranks, walk, (case,)) for case in CASES.values()]
    for number, outcome in pool.run_all(tasks):
        assert outcome.error is None, outcome.error
        found[list(CASES)[number]] = outcome.results
    return found


@cache
def schedule_of(case: Case) -> Schedule:
    return make_schedule(
        case.schedule, case.pipeline, case.micro_batches, case.chunks // case.pipeline
    )


def messages(schedule: Schedule, kind: type[Send] | type[Receive]) -> Labels:
    """The labels of what a schedule's lists send, or receive, for each ordered pair of ranks."""
    found: Labels = {}
    for rank, actions in enumerate(schedule.actions):
        for action in actions:
            if isinstance(action, kind):
                ends = (rank, action.peer) if kind is Send else (action.peer, rank)
                found.setdefault(ends, []).append(action.label)
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_rank_runs_its_list(walks, name):
    schedule = schedule_of(CASES[name])
    for stage, found in enumerate(walks[name]):
        actions = schedule.actions[stage]
        assert found.stage == stage
        assert found.ran == [str(a) for a in actions if not isinstance(a, Send | Receive)]


@pytest.mark.parametrize("name", CASES)
def test_what_one_sends_the_other_receives_in_that_order(walks, name):
    """In the strict mode, where each send meets its receive and the labels of both are compared."""
    sent = {ends: labels for found in walks[name] for ends, labels in found.sent.items()}
    received = {ends: labels for found in walks[name] for ends, labels in found.received.items()}
    assert sent == received
    schedule = schedule_of(CASES[name])
    assert sent == messages(schedule, Send)
    assert received == messages(schedule, Receive)
    assert set(sent) == schedule.links
    for found in walks[name]:  # each rank is an end of what it sent and received
        assert {source for source, _ in found.sent} <= {found.stage}
        assert {destination for _, destination in found.received} <= {found.stage}


@pytest.mark.parametrize("name", CASES)
def test_what_arrives_is_what_was_sent(walks, name):
    """Nothing is changed while it is still being sent, and no buffer is used twice."""
    sent, received = {}, {}
    for found in walks[name]:
        sent |= found.sent_contents
        received |= found.received_contents
    assert sent == received
    assert len(set(sent.values())) == len(sent) > 0


@pytest.mark.parametrize("name", CASES)
def test_as_many_sets_are_held_as_the_schedule_promises(walks, name):
    schedule = schedule_of(CASES[name])
    for found, actions in zip(walks[name], schedule.actions, strict=True):
        assert found.sets == peak_in_flight(actions)
        assert found.states == peak_weight_states(actions)
        assert found.left == 0


@pytest.mark.parametrize("name", CASES)
def test_as_many_bytes_are_held_as_the_memory_figures_say(walks, name):
    """To the byte; a fused action's backward lets go of layers while its forward fills others."""
    case = CASES[name]
    config, schedule = case.config(1.0), schedule_of(case)
    grid = make_grid(config, case.ranks)
    for found, actions in zip(walks[name], schedule.actions, strict=True):
        said = kept_bytes(config, Place(grid, found.stage), actions)
        assert found.state_bytes == said.get("saved from B to W", 0)
        if case.schedule.endswith("-fused"):
            assert 0 < found.saved_bytes <= said["saved activations"]
        else:
            assert found.saved_bytes == said["saved activations"]


@pytest.mark.parametrize("schedule", ["zb-h1", "zb-v", "interleaved-fused"])
def test_tensor_ranks_walk_alike(pool, schedule):
    """Each has links of its own; a W that fills the waits of a B lets go of its state no later."""
    case = replace(case_of(schedule, 5), tensor=2)
    outcome = pool.run(Task(case.ranks, walk, (case,)))
    assert outcome.error is None, outcome.error
    lists = schedule_of(case).actions
    for rank, found in enumerate(outcome.results):
        actions = lists[rank // 2]
        assert (found.stage, found.left) == (rank // 2, 0)
        assert (found.sets, found.states) == (peak_in_flight(actions), peak_weight_states(actions))
        assert found.ran == [str(a) for a in actions if not isinstance(a, Send | Receive)]
    for one, other in zip(outcome.results[::2], outcome.results[1::2], strict=True):
        assert (one.sent, one.received) == (other.sent, other.received)
        assert one.received_contents.keys() == other.received_contents.keys()
