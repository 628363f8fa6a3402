"""The planner's pipeline against the simulator that checks schedules, and its steady state."""

from __future__ import annotations

import pytest

from megallama.config.schedules import VIRTUAL_STAGES
from megallama.plan.pipeline import compile_plan, few_micro_batches, period, plan_of
from megallama.spec.schedules.build import NAMES, make_schedule
from megallama.spec.schedules.simulate import simulate

SECONDS = {"F": 1.0, "B": 1.5, "W": 0.75, "BW": 2.25}


def chunks(name: str) -> int:
    return VIRTUAL_STAGES[name] or 3


def seconds(plan, virtual: int = 1):
    """Of every kind of pass; a chunk has its part of a rank's."""
    found = {}
    for key in plan.keys:
        kind = key[0].rstrip("+-")
        time = SECONDS["F"] + SECONDS["BW"] if kind == "FB" else SECONDS[kind]
        found[key] = time / virtual
    return found


@pytest.mark.parametrize("latency", [0.0, 0.3])
@pytest.mark.parametrize("stages, micro_batches", [(1, 3), (2, 2), (4, 4), (4, 11), (6, 30)])
@pytest.mark.parametrize("name", NAMES)
def test_the_simulator_s_times(name, stages, micro_batches, latency):
    schedule = make_schedule(name, stages, micro_batches, chunks(name))
    plan = compile_plan(schedule, fills=False)
    times = plan.run(seconds(plan, chunks(name)), latency)
    truth = simulate(schedule, SECONDS["F"], SECONDS["B"], SECONDS["W"], latency)
    assert plan.makespan(times) == pytest.approx(truth.makespan, rel=1e-12)
    for rank, timed in enumerate(truth.ranks):
        mine = [i for i, node in enumerate(plan.nodes) if node.rank == rank]
        assert [plan.nodes[i].action for i in mine] == [each.action for each in timed]
        assert [times.starts[i] for i in mine] == pytest.approx([each.start for each in timed])


@pytest.mark.parametrize("slow", [1.0, 1.3])
@pytest.mark.parametrize("micro_batches", [40, 57, 96])
@pytest.mark.parametrize("name", NAMES)
def test_the_steady_state_goes_on(name, micro_batches, slow):
    """Also where the last rank's passes are longer, as those of the head's rank are."""
    stages, virtual = 4, chunks(name)

    def makespan(count: int) -> float:
        plan = plan_of(name, stages, count, virtual, True)
        each = seconds(plan)
        for key in each:
            if plan.schedule.owners[key[1]] == stages - 1:
                each[key] *= slow
        return plan.makespan(plan.run(each, 0.1))

    few = few_micro_batches(name, stages, micro_batches)
    step = period(name, stages)
    assert few < micro_batches  # it is extended
    assert (micro_batches - few) % step == 0
    first = makespan(few)
    extended = first + (micro_batches - few) // step * (makespan(few + step) - first)
    assert extended == pytest.approx(makespan(micro_batches), rel=1e-3)


def test_a_filled_b_and_what_is_left_of_its_w_are_kinds_of_their_own():
    plan = plan_of("zb-h1", 4, 8, 1, True)
    kinds = {key[0] for key in plan.keys}
    assert kinds == {"F", "B", "W", "BW", "B+", "W-"}
    assert {key[0] for key in plan_of("zb-h1", 4, 8, 1, False).keys} == {"F", "B", "W", "BW"}
    counts = {kind: sum(key[0] == kind for key in work) for work in plan.work for kind in kinds}
    assert counts["B+"] == counts["W-"]


def test_blocked_messages_take_the_rank_s_own_time():
    plan = plan_of("1f1b", 3, 1, 1, False)
    free, blocked = (plan.makespan(plan.run(seconds(plan), 0.0, blocked=b)) for b in (0.0, 0.1))
    # F sends, takes and sends, takes; the backward in reverse: 4 + 4 messages on the one path.
    assert blocked - free == pytest.approx(0.8)
