"""The simulator: against a longest path of its own, by hand, and on lists that cannot run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.config.schedules import VIRTUAL_STAGES
from megallama.spec.schedules.actions import Action, Compute, Fused, Receive, Schedule, Send, passes
from megallama.spec.schedules.build import NAMES, make_schedule
from megallama.spec.schedules.messages import whole_lists
from megallama.spec.schedules.simulate import ScheduleError, simulate


def longest_path(
    schedule: Schedule, times: tuple[float, float, float], latency: float
) -> dict[str, float]:
    """Start of every pass or fused action: the longest path to it, by relaxation until none
    moves. A message goes from the end of its maker, or of what its receive stands behind."""
    v = schedule.chunks // schedule.stages
    seconds = dict(zip("FBW", times, strict=True))
    starts: dict[str, float] = {}
    ends: dict[tuple[str, int, int], float] = {}
    moved = True
    while moved:
        moved = False
        for actions in schedule.actions:
            free, posted = 0.0, {}
            for action in actions:
                if isinstance(action, Receive):
                    posted[action.label] = free
                if not isinstance(action, Compute | Fused):
                    continue
                both, start = passes((action,)), free
                for one in both:
                    kind, step, what = ("F", -1, "activations") if one.kind == "F" else (
                        ("B", 1, "gradient"))  # fmt: skip
                    label = f"{what} of {kind}({one.chunk + step}, {one.micro_batch})"
                    made = ends.get((kind, one.chunk + step, one.micro_batch), 0.0)
                    if one.kind != "W" and label in posted:
                        start = max(start, max(made, posted[label]) + latency)
                free = start + sum(seconds[kind] for one in both for kind in one.kind) / v
                moved |= starts.get(str(action)) != start
                starts[str(action)] = start
                ends |= {(k, one.chunk, one.micro_batch): free for one in both for k in one.kind}
    return starts


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(NAMES), st.integers(1, 4), st.integers(1, 6), st.integers(2, 3),
    st.tuples(*[st.floats(0, 4)] * 3), st.floats(0, 3),
)  # fmt: skip
def test_every_start_is_the_longest_path(
    name: str, p: int, m: int, v: int, times: tuple[float, float, float], latency: float
) -> None:
    schedule = make_schedule(name, p, m, VIRTUAL_STAGES[name] or v)
    simulation = simulate(schedule, *times, latency)
    found = {str(each.action): each.start for timed in simulation.ranks for each in timed}
    assert found == pytest.approx(longest_path(schedule, times, latency), abs=1e-9)


def test_a_step_by_hand() -> None:
    """1F1B, two ranks, two micro-batches, F = 1, B = W = 2, a message takes 0.5."""
    simulation = simulate(make_schedule("1f1b", 2, 2), 1, 2, 2, latency=0.5)
    starts = [[(str(t.action), t.start, t.end) for t in timed] for timed in simulation.ranks]
    assert starts == [
        [("F(0, 0)", 0, 1), ("F(0, 1)", 1, 2), ("BW(0, 0)", 7, 11), ("BW(0, 1)", 12, 16)],
        [("F(1, 0)", 1.5, 2.5), ("BW(1, 0)", 2.5, 6.5), ("F(1, 1)", 6.5, 7.5),
         ("BW(1, 1)", 7.5, 11.5)],
    ]  # fmt: skip
    assert (simulation.makespan, simulation.bubble) == (16, 6)
    assert simulation.bubble_fraction == 6 / 16
    assert simulation.peak_in_flight == (2, 1)
    assert simulation.peak_weight_states == (0, 0)


def test_a_receive_posted_late_is_waited_for() -> None:
    """The transfer begins when both sides are there: a posting just before the pass is on its
    path, one pass earlier it is not."""
    early = make_schedule("1f1b", 2, 2)
    one, two = early.actions
    last = next(i for i, a in enumerate(two) if str(a) == "F(1, 1)")
    receive = next(a for a in two if isinstance(a, Receive) and a.micro_batch == 1)
    late = [action for action in two if action != receive]
    late.insert(last - 1, receive)
    assert late[last] == two[last]
    assert simulate(early, 1, 2, 2, latency=1).ranks[1][2].start == 7
    assert simulate(replace(early, actions=(one, tuple(late))), 1, 2, 2, 1).ranks[1][2].start == 8


def test_memory_is_counted_in_shares_of_a_rank() -> None:
    assert simulate(make_schedule("zb-v", 4, 8, 2)).activation_memory == (4, 4, 4, 4)
    assert simulate(make_schedule("1f1b", 4, 8)).activation_memory == (4, 3, 2, 1)


def fused_1f1b(p: int, m: int, more: int) -> Schedule:
    """1F1B's lists with `more` forwards in the warm-up and every pair fused."""
    ranks: list[list[Compute | Fused]] = []
    for rank in range(p):
        warm_up = min(m, p - rank - 1 + more)
        forwards = [Compute("F", rank, i) for i in range(m)]
        backwards = [Compute("BW", rank, i) for i in range(m)]
        pairs = [Fused(f, b) for f, b in zip(forwards[warm_up:], backwards, strict=False)]
        ranks.append([*forwards[:warm_up], *pairs, *backwards[len(pairs) :]])
    owners = tuple(range(p))
    return Schedule("fused", m, owners, whole_lists(ranks, owners))


