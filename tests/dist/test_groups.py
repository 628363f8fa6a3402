"""Groups of processes over gloo, held against sums written out here.

Every test runs in the strict mode too unless it is about the difference.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.distributed import Store

from megallama.dist.check import SequenceError
from megallama.dist.connect import Groups, connect
from megallama.dist.group import Blocking, Group, SingleGroup
from megallama.dist.recorder import Event
from megallama.dist.traffic import Count
from megallama.errors import LostError
from tests.dist.processes import LOCAL, run_on

CPU = torch.device("cpu")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
SOON, LATE = timedelta(seconds=1.5), timedelta(seconds=60)


def join(
    rank: int,
    store: Store,
    size: int,
    strict: bool = False,
    timeout: timedelta = LATE,
    names: tuple[str, ...] = ("all",),
) -> Groups:
    """Groups of all ranks; `timeout` is the operations', not that of a slow start."""
    members = {name: range(size) for name in names}
    groups = connect(store, rank, members, CPU, strict=strict, timeout=LATE, hostname=LOCAL)
    assert groups.watch is not None
    groups.watch.timeout = timeout.total_seconds()
    return groups


def meet(store: Store, size: int, place: str) -> None:
    """Wait until `size` processes have come to `place`."""
    if store.add(place, 1) == size:
        store.set(f"{place}: all", "here")
    store.wait([f"{place}: all"], LATE)


