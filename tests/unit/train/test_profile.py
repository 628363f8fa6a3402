"""Recording steps: which, from whom, and what becomes of the run where the file cannot be."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import HashStore, Store

from megallama.dist.connect import Groups, connect
from megallama.spec.grid import ALONE as LONE_PLACE
from megallama.spec.grid import Grid, Place
from megallama.train.meeting import Meeting
from megallama.train.process import ALONE, Process
from megallama.train.profile import Profile, clock_name
from megallama.train.trace import FOLDER, read_timeline
from tests.conftest import MakeConfig
from tests.dist.processes import LOCAL, run_on
from tests.unit.train.timelines import ran

CPU = torch.device("cpu")


def trainer_of(config: Any, groups: Groups, place: Place = LONE_PLACE) -> Any:
    return SimpleNamespace(config=config, groups=groups, place=place, device=CPU)


def lone_groups() -> Groups:
    return connect(None, 0, {"data": (0,), "world": (0,)}, CPU)


@pytest.fixture
def profiled(make_config: MakeConfig) -> Callable[..., Any]:
    """The tiny config of 6 steps with `train.profile`."""
    return lambda **asked: make_config({"train.profile": asked})


def walk(trainer: Any, steps: range) -> list[str]:
    """Each step adds one pass that is named by it; returns what was said."""
    said: list[str] = []
    profile = Profile(trainer, Meeting(ALONE), said.append)
    recorder = trainer.groups.recorder
    for step in steps:
        profile.before(step)
        recorder.add(ran(f"F(0, {step})", step, step + 1))
        profile.after(step)
        recorder.add(ran("F(9, 9)", step, step + 1))  # a validation's, say
    assert not recorder.on
    assert recorder.take() == []
    return said


def texts(config: Any) -> list[list[str]]:
    """Of each rank's events, in the file."""
    timeline = read_timeline(config.run.directory)
    assert timeline is not None
    return [[event.text for event in rank.events] for rank in timeline.ranks]


def files(config: Any) -> list[str]:
    return sorted(path.name for path in config.run.directory.glob(f"{FOLDER}/*"))


def test_one_step_is_recorded_and_no_other(profiled: Any) -> None:
    config = profiled(start=3)
    said = walk(trainer_of(config, lone_groups()), range(1, 7))
    path = config.run.directory / FOLDER / "step-00000003.json"
    assert said == [f"timeline of step 3: {path}"]
    assert files(config) == ["step-00000003.json"]
    assert texts(config) == [["F(0, 3)"]]


def test_several_steps_make_one_file_with_what_was_between(profiled: Any) -> None:
    config = profiled(start=2, steps=2)
    walk(trainer_of(config, lone_groups()), range(1, 7))
    assert files(config) == ["step-00000002.json"]
    assert texts(config) == [["F(0, 2)", "F(9, 9)", "F(0, 3)"]]


def test_a_run_that_ends_before_has_what_there_is(profiled: Any) -> None:
    config = profiled(start=5, steps=9)
    walk(trainer_of(config, lone_groups()), range(1, 7))
    assert texts(config) == [["F(0, 5)", "F(9, 9)", "F(0, 6)"]]


def test_a_run_resumed_in_between_records_the_rest(profiled: Any) -> None:
    config = profiled(start=2, steps=3)
    walk(trainer_of(config, lone_groups()), range(4, 7))
    assert files(config) == ["step-00000004.json"]
    assert texts(config) == [["F(0, 4)"]]


@pytest.mark.parametrize("start", [None, 3])
def test_nothing_is_recorded_unasked_or_of_steps_that_are_over(
    make_config: MakeConfig, start: int | None
) -> None:
    config = make_config({"train.profile": start and {"start": start}})
    assert walk(trainer_of(config, lone_groups()), range(4, 7)) == []
    assert files(config) == []


@pytest.mark.parametrize("blocked", [FOLDER, f"{FOLDER}/step-00000003.json"])
def test_a_file_that_cannot_be_written_ends_no_run(profiled: Any, blocked: str) -> None:
    config = profiled(start=3)
    place: Path = config.run.directory / blocked
    place.parent.mkdir(parents=True)
    if blocked == FOLDER:
        place.write_text("a file")
    else:
        place.mkdir()
    (said,) = walk(trainer_of(config, lone_groups()), range(1, 7))
    assert said.startswith("no timeline of step 3: cannot write ")
    assert "\n" not in said


def test_rank_0_writes_what_all_ranks_recorded(profiled: Any) -> None:
    """Threads stand for the processes; the ranks are those of a 2 x 2 x 2 grid."""
    config, store, grid = profiled(start=1), HashStore(), Grid(tensor=2, data=2, pipeline=2)

    def live(rank: int) -> list[str]:
        said: list[str] = []
        trainer = trainer_of(config, lone_groups(), Place(grid, rank))
        meeting = Meeting(Process(rank, grid.size, rank, grid.size, store, None))
        profile = Profile(trainer, meeting, said.append)
        profile.before(1)
        trainer.groups.recorder.add(ran(f"F(0, {rank})", 10 + rank, 20))
        profile.after(1)
        return said

    with ThreadPoolExecutor(grid.size) as threads:
        said = list(threads.map(live, range(grid.size)))
    path = config.run.directory / FOLDER / "step-00000001.json"
    assert said == [[f"timeline of step 1: {path}"]] * grid.size
    assert texts(config) == [[f"F(0, {rank})"] for rank in range(grid.size)]
    timeline = read_timeline(config.run.directory)
    assert timeline is not None
    assert [rank.name for rank in timeline.ranks] == [
        f"pp {pp} · dp {dp} · tp {tp}" for pp in (0, 1) for dp in (0, 1) for tp in (0, 1)
    ]
    begins = [rank.events[0].begin for rank in timeline.ranks]
    assert begins == pytest.approx([rank / 512 for rank in range(grid.size)], abs=1e-9)


def test_what_began_in_the_step_is_in_the_file_though_it_ends_later(profiled: Any) -> None:
    """Processes, gloo: a gather of weights under way as the step ends, and nothing after it."""
    config = profiled(start=1)

    def body(rank: int, store: Store) -> list[int]:
        torch.set_num_threads(1)
        groups = connect(store, rank, {"data": (0, 1), "world": (0, 1)}, CPU, hostname=LOCAL)
        trainer = trainer_of(config, groups, Place(Grid(data=2), rank))
        profile = Profile(trainer, Meeting(Process(rank, 2, rank, 2, store, LOCAL)), lambda _: None)
        groups["world"].all_reduce(torch.ones(1)).wait()
        profile.before(1)
        groups["world"].all_reduce(torch.ones(3)).wait()
        gathers = [groups["data"].all_gather(torch.ones(1_000_000)) for _ in range(3)]
        profile.after(1)
        groups["world"].all_reduce(torch.ones(1)).wait()
        sizes = [len(gather.wait()) for gather in gathers]
        groups.close()
        return sizes

    assert run_on(2, body) == [[2_000_000] * 3] * 2
    timeline = read_timeline(config.run.directory)
    assert timeline is not None
    for own in timeline.ranks:
        assert sorted(event.kind for event in own.events) == ["data"] * 3 + ["world"]
        assert all(event.text == "all_gather" for event in own.events if event.kind == "data")


def test_processes_of_a_machine_have_one_clock() -> None:
    assert set(run_on(2, lambda rank, store: clock_name())) == {clock_name()}
