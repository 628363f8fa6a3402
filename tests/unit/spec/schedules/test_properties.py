"""Every schedule against its published figures; `python -m tests.schedules` goes further."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.config.schedules import VIRTUAL_STAGES, default_virtual_stages
from megallama.errors import ConfigError
from megallama.spec.schedules.actions import Compute, Receive, Reduce, Schedule, Send, passes
from megallama.spec.schedules.build import NAMES, make_schedule
from megallama.spec.schedules.messages import whole_lists
from megallama.spec.schedules.simulate import simulate
from tests.schedules.closed_forms import bubble, virtual_stages
from tests.schedules.properties import (
    check,
    check_ends,
    check_evaluation,
    check_memory,
    check_messages,
    check_order,
)

TIMES = st.one_of(
    st.tuples(*[st.floats(0.125, 8)] * 3), st.floats(0.125, 8).map(lambda t: (t,) * 3)
)


@pytest.mark.parametrize("name", NAMES)
def test_small_schedules_are_what_is_published(name: str) -> None:
    """With every remainder of m by p, and past 2p, where the steady state has begun."""
    for p in range(1, 9):
        for m in (*range(1, 2 * p + 4), 24):
            for v in virtual_stages(name, 4):
                check(name, p, m, v)


def larger(seed: int, count: int) -> list[tuple[str, int, int, int]]:
    """Drawn p ≤ 16, m ≤ 64, v ≤ 4, at least one of p and m above the small ones; names in turn."""
    draw = random.Random(seed)
    found: list[tuple[str, int, int, int]] = []
    while len(found) < count:
        name = NAMES[len(found) % len(NAMES)]
        p, m = draw.randint(1, 16), draw.randint(1, 64)
        if p > 8 or m > 24:
            found.append((name, p, m, draw.choice(virtual_stages(name, 4))))
    return found


def test_a_hundred_larger_schedules_too() -> None:
    for name, p, m, v in larger(seed=4, count=100):
        check(name, p, m, v)


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_runs_the_forwards_alone(name: str) -> None:
    for p, m in ((1, 3), (2, 1), (3, 7), (4, 8), (8, 5)):
        check_evaluation(make_schedule(name, p, m, default_virtual_stages(name)))


@pytest.mark.parametrize("p, m", [(1, 1), (3, 5), (4, 8)])
def test_one_chunk_interleaved_is_not_interleaved(p: int, m: int) -> None:
    for name, plain in (("interleaved", "1f1b"), ("interleaved-fused", "1f1b-fused")):
        assert make_schedule(name, p, m, 1).actions == make_schedule(plain, p, m).actions


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(NAMES), st.integers(1, 6), st.integers(1, 14), st.integers(2, 3), TIMES)
def test_the_published_bubbles_hold_for_other_times(
    name: str, p: int, m: int, v: int, times: tuple[float, float, float]
) -> None:
    v = VIRTUAL_STAGES[name] or v
    schedule = make_schedule(name, p, m, v)
    simulation = simulate(schedule, *times)
    check_order(schedule, simulation)
    published = bubble(name, p, m, v, times)
    if published is not None:
        assert simulation.bubble == pytest.approx(published, abs=1e-9)


@pytest.mark.parametrize("p, m", [(2, 3), (4, 7), (4, 8), (8, 15), (8, 24)])
def test_makespans(p: int, m: int) -> None:
    """arXiv 2401.10241 §4: without post-validation the last rank's lag is paid after all."""

    def makespan(name: str, v: int = 1) -> float:
        return simulate(make_schedule(name, p, m, v)).makespan

    assert makespan("1f1b") == 3 * (m + p - 1)
    assert makespan("1f1b-fused") == 3 * (m + p - 1)
    for v in (2, 3):
        whole = m - m % p or p
        interleaved = simulate(make_schedule("interleaved", p, whole, v)).makespan
        assert interleaved == pytest.approx(3 * whole + 3 * (p - 1) / v)
        fused = simulate(make_schedule("interleaved-fused", p, whole, v)).makespan
        assert fused == pytest.approx(interleaved)
    assert makespan("zb-h2") == 3 * m + p - 1  # no bubble on any rank, but rank p-1 begins late
    assert makespan("zb-v", 2) == 3 * m + (p - 1) / 2


def test_where_b_and_w_are_one_pass() -> None:
    """Apart only where the gradient leaves for another rank, or W comes later than B."""
    for name in NAMES:
        schedule = make_schedule(name, 4, 9, default_virtual_stages(name))
        for rank, actions in enumerate(schedule.actions):
            for before, after in pairwise(passes(actions)):
                if before.kind == "B" and after.kind == "W" and before.chunk == after.chunk:
                    same = before.micro_batch == after.micro_batch
                    below = schedule.owners[before.chunk - 1] if before.chunk else rank
                    assert not (same and below == rank), f"{name} rank {rank}: {before}, {after}"
    for name in ("zb-h1", "zb-h2", "zb-v"):
        alone = make_schedule(name, 1, 4, default_virtual_stages(name))
        assert {one.kind for one in passes(alone.actions[0])} == {"F", "BW"}