def operand(rank: int, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """What `rank` contributes: values of very different size, so that the order of a sum shows."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    scale = torch.randint(-8, 8, shape, generator=generator)
    return torch.ldexp(x, scale).to(dtype)


def summed(parts: list[Tensor]) -> Tensor:
    """The sum from left to right in fp32, fp64 for fp64."""
    total = parts[0].to(torch.promote_types(parts[0].dtype, torch.float32))
    for part in parts[1:]:
        total = total + part.to(total.dtype)
    return total


def same(x: Tensor, expected: Tensor) -> None:
    """Equal bit for bit, dtype and shape included."""
    assert (x.shape, x.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(x, expected)


def collectives(group: Group, size: int, dtype: torch.dtype) -> None:
    """Every collective once, each result compared with one computed from all ranks' operands."""
    rank = group.rank
    assert group.size == size

    shards = [operand(r, 3, 2, dtype=dtype) for r in range(size)]
    same(group.all_gather(shards[rank]).wait(), torch.cat(shards))
    out = torch.empty(3 * size, 2, dtype=dtype)
    assert group.all_gather(shards[rank], out).wait() is out
    same(out, torch.cat(shards))

    wholes = [operand(r, 2 * size, 5, dtype=dtype, seed=1) for r in range(size)]
    mine = summed(wholes).to(dtype)[2 * rank : 2 * rank + 2]
    kept = wholes[rank].clone()
    same(group.reduce_scatter(wholes[rank]).wait(), mine)
    same(wholes[rank], kept)
    crosswise = wholes[rank].t().contiguous().t()  # not contiguous
    same(group.reduce_scatter(crosswise).wait(), mine)

    for shape in ((), (1,), (7, 3), (size * 4,), (0,), (31, 57)):
        parts = [operand(r, *shape, dtype=dtype, seed=2) for r in range(size)]
        total = group.all_reduce(parts[rank]).wait()
        same(total, summed(parts).to(dtype))
        assert total is not parts[rank]


def rows_collectives(group: Group, size: int, dtype: torch.dtype) -> None:
    """ZeRO's operations on a list of small and large tensors, with and without a wire dtype."""
    shapes = [(size, 3), (size, 70_000), (2 * size,), (size, 0)]

    def rows(x: Tensor) -> slice:
        share = x.shape[0] // size
        return slice(group.rank * share, (group.rank + 1) * share)

    wholes = [operand(0, *shape, dtype=dtype, seed=3) for shape in shapes]
    tensors = [torch.full_like(whole, torch.nan) for whole in wholes]
    for tensor, whole in zip(tensors, wholes, strict=True):
        tensor[rows(tensor)] = whole[rows(whole)]
    assert group.all_gather_rows(tensors).wait() is None
    for tensor, whole in zip(tensors, wholes, strict=True):
        same(tensor, whole)

    for wire in (None, torch.bfloat16):
        parts = [
            [operand(rank, *shape, dtype=dtype, seed=4 + k) for rank in range(size)]
            for k, shape in enumerate(shapes)
        ]
        tensors = [ranks[group.rank].clone() for ranks in parts]
        assert group.reduce_scatter_rows(tensors, wire).wait() is None
        travels = wire if wire and size > 1 else dtype
        for tensor, ranks in zip(tensors, parts, strict=True):
            total = summed([part.to(travels).to(dtype) for part in ranks]).to(dtype)
            same(tensor[rows(tensor)], total[rows(total)])


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_collectives_are_the_sums_in_rank_order(size):
    def body(rank: int, store: Store) -> None:
        plain = join(rank, store, size, names=("plain", "blocking"))
        strict = join(rank, store, size, strict=True, names=("strict",))
        for dtype in DTYPES:
            collectives(plain["plain"], size, dtype)
            rows_collectives(plain["plain"], size, dtype)
        for group in (Blocking(plain["blocking"]), strict["strict"]):
            collectives(group, size, torch.bfloat16)
            rows_collectives(group, size, torch.float32)
        plain.close()
        strict.close()

    run_on(size, body)


def test_an_all_reduce_has_the_same_bits_on_every_rank():
    def body(rank: int, store: Store) -> list[Tensor]:
        group = join(rank, store, 3)["all"]
        return [
            group.all_reduce(operand(rank, count, dtype=dtype)).wait()
            for count in (101, 1001)
            for dtype in DTYPES
        ]

    results = run_on(3, body)
    for one, two, three in zip(*results, strict=True):
        same(one, two)
        same(one, three)


def test_integers_and_booleans_travel():
    def body(rank: int, store: Store) -> None:
        group = join(rank, store, 2)["all"]
        same(group.all_reduce(torch.tensor([2**53 + 1, rank])).wait(), torch.tensor([2**54 + 2, 1]))
        gathered = group.all_gather(torch.tensor([rank == 0])).wait()
        same(gathered, torch.tensor([True, False]))

    run_on(2, body)


def test_a_wire_dtype_rounds_what_travels_and_nothing_else():
    """1 + 2^-9 is 1 in bf16; two of them, added in fp32, are 2 exactly only if both were rounded.

    A sum of bf16 values, 256 + 1 + 1, must come out as 258 and not as bf16's 256.
    """

    def body(rank: int, store: Store) -> None:
        group = join(rank, store, 3)["all"]
        fine = torch.full((3,), 1 + 2.0**-9)
        same(group.reduce_scatter(fine, torch.bfloat16).wait(), torch.tensor([3.0]))
        same(group.reduce_scatter(fine).wait(), torch.tensor([3 + 3 * 2.0**-9]))
        coarse = torch.full((3,), 256.0 if rank == 0 else 1.0)
        group.reduce_scatter_rows([coarse], torch.bfloat16).wait()
        assert coarse[rank] == 258

    run_on(3, body)


@pytest.mark.parametrize("strict", [False, True])
def test_messages_between_two_ranks_keep_their_order(strict):
    def body(rank: int, store: Store) -> None:
        group = join(rank, store, 3, strict)["all"]
        messages = [operand(9, 4, 3, dtype=dtype) for dtype in DTYPES] + [torch.empty(0, 2)]
        if rank == 1:
            handles = [group.send(m.t().contiguous().t(), 2) for m in messages]
            for handle in handles:
                handle.wait()
        elif rank == 2:
            outs = [torch.empty_like(m) for m in messages]
            received = [group.receive(out, 1) for out in outs]
            for handle, out, message in zip(received, outs, messages, strict=True):
                assert handle.wait() is out
                same(out, message)
        same(group.all_reduce(torch.ones(1)).wait(), torch.tensor([3.0]))

    run_on(3, body)


def test_groups_of_one_name_are_told_apart_by_their_members():
    """A 2 × 2 grid: two groups of each name, the second in descending order of global ranks."""

    def body(rank: int, store: Store) -> None:
        row, column = divmod(rank, 2)
        members = {
            "tensor": [2 * row, 2 * row + 1],
            "data": [2 + column, column],
            "alone": [rank],
        }
        groups = connect(store, rank, members, CPU, strict=True, hostname=LOCAL)
        assert (groups["tensor"].rank, groups["data"].rank) == (column, 1 - row)
        assert isinstance(groups["alone"], SingleGroup)
        mine = torch.tensor([rank])
        assert groups["tensor"].all_gather(mine).wait().tolist() == members["tensor"]
        assert groups["data"].all_gather(mine).wait().tolist() == members["data"]
        groups.close()

    run_on(4, body)


def test_traffic_is_what_the_formulas_say():
    def body(rank: int, store: Store) -> dict[tuple[str, str], Count]:
        groups = join(rank, store, 3)
        alone = connect(store, rank, {"alone": [rank]}, CPU)
        group, x = groups["all"], torch.zeros(6, 4)
        group.all_gather(x).wait()
        group.all_gather(x).wait()
        group.reduce_scatter(x).wait()
        group.reduce_scatter(x, torch.bfloat16).wait()
        group.all_reduce(torch.zeros(4, dtype=torch.float64)).wait()
        group.all_gather_rows([x, torch.zeros(3)]).wait()
        group.reduce_scatter_rows([x, torch.zeros(3)], torch.bfloat16).wait()
        (group.send(x, 1) if rank == 0 else group.receive(x, 0) if rank == 1 else _done()).wait()
        alone["alone"].all_reduce(x).wait()
        assert alone.traffic.counts == {}
        return groups.traffic.counts

    def _done():
        return SingleGroup().all_reduce(torch.zeros(1))

    counts = run_on(3, body)
    assert counts[2] == {
        ("all", "all_gather"): Count(2, 2 * 2 * 96),
        ("all", "reduce_scatter"): Count(2, 2 * 32 + 2 * 16),
        ("all", "all_reduce"): Count(1, 2 * 2 * 2 * 8),
        ("all", "all_gather_rows"): Count(1, 2 * (32 + 4)),
        ("all", "reduce_scatter_rows"): Count(1, 2 * (16 + 2)),
    }
    assert counts[0] == counts[2] | {("all", "send"): Count(1, 96)}
    assert counts[1] == counts[2] | {("all", "receive"): Count(1, 0)}


def test_the_recorder_keeps_what_ran_while_it_was_on():
    def body(rank: int, store: Store) -> list[Event]:
        groups = join(rank, store, 2, names=("all", "pipeline 0>1"))
        group, pipe = groups["all"], groups["pipeline 0>1"]
        group.all_reduce(torch.ones(1)).wait()
        meet(store, 2, "recording begins")
        begin = time.monotonic()
        groups.recorder.on = True
        handles = [group.all_gather(torch.ones(1)), group.reduce_scatter(torch.ones(2))]
        label = "activations of F(0, 0)"
        if rank == 0:
            handles += [pipe.send(torch.ones(1), 1, label), pipe.send(torch.ones(1), 1)]
        else:
            handles += [pipe.receive(torch.ones(1), 0, x) for x in (label, "")]
        for handle in handles:
            handle.wait()
        groups.recorder.on = False
        group.all_reduce(torch.ones(1)).wait()
        events = groups.recorder.take()
        assert groups.recorder.take() == []
        assert all(begin <= e.begin <= e.end <= time.monotonic() for e in events)
        return events

    for rank, events in enumerate(run_on(2, body)):
        assert {event.lane for event in events} == {"communication"}
        for name, texts in {
            "all": ["all_gather", "reduce_scatter"],
            "pipeline 0>1": ["activations of F(0, 0)", "receive" if rank else "send"],
        }.items():
            first, second = [event for event in events if event.kind == name]
            assert [first.text, second.text] == texts
            assert first.end <= second.begin


def test_an_operation_runs_while_its_thread_works_on():
    """Rank 1 learns what rank 0 queued while rank 0 waits for rank 1 by another way, the store.

    With operations run at the wait, rank 0 would wait for the store for ever.
    """

    def body(rank: int, store: Store) -> None:
        group = join(rank, store, 2)["all"]
        handle = group.all_gather(torch.tensor([rank]))
        if rank == 0:
            store.wait(["seen"], LATE)
        assert handle.wait().tolist() == [0, 1]
        if rank == 1:
            store.set("seen", "yes")

    run_on(2, body)


def test_a_group_that_waits_does_not_hold_up_another():
    def body(rank: int, store: Store) -> None:
        groups = join(rank, store, 2, names=("one", "two"))
        if rank == 0:
            first = groups["one"].all_gather(torch.zeros(1))  # rank 1 comes to it last
        assert groups["two"].all_gather(torch.tensor([rank])).wait().tolist() == [0, 1]
        if rank == 1:
            first = groups["one"].all_gather(torch.zeros(1))
        first.wait()

    run_on(2, body)


def test_operations_of_a_group_run_in_their_order():
    """Issued at once, waited for in reverse: each result is its own."""

    def body(rank: int, store: Store) -> None:
        group = join(rank, store, 2, strict=True)["all"]
        handles = [group.all_reduce(torch.tensor([float(k)])) for k in range(20)]
        assert [h.wait().item() for h in reversed(handles)] == [2.0 * k for k in range(19, -1, -1)]

    run_on(2, body)


def test_covers_do_not_depend_on_the_size_or_on_progress():
    def body(rank: int, store: Store) -> list[list[int]]:
        x = torch.zeros(2)
        found = []
        for group in (join(rank, store, 2)["all"], SingleGroup()):
            handles = [
                group.all_gather(x),
                group.reduce_scatter(x),
                group.all_reduce(x),
                group.all_gather_rows([x]),
                group.reduce_scatter_rows([x]),
            ]
            early = [handle.cover for handle in handles]
            for handle in handles:
                handle.wait()
            assert early == [handle.cover for handle in handles]
            found.append(early)
        blocking = Blocking(SingleGroup())
        assert blocking.all_reduce(x).cover == blocking.all_gather(x).cover == 0
        return found

    assert run_on(2, body) == [[[1, 1, 2, 1, 1]] * 2] * 2


def test_tensors_of_inference_mode_are_filled():
    def body(rank: int, store: Store) -> None:
        group = join(rank, store, 2)["all"]
        with torch.inference_mode():
            x = torch.full((2, 2), float(rank + 1))
            group.reduce_scatter_rows([x]).wait()
            assert x[rank].tolist() == [3, 3]
        weight = torch.ones(2, requires_grad=True)
        assert not group.all_reduce(weight).wait().requires_grad

    run_on(2, body)


# What ends badly.


def outcome(operation: Callable[[], object]) -> BaseException | None:
    try:
        operation()
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("strict", [False, True])
def test_a_killed_peer_is_a_lost_error_on_the_others(strict):
    def body(rank: int, store: Store) -> list[BaseException | None]:
        groups = join(rank, store, 3, strict)
        group = groups["all"]
        group.all_reduce(torch.ones(1)).wait()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        first = group.reduce_scatter(torch.ones(3))
        second = group.all_gather(torch.ones(1))
        found = [outcome(first.wait), outcome(second.wait), outcome(second.wait)]
        meet(store, 2, "end")  # nobody learns of it from a survivor's end
        groups.close()
        return found

    results = run_on(3, body, dies=[1])
    for rank in (0, 2):
        first, *later = results[rank]
        assert isinstance(first, LostError)
        assert first.exit_code == 69
        assert "\n" not in str(first)
        assert "group 'all'" in str(first)
        assert "reduce_scatter" in str(first)
        assert first.peer == 1
        assert re.match(r"rank 1 is lost \(host [^)]+\): rank ", str(first))
        assert first.shared
        assert str(first) == str(results[0][0])
        assert [str(error) for error in later] == [str(first)] * 2


def test_a_peer_that_does_not_answer_is_a_lost_error():
    def body(rank: int, store: Store) -> BaseException | None:
        group = join(rank, store, 2, timeout=SOON)["all"]
        found = None
        if rank == 0:
            found = outcome(group.all_gather(torch.ones(1)).wait)
        meet(store, 2, "end")
        return found

    error = run_on(2, body)[0]
    assert isinstance(error, LostError)
    assert "): rank 0 waited for it to take part in all_gather" in str(error)
    assert str(error).startswith("rank 1 is lost")


def test_operations_may_take_longer_than_the_timeout_while_nobody_waits():
    """A receive is posted early, and a send whose receive comes late: neither peer is lost."""

    def body(rank: int, store: Store) -> None:
        groups = join(rank, store, 2, timeout=SOON, names=("early", "late"))
        if rank == 0:
            early = groups["early"].receive(torch.zeros(1), 1)
            late = groups["late"].send(torch.ones(1), 1)
            store.wait(["long after"], LATE)
        else:
            time.sleep(SOON.total_seconds() + 0.5)
            early = groups["early"].send(torch.ones(1), 0)
            late = groups["late"].receive(torch.zeros(1), 0)
            store.set("long after", "")  # nobody waits before both have posted both
        early.wait()
        late.wait()
        groups.watch.timeout = LATE.total_seconds()
        assert groups["early"].all_reduce(torch.ones(1)).wait() == 2
        meet(store, 2, "end")

    run_on(2, body)


def test_a_peer_that_never_comes_is_a_lost_error():
    def body(rank: int, store: Store) -> BaseException | None:
        members = {"all": range(2)}
        return outcome(
            partial(connect, store, rank, members, CPU, timeout=SOON, hostname=LOCAL)
        )

    error = run_on(1, body)[0]
    assert isinstance(error, LostError)
    assert "could not connect" in str(error)
    assert "\n" not in str(error)


def test_closing_ends_what_waits():
    def body(rank: int, store: Store) -> BaseException | None:
        groups = join(rank, store, 2)
        found = None
        if rank == 0:
            handle = groups["all"].all_gather(torch.ones(1))
            groups.close()
            found = outcome(handle.wait)
            assert isinstance(
                outcome(lambda: groups["all"].all_reduce(torch.ones(1))), RuntimeError
            )
            assert "gloo all" not in [thread.name for thread in threading.enumerate()]
        meet(store, 2, "end")
        groups.close()
        return found

    error = run_on(2, body)[0]
    assert isinstance(error, LostError)
    assert "is lost" not in str(error)


UNFINISHED = """
import sys, torch
from datetime import timedelta
from torch.distributed import FileStore
from megallama.dist.connect import connect
rank, store = int(sys.argv[1]), FileStore(sys.argv[2])
store.set_timeout(timedelta(seconds=60))
group = connect(store, rank, {"all": [0, 1]}, torch.device("cpu"), hostname="127.0.0.1")["all"]
kept = group.receive(torch.zeros(1), 1 - rank)  # nobody sends
group.all_reduce(torch.zeros(1))
"""


def test_an_interpreter_ends_with_operations_under_way(tmp_path):
    """A thread that came back from gloo to an interpreter that ended would abort the process."""
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", UNFINISHED, str(rank), str(tmp_path / "store")],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ends = [worker.communicate(timeout=240)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], ends


def test_a_wrong_shape_raises_at_the_call():
    def body(rank: int, store: Store) -> None:
        group = join(rank, store, 2)["all"]
        calls: list[Callable[[], object]] = [
            lambda: group.reduce_scatter(torch.ones(3)),
            lambda: group.all_gather(torch.ones(())),
            lambda: group.all_gather(torch.ones(2), torch.ones(3)),
            lambda: group.all_gather_rows([torch.ones(2, 2).t()]),
            lambda: group.reduce_scatter_rows([torch.ones(3)]),
            lambda: group.send(torch.ones(1), rank),
            lambda: group.receive(torch.ones(1), 2),
        ]
        for call in calls:
            with pytest.raises(ValueError):
                call()
        assert group.all_reduce(torch.ones(1)).wait() == 2  # the group goes on

    run_on(2, body)


# What the strict mode finds.


def differing(
    size: int, ask: Callable[[Group], list], timeout: timedelta = LATE
) -> list[BaseException | None]:
    """The errors of every rank when each issues what `ask` does and waits for all of it."""

    def body(rank: int, store: Store) -> BaseException | None:
        group = join(rank, store, size, strict=True, timeout=timeout)["all"]
        found = None
        for handle in ask(group):
            found = found or outcome(handle.wait)
        meet(store, size, "end")  # closed connections would be an error of their own
        return found

    return run_on(size, body)


def test_another_order_is_reported_on_every_rank():
    def ask(group: Group) -> list:
        x = torch.zeros(3, 2)
        first = group.all_reduce(x)
        if group.rank == 1:
            return [first, group.reduce_scatter(x), group.all_gather(x)]
        return [first, group.all_gather(x), group.reduce_scatter(x)]

    errors = differing(3, ask)
    assert {type(error) for error in errors} == {SequenceError}
    assert len({str(error) for error in errors}) == 1
    assert str(errors[0]) == (
        "group 'all', operation 1: its ranks differ: "
        "rank 0 asked for all_gather (3, 2) float32; "
        "rank 1 asked for reduce_scatter (3, 2) float32; "
        "rank 2 asked for all_gather (3, 2) float32"
    )


@pytest.mark.parametrize("planted", ["shape", "dtype", "wire", "last of many"])
def test_another_operand_is_reported_on_every_rank(planted):
    def ask(group: Group) -> list:
        odd = group.rank == 1
        if planted == "shape":
            return [group.all_gather(torch.zeros(3 if odd else 2, 2))]
        if planted == "dtype":
            return [group.all_reduce(torch.zeros(2, dtype=torch.float64 if odd else None))]
        if planted == "wire":
            return [group.reduce_scatter(torch.zeros(2), torch.bfloat16 if odd else None)]
        tensors = [torch.zeros(2) for _ in range(100)] + [torch.zeros(4 if odd else 2)]
        return [group.all_gather_rows(tensors)]

    errors = differing(2, ask)
    assert {type(error) for error in errors} == {SequenceError}


@pytest.mark.parametrize("planted", ["shape", "label", "both send"])
def test_messages_that_do_not_match_are_reported_on_both_ranks(planted):
    def ask(group: Group) -> list:
        other = 1 - group.rank
        if planted == "both send":
            return [group.send(torch.zeros(2), other), group.receive(torch.zeros(2), other)]
        shape, label = (3, "b") if planted == "shape" else (2, "other b")
        if group.rank == 0:
            return [group.send(torch.zeros(2), 1, "b")]
        return [group.receive(torch.zeros(shape), 0, label)]

    errors = differing(2, ask)
    assert {type(error) for error in errors} == {SequenceError}
    assert all("message 0 between ranks" in str(error) for error in errors)


def test_sends_in_a_circle_time_out():
    """Each of three ranks sends to the next before it receives: a send waits for its receive."""

    def ask(group: Group) -> list:
        after, before = (group.rank + 1) % 3, (group.rank - 1) % 3
        return [group.send(torch.zeros(2), after), group.receive(torch.zeros(2), before)]

    errors = differing(3, ask, SOON)
    assert {type(error) for error in errors} == {LostError}
    assert "rank 0 sends to rank 1" in str(errors[0])
