"""Faults planted in one rank of a job, or in a few; `megallama check` must find every one.

A fault is another config of a rank, or a change to its trainer before its first step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megallama.check.job import faults, traffic
from megallama.check.matching import Fault, Ranks
from megallama.check.program import Book
from megallama.check.rehearse import How, rehearse
from megallama.spec.grid import Place, make_grid
from megallama.train.build import Trainer
from tests.check import lists, plants
from tests.layouts.case import Case

Plant = Callable[[Trainer], None]


@dataclass(frozen=True)
class Planted:
    """`case`: the layout; `ranks`: those with the fault; `other`: what their case has otherwise;
    `kind` and `says`: of the fault that is to be found."""

    case: str
    ranks: tuple[int, ...]
    kind: str
    says: str
    plant: Plant | None = None
    other: str = ""


def find(planted: Planted) -> Fault | None:
    """Rehearse every rank by itself, those with the fault so, and check the job."""
    case, book = Case.parse(planted.case), Book()
    config, odd = case.config(1.0), Case.parse(f"{planted.case} {planted.other}").config(1.0)
    grid = make_grid(config, case.ranks)
    rehearsals = []
    for rank in range(grid.size):
        wrong = rank in planted.ranks
        place = Place(make_grid(odd, case.ranks) if wrong else grid, rank)
        how = How(planted.plant if wrong else None, steps=2)
        rehearsals.append(rehearse(odd if wrong else config, place, book, how))
    job = Ranks(rehearsals, range(grid.size), [one.members for one in rehearsals])
    sent = (traffic(config, rehearsal) for rehearsal in rehearsals)
    return faults(job, config) or next(filter(None, sent), None)


TWO = "tensor=2 data=1"
STAGES = "tensor=1 data=1 pipeline=2 micro_batches=3"
PLANTED = {
    "gathers swapped": Planted(TWO, (1,), "mismatch", "all_gather", plants.gathers_swapped),
    "sums for scatters": Planted(TWO, (1,), "mismatch", "all_reduce", plants.sums_for_scatters),
    "half a gather": Planted(TWO, (0,), "mismatch", "[4, 32]", plants.half_a_gather),
    "a gather less": Planted(TWO, (1,), "mismatch", "", plants.one_gather_less),
    "a gather more": Planted(TWO, (0,), "mismatch", "", plants.one_gather_more),
    "a gather in fp32": Planted(TWO, (1,), "mismatch", "float32", plants.wide_gather),
    "a send less": Planted(STAGES, (0,), "mismatch", "", lists.send_left_out),
    "sends swapped": Planted(STAGES, (0,), "mismatch", "", plants.sends_swapped),
    "receives swapped": Planted(
        f"{STAGES} schedule=gpipe", (1,), "mismatch", "", lists.receives_swapped
    ),
    "half a message": Planted(STAGES, (0,), "mismatch", "[8, 32]", plants.half_a_message),
    "norms apart": Planted("tensor=2 data=2", (3,), "mismatch", "", plants.norms_apart),
    "heads apart": Planted("tensor=4 data=1 kv_heads=2", (2,), "mismatch", "", plants.heads_apart),
    "tied apart": Planted(f"{STAGES} tied=True", (0,), "mismatch", "", plants.tied_apart),
    "buckets reversed": Planted("tensor=1 data=2", (1,), "mismatch", "", plants.buckets_reversed),
    "equal buckets swapped": Planted(
        "tensor=1 data=2", (1,), "mismatch", "layers.1.", plants.buckets_of_equal_layers_swapped
    ),
    "a bucket in two": Planted("tensor=1 data=2", (1,), "mismatch", "", plants.bucket_split),
    "a bucket too short": Planted("tensor=1 data=2", (0,), "mismatch", "", plants.bucket_short),
    "crosswise": Planted("tensor=2 data=2", (0, 1, 2, 3), "deadlock", "circle", plants.crosswise),
    "no warm-up": Planted(
        f"{STAGES} schedule=1f1b-fused", (0,), "deadlock", "circle", lists.no_warm_up
    ),
    "receive first": Planted(STAGES, (0,), "deadlock", "circle", lists.receive_first),
    "no sum at the end": Planted(
        f"{STAGES} data=2", (2,), "mismatch", "world", plants.sum_left_out
    ),
    "weights not waited for": Planted(
        "tensor=1 data=2 overlap=full",
        (0, 1),
        "wait",
        "all_gather_rows",
        plants.weights_not_waited_for,
    ),
    "a scatter not waited for": Planted(
        TWO, (1,), "wait", "reduce_scatter", plants.scatter_not_waited_for
    ),
    "sends not waited for": Planted(STAGES, (0,), "wait", "send", plants.sends_not_waited_for),
    "gradients not waited for": Planted(
        "tensor=1 data=2", (0, 1), "wait", "reduce_scatter_rows", plants.gradients_not_waited_for
    ),
    "norms over data ranks, on all": Planted(
        "tensor=2 data=2",
        (0, 1, 2, 3),
        "traffic",
        "all_reduce in group 'data'",
        plants.norms_over_data_ranks,
    ),
    "narrow gradients, on all": Planted(
        "tensor=1 data=2", (0, 1), "traffic", "reduce_scatter_rows", plants.narrow_gradients
    ),
    "a bucket too short, on all": Planted(
        "tensor=1 data=2", (0, 1), "traffic", "reduce_scatter_rows", plants.bucket_short
    ),
    "a bucket kept, on all": Planted(
        "tensor=1 data=2", (0, 1), "traffic", "all_gather_rows", plants.bucket_kept
    ),
    "an update more, on all": Planted(
        "tensor=1 data=2", (0, 1), "traffic", "all_gather_rows", plants.an_update_more
    ),
    "no sum at the end, on all": Planted(
        TWO, (0, 1), "traffic", "all_reduce in group 'world'", plants.sum_left_out
    ),
    "no tied sum, on all": Planted(
        f"{STAGES} tied=True", (0, 1), "traffic", "group 'tied'", plants.tied_apart
    ),
    "another wire, on all": Planted("tensor=1 data=2", (0, 1), "traffic", "", other="wire=bf16"),
    "whole sequences": Planted(TWO, (1,), "mismatch", "", other="sequence_parallel=False"),
    "another micro-batch": Planted(
        f"{TWO} micro_batches=2", (0,), "mismatch", "", other="micro_batches=1 micro_batch=2"
    ),
    "another precision": Planted(TWO, (1,), "mismatch", "", other="precision=fp32"),
    "another wire": Planted("tensor=1 data=2", (1,), "mismatch", "", other="wire=bf16"),
    "another policy": Planted(TWO, (1,), "mismatch", "", other="policy=layer_input"),
    "another schedule": Planted(
        "tensor=2 data=1 pipeline=2 micro_batches=3", (3,), "mismatch", "", other="schedule=zb-h1"
    ),
    "another split on a rank": Planted(
        "tensor=2 data=1 pipeline=2 layers=4 stage_layers=2,2",
        (3,),
        "mismatch",
        "",
        other="stage_layers=1,3",
    ),
    "another split on a stage": Planted(
        "tensor=1 data=1 pipeline=2 layers=4 stage_layers=2,2",
        (1,),
        "weights",
        "layers.1.attention_norm",
        other="stage_layers=1,3",
    ),
    "another vocabulary": Planted(TWO, (1,), "weights", "", other="vocab=62"),
    "another width": Planted(TWO, (1,), "weights", "", other="ffn=44"),
    "a layer more": Planted(TWO, (1,), "mismatch", "", other="layers=3"),
    "an early step": Planted("tensor=1 data=2", (0,), "mismatch", "", other="early=True"),
    "two chunks": Planted(TWO, (1,), "mismatch", "", other="overlap=full"),
    "tied": Planted("tensor=1 data=2", (1,), "mismatch", "", other="tied=True"),
    "heads shared": Planted("tensor=1 data=2", (1,), "mismatch", "", other="kv_heads=4"),
    "another batch": Planted("tensor=1 data=2", (1,), "mismatch", "", other="micro_batches=2"),
    "another number of chunks": Planted(
        "tensor=1 data=1 pipeline=2 layers=4",
        (1,),
        "mismatch",
        "",
        other="schedule=zb-v",
    ),
    "another grid": Planted(
        "tensor=2 data=1 pipeline=2 layers=4", (2,), "groups", "", other="tensor=4 pipeline=1"
    ),
}