def test_a_list_in_full() -> None:
    """The last but one of four ranks, three micro-batches, 1F1B: by hand."""
    words = []
    for action in make_schedule("1f1b", 4, 3).actions[2]:
        peer = getattr(action, "peer", None)
        text = action.label if peer is not None else str(action)  # type: ignore[union-attr]
        words.append(text if peer is None else f"{type(action).__name__} {peer}: {text}")
    assert words == [
        "Receive 1: activations of F(1, 0)",
        "Receive 1: activations of F(1, 1)",
        "F(2, 0)",
        "Send 3: activations of F(2, 0)",
        "Receive 3: gradient of B(3, 0)",
        "F(2, 1)",
        "Send 3: activations of F(2, 1)",
        "Receive 1: activations of F(1, 2)",
        "BW(2, 0)",
        "Send 1: gradient of B(2, 0)",
        "Receive 3: gradient of B(3, 1)",
        "F(2, 2)",
        "Send 3: activations of F(2, 2)",
        "Receive 3: gradient of B(3, 2)",
        "BW(2, 1)",
        "Send 1: gradient of B(2, 1)",
        "BW(2, 2)",
        "Send 1: gradient of B(2, 2)",
        "Reduce(chunk=2)",
        "Step()",
    ]


@pytest.mark.parametrize(
    "words, line",
    [
        (("zb", 2, 2, 1), "schedule 'zb': is not a schedule; use one of gpipe, 1f1b, interleaved"),
        (("1f1b", 2, 2, 2), "1f1b with 2 virtual stages: it takes 1; give 1, or use interleaved"),
        (("zb-v", 2, 2, 1), "zb-v with 1 virtual stages: it takes 2; give 2"),
        (("gpipe", 0, 2, 1), "schedule gpipe with 0 stages: give at least 1"),
        (("gpipe", 2, 0, 1), "schedule gpipe with 0 micro-batches: give at least 1"),
        (("interleaved", 2, 2, 0), "schedule interleaved with 0 virtual stages: give at least 1"),
    ],
)
def test_what_cannot_be_made(words: tuple[str, int, int, int], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_schedule(*words)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def moved(schedule: Schedule, kind: type, by: int) -> Schedule:
    """The last rank's last action of a kind moved by some places."""
    actions = list(schedule.actions[-1])
    place = max(index for index, action in enumerate(actions) if isinstance(action, kind))
    actions.insert(place + by, actions.pop(place))
    return replace(schedule, actions=(*schedule.actions[:-1], tuple(actions)))


@pytest.mark.parametrize("kind, by", [(Receive, 1), (Receive, -1), (Send, 1), (Reduce, -2)])
def test_a_message_or_reduce_out_of_its_place_is_found(kind: type, by: int) -> None:
    schedule = make_schedule("zb-h1", 3, 4)
    check_messages(schedule)
    check_ends(schedule)
    check_it = check_ends if kind is Reduce else check_messages
    with pytest.raises(AssertionError):
        check_it(moved(schedule, kind, by))


@pytest.mark.parametrize("kind", ["none", "B", "W"])
def test_passes_out_of_order_are_found(kind: str) -> None:
    """Micro-batches 0 and 1 swapped in all passes of a kind: it runs, and adds in another order."""
    schedule = make_schedule("gpipe", 2, 3)
    ranks = [
        [one for one in passes(actions) if one.kind == "F"]
        + [Compute("B", rank, i) for i in ((1, 0, 2) if kind == "B" else (0, 1, 2))]
        + [Compute("W", rank, i) for i in ((1, 0, 2) if kind == "W" else (0, 1, 2))]
        for rank, actions in enumerate(schedule.actions)
    ]
    split = replace(schedule, actions=whole_lists(ranks, schedule.owners))
    if kind == "none":
        check_order(split, simulate(split))
    else:
        with pytest.raises(AssertionError, match=rf"{kind}\(0, 1\) before"):
            check_order(split, simulate(split))


@pytest.mark.parametrize("name", ["1f1b", "zb-h2"])
def test_one_forward_more_in_the_warm_up_is_found(name: str) -> None:
    schedule = make_schedule(name, 3, 8)
    ranks = []
    for actions in schedule.actions:
        order = list(passes(actions))
        first = next(index for index, one in enumerate(order) if one.kind != "F")
        late = next(index for index in range(first, len(order)) if order[index].kind == "F")
        order.insert(first, order.pop(late))
        ranks.append(order)
    more = replace(schedule, actions=whole_lists(ranks, schedule.owners))
    check_memory(name, schedule, 1)
    with pytest.raises(AssertionError, match="sets"):
        check_memory(name, more, 1)
