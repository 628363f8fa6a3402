"""What must hold of any schedule's lists, whoever made them. Failures are AssertionErrors."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise, product

from megallama.spec.schedules.actions import (
    Compute,
    Fused,
    Receive,
    Reduce,
    Schedule,
    Send,
    Step,
    passes,
)
from megallama.spec.schedules.build import forward_only, make_schedule
from megallama.spec.schedules.promises import peak_in_flight, peak_weight_states
from megallama.spec.schedules.simulate import Simulation, simulate
from tests.schedules import closed_forms

UNIT = (1, 1, 1)
CLOSE = 1e-9  # of a unit of time: a third is no float, and hundreds of them are added

#: (kind, chunk, micro-batch) → (rank, start, end), a BW being both a B and a W.
Times = dict[tuple[str, int, int], tuple[int, float, float]]

#: "activations", "gradient" or "nothing"; the chunk that takes it; the micro-batch.
Content = tuple[str, int, int]


def check(name: str, p: int, m: int, v: int) -> None:
    """Holds a schedule against everything below. Raises AssertionError, ScheduleError."""
    schedule = make_schedule(name, p, m, v)
    simulation = simulate(schedule, *UNIT)
    assert schedule.owners == tuple(closed_forms.owner(name, p, c) for c in range(p * v))
    check_order(schedule, simulation)
    check_messages(schedule)
    check_ends(schedule)
    check_memory(name, schedule, v)
    check_bubble(name, schedule, simulation, v)


def pass_times(simulation: Simulation) -> Times:
    """Every pass's rank and time; each is there once."""
    found: Times = {}
    for rank, timed in enumerate(simulation.ranks):
        for each in timed:
            for one in passes((each.action,)):
                for kind in one.kind:
                    key = (kind, one.chunk, one.micro_batch)
                    assert key not in found, f"{key} twice"
                    found[key] = (rank, each.start, each.end)
    return found


def check_order(schedule: Schedule, simulation: Simulation) -> None:
    """One F, B, W a chunk and micro-batch, on the owner, after what it builds on; B and W of a
    chunk in ascending order of micro-batches; one action a rank at a time."""
    times = pass_times(simulation)
    chunks, micro_batches = range(schedule.chunks), range(schedule.micro_batches)
    assert times.keys() == set(product("FBW", chunks, micro_batches))
    for chunk, i in product(chunks, micro_batches):
        (rank, f_start, f_end), b, w = (times[kind, chunk, i] for kind in "FBW")
        assert rank == b[0] == w[0] == schedule.owners[chunk]
        assert f_end <= b[1]
        assert b[2] <= w[1] or b == w
        if chunk:
            assert times["F", chunk - 1, i][2] <= f_start
            assert b[2] <= times["B", chunk - 1, i][1]
        if i:
            assert times["B", chunk, i - 1][2] <= b[1], f"B({chunk}, {i}) before the one before it"
            assert times["W", chunk, i - 1][2] <= w[1], f"W({chunk}, {i}) before the one before it"
    for timed in simulation.ranks:
        assert all(before.end <= after.start for before, after in pairwise(timed))


def check_messages(schedule: Schedule, kinds: str = "FB") -> None:
    """Every boundary between two ranks is crossed once a micro-batch and direction; receives of a
    pair stand in the order of its sends, and no later, and no earlier, than they have to."""
    sent, posted = defaultdict(list), defaultdict(list)
    needed: dict[tuple[int, Content], int] = {}
    for rank, actions in enumerate(schedule.actions):
        count, made = 0, set()
        for action in actions:
            if isinstance(action, Compute | Fused):
                made = {_output(one) for one in passes((action,))}
                needed |= {(rank, _input(one)): count for one in passes((action,))}
                count += 1
            elif isinstance(action, Send):
                content = (action.what, action.chunk, action.micro_batch)
                assert content in made, f"{action} does not stand behind its pass"
                sent[rank, action.peer].append(content)
            elif isinstance(action, Receive):
                made = set()
                content = (action.what, action.chunk, action.micro_batch)
                posted[action.peer, rank].append((content, count))
    expected: Counter[tuple[int, int]] = Counter()
    for before, after in pairwise(schedule.owners):
        if before != after:
            for pair, kind in (((before, after), "F"), ((after, before), "B")):
                expected[pair] += schedule.micro_batches * (kind in kinds)
    assert {pair: len(contents) for pair, contents in sent.items()} == +expected
    assert sent == {pair: [content for content, _ in each] for pair, each in posted.items()}
    for (_, rank), each in posted.items():
        latest = len(schedule.actions[rank])
        for content, place in reversed(each):
            latest = min(latest, max(0, needed[rank, content] - 1))
            assert place == latest, f"rank {rank} posts {content} at {place}, not at {latest}"


