"""From what the ranks of `pipeline_schedules.py` measured to its figures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from pipeline_rank import Step, Walk
from reporting import spread

from megallama.spec.schedules.actions import Compute, Fused, Schedule
from megallama.spec.schedules.messages import halves, taken_by
from megallama.spec.schedules.simulate import Simulation, simulate

Row = dict[str, Any]


def bubble_of(ranks: Walk, work: float) -> float:
    """1 - `work` ÷ the longest span of a rank's own passes."""
    return 1 - work / max(rank[-1][2] - rank[0][1] for rank in ranks)


def delays(schedule: Schedule, ranks: Walk) -> dict[str, list[float]]:
    """How long after what it waited for each pass began, in seconds, by what that was.

    `pass`: the rank's own last pass; `message`: the pass of another rank that made its input.
    """
    lists = [[a for a in rank if isinstance(a, Compute | Fused)] for rank in schedule.actions]
    made: dict[tuple[str, int, int], float] = {}
    for actions, timed in zip(lists, ranks, strict=True):
        for action, (_, _, end) in zip(actions, timed, strict=True):
            made |= {(one.kind[0], one.chunk, one.micro_batch): end for one in halves(action)}
    found: dict[str, list[float]] = {"pass": [], "message": []}
    for actions, timed in zip(lists, ranks, strict=True):
        free = 0.0
        for action, (_, begin, end) in zip(actions, timed, strict=True):
            arrivals = [
                made[one.kind[0], taken.chunk + (-1 if one.kind == "F" else 1), taken.micro_batch]
                for one in halves(action)
                if (taken := taken_by(one, schedule.owners))
            ]
            sent = max(arrivals, default=0.0)
            found["message" if sent > free else "pass"].append(begin - max(sent, free))
            free = end
    return found


def peaks(simulation: Simulation) -> Row:
    """The most held by any rank, in micro-batches of its whole share."""
    virtual = simulation.schedule.chunks // simulation.schedule.stages
    return dict(
        peak_in_flight=max(simulation.peak_in_flight) / virtual,
        peak_weight_states=max(simulation.peak_weight_states) / virtual,
    )


def waits_row(schedule: Schedule, unit: float, rounds: Sequence[Walk]) -> Row:
    """A schedule with F = B = W = `unit` seconds: simulated, measured, how late passes began."""
    simulation = simulate(schedule, unit, unit, unit)
    work = 3 * unit * schedule.micro_batches
    late: dict[str, list[float]] = {"pass": [], "message": []}
    for ranks in rounds:
        for cause, values in delays(schedule, ranks).items():
            late[cause] += values
    makespans = [max(rank[-1][2] for rank in ranks) for ranks in rounds]
    return dict(
        simulated=dict(
            makespan=round(simulation.makespan, 5), bubble=round(simulation.bubble_fraction, 5)
        ),
        makespan=spread(makespans),
        bubble=spread(bubble_of(ranks, work) for ranks in rounds),
        makespan_over_simulated=round(statistics.median(makespans) / simulation.makespan - 1, 4),
        seconds_after_a_pass=round(statistics.median(late["pass"]), 6),
        seconds_after_a_message=round(statistics.median(late["message"]), 6),
        **peaks(simulation),
    )


def steps_row(rounds: Sequence[Sequence[Step]], alone: Sequence[float], micro_batches: int) -> Row:
    """Training steps: seconds of each and of its F, B, W and BW, and one process's over them."""
    steps = [max(end for end, _ in answers) for answers in rounds]
    lengths = [lengths_of([timed for _, timed in answers], micro_batches) for answers in rounds]
    return dict(
        step_seconds=spread(steps),
        speedup=spread(one / step for one, step in zip(alone, steps, strict=True)),
        pass_seconds={kind: spread(each[kind] for each in lengths) for kind in lengths[0]},
    )


def passes_over_simulated(schedule: Schedule, rounds: Sequence[Sequence[Step]]) -> Row:
    """Measured over simulated less 1, first pass to last, with the measured F, B and W of a round.

    The simulation knows one F, one B and one W, here the means over ranks, and takes a BW for their
    sum.
    """
    found = []
    for answers in rounds:
        ranks = [timed for _, timed in answers]
        lengths = lengths_of(ranks, schedule.micro_batches)
        weight = lengths.get("W", 0.0)
        backward = lengths["B"] if weight else lengths["BW"]
        simulated = simulate(schedule, lengths["F"], backward, weight).makespan
        measured = max(timed[-1][2] for timed in ranks) - min(timed[0][1] for timed in ranks)
        found.append(measured / simulated - 1)
    return spread(found)


def lengths_of(ranks: Walk, micro_batches: int) -> dict[str, float]:
    """Seconds of each kind of pass: of a rank's whole share of a micro-batch, the mean of ranks."""
    found: dict[str, list[float]] = {}
    for kind, begin, end in (each for rank in ranks for each in rank):
        found.setdefault(kind, []).append(end - begin)
    chunks = len(found["F"]) / (micro_batches * len(ranks))
    return {kind: chunks * statistics.fmean(values) for kind, values in found.items()}