@pytest.mark.parametrize("p", [1, 2, 3, 8])
def test_fusing_1f1b_as_it_stands_deadlocks(p: int) -> None:
    with pytest.raises(ScheduleError, match=rf"deadlock: rank {p - 1} at F\({p - 1}, 0\)\+BW"):
        simulate(fused_1f1b(p, 16, more=0))


@pytest.mark.parametrize("p, m", [(2, 32), (4, 32), (8, 64)])
def test_one_more_forward_runs_and_takes_almost_twice_the_time(p: int, m: int) -> None:
    """Neighbours take turns: a backward comes back one whole pair late, every time."""
    assert simulate(fused_1f1b(p, m, more=1)).makespan == 3 * (2 * m + p - 3)
    assert simulate(make_schedule("1f1b-fused", p, m)).makespan == 3 * (m + p - 1)


F0, F1 = Compute("F", 0, 0), Compute("F", 1, 0)
BW0, BW1 = Compute("BW", 0, 0), Compute("BW", 1, 0)
TO_1, FROM_0 = Send("activations", 1, 0, 1), Receive("activations", 1, 0, 0)
TO_0, FROM_1 = Send("gradient", 0, 0, 0), Receive("gradient", 0, 0, 1)


def run(*lists: Sequence[Action], micro_batches: int = 1) -> None:
    simulate(Schedule("by hand", micro_batches, (0, 1), tuple(map(tuple, lists))))


def test_the_list_by_hand_runs() -> None:
    run([F0, TO_1, FROM_1, BW0], [FROM_0, F1, BW1, TO_0])


SECOND = (Compute("F", 0, 1), Send("activations", 1, 1, 1))


BAD: dict[str, tuple[tuple[list[Action], ...], str]] = {
    "waits for each other": (
        ([FROM_1, BW0, F0, TO_1], [FROM_0, F1, BW1, TO_0]),
        "deadlock: rank 0 at BW(0, 0) waits for its own F(0, 0)",
    ),
    "never sent": (
        ([F0, FROM_1, BW0], [FROM_0, F1, BW1, TO_0]),
        "deadlock: rank 0 at BW(0, 0) waits for gradient of B(1, 0) from rank 1; "
        "rank 1 at F(1, 0) waits for activations of F(0, 0) from rank 0",
    ),
    "never received": (
        ([F0, TO_1], []),
        "activations for chunk 1 of micro-batch 0 from rank 0 to rank 1 is sent, never",
    ),
    "received, not needed": (
        ([F0], [FROM_0]),
        "activations for chunk 1 of micro-batch 0 from rank 0 to rank 1 is received, never",
    ),
    "not posted": (
        ([F0, TO_1], [F1, FROM_0]),
        "rank 1: F(1, 0) takes activations of F(0, 0); no receive is posted",
    ),
    "the wrong order": (
        ([F0, TO_1, *SECOND], [replace(FROM_0, micro_batch=1), FROM_0, F1]),
        "message 0 from rank 0 to rank 1: activations for chunk 1 of micro-batch 0 is sent, "
        "activations for chunk 1 of micro-batch 1 is received",
    ),
    "W first": (
        ([F0, TO_1], [FROM_0, F1, Compute("W", 1, 0), Compute("B", 1, 0)]),
        "rank 1 at W(1, 0) waits for its own B(1, 0)",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_lists_that_cannot_run(kind: str) -> None:
    lists, words = BAD[kind]
    with pytest.raises(ScheduleError) as caught:
        run(*lists)
    assert words in str(caught.value)


def test_a_rank_that_waits_in_a_ring_is_named_with_what_it_waits_for() -> None:
    """Two ranks, two micro-batches, each waiting for what the other does later."""
    ahead = [F0, TO_1, FROM_1, BW0, *SECOND]
    behind = [FROM_0, F1, Receive("activations", 1, 1, 0), Compute("F", 1, 1), BW1, TO_0]
    with pytest.raises(ScheduleError) as caught:
        run(ahead, behind, micro_batches=2)
    assert str(caught.value) == (
        "deadlock: rank 0 at BW(0, 0) waits for gradient of B(1, 0) from rank 1; "
        "rank 1 at F(1, 1) waits for activations of F(0, 1) from rank 0"
    )