def _output(one: Compute) -> Content:
    if one.kind == "F":
        return ("activations", one.chunk + 1, one.micro_batch)
    return ("nothing" if one.kind == "W" else "gradient", one.chunk - 1, one.micro_batch)


def _input(one: Compute) -> Content:
    what = {"F": "activations", "W": "nothing"}.get(one.kind, "gradient")
    return (what, one.chunk, one.micro_batch)


def check_ends(schedule: Schedule) -> None:
    """Reduce stands behind the chunk's last W or BW, with nothing but its send between; Step ends
    every list; an evaluation's lists have neither."""
    for rank, actions in enumerate(schedule.actions):
        assert [index for index, a in enumerate(actions) if isinstance(a, Step)] == [
            len(actions) - 1
        ]
        whole: list[int] = []
        for index, action in enumerate(actions):
            if isinstance(action, Reduce):
                last = passes(actions[max(0, index - 3) : index])[-1]
                assert isinstance(actions[index - 1], Compute | Fused | Send)
                assert (last.chunk, "W" in last.kind) == (action.chunk, True)
                assert last.micro_batch == schedule.micro_batches - 1
                whole.append(action.chunk)
        assert sorted(whole) == list(schedule.chunks_of(rank))


def check_evaluation(schedule: Schedule) -> None:
    """The F passes alone, in the training's order, with their messages; and they run."""
    forward = forward_only(schedule)
    for actions, training in zip(forward.actions, schedule.actions, strict=True):
        assert not any(isinstance(action, Reduce | Step | Fused) for action in actions)
        assert passes(actions) == tuple(one for one in passes(training) if one.kind == "F")
    check_messages(forward, kinds="F")
    simulate(forward, *UNIT)


def check_memory(name: str, schedule: Schedule, v: int) -> None:
    """Saved sets and weight states, counted here, as promised and as published."""
    p, m = schedule.stages, schedule.micro_batches
    for rank, actions in enumerate(schedule.actions):
        sets = _most_alive(actions, "F", "B")
        states = _most_alive(actions, "B", "W", joined=False)
        assert (sets, states) == (peak_in_flight(actions), peak_weight_states(actions))
        published, exact = closed_forms.in_flight(name, p, m, v, rank)
        assert sets == published if exact else sets <= published, f"rank {rank}: {sets} sets"
        whole = closed_forms.until_weight_gradient(name, p, m, rank)
        if whole is None:
            assert states == 0
        else:
            assert _most_alive(actions, "F", "W") == whole


def _most_alive(actions: tuple[object, ...], first: str, last: str, joined: bool = True) -> int:
    """The most chunks × micro-batches that are between the start of `first` and the end of `last`;
    without `joined` a BW counts for nothing."""
    alive: set[tuple[int, int]] = set()
    most = 0
    for action in actions:
        if isinstance(action, Compute | Fused):
            both = [one for one in passes((action,)) if joined or one.kind != "BW"]
            alive |= {(one.chunk, one.micro_batch) for one in both if first in one.kind}
            most = max(most, len(alive))
            alive -= {(one.chunk, one.micro_batch) for one in both if last in one.kind}
    return most


def check_bubble(name: str, schedule: Schedule, simulation: Simulation, v: int) -> None:
    """In unit times: the published bubble, elsewhere none worse than 1F1B's."""
    p, m = schedule.stages, schedule.micro_batches
    spans = [timed[-1].end - timed[0].start for timed in simulation.ranks]
    bubble = max(spans) - sum(UNIT) * m
    assert abs(bubble - simulation.bubble) < CLOSE
    assert abs(simulation.bubble_fraction - bubble / max(spans)) < CLOSE
    assert bubble < (p - 1) * sum(UNIT) + CLOSE, f"bubble {bubble}: worse than 1F1B's"
    published = closed_forms.bubble(name, p, m, v, UNIT)
    if published is not None:
        assert abs(bubble - published) < CLOSE, f"bubble {bubble}, not {published}"
