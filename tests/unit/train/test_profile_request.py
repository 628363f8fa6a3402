"""A profile asked for by a file: when it is read, what it may say, and that all ranks agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore, Store

from megallama.config import schema
from megallama.errors import ConfigError
from megallama.spec.grid import Grid, Place
from megallama.train.console import Console
from megallama.train.job import train
from megallama.train.meeting import Meeting
from megallama.train.metrics import Row
from megallama.train.process import ALONE, Process
from megallama.train.profile import Profile
from megallama.train.profile_request import MOST_BYTES, RequestFile
from megallama.train.trace import FOLDER, Timeline, read_timeline
from tests.conftest import MakeConfig, losses
from tests.dist.processes import LOCAL, run_on
from tests.unit.train.test_profile import files, lone_groups, trainer_of
from tests.unit.train.timelines import ran


@pytest.fixture(autouse=True)
def looked_for_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RequestFile, "SECONDS", 0.0)


@pytest.fixture
def after_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, Callable[[], object]]]:
    """What is done just after a step's row was written."""
    shown, does = Console.step, {}

    def show(console: Console, row: Row) -> None:
        shown(console, row)
        does.pop(row["step"], lambda: None)()

    monkeypatch.setattr(Console, "step", show)
    yield does
    assert not does


def recorded(config: Any) -> Timeline:
    timeline = read_timeline(config.run.directory)
    assert timeline is not None
    return timeline


def test_a_file_dropped_while_a_run_goes_on_has_a_step_recorded(
    make_config: MakeConfig, after_step: dict[int, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Seen after step 2 in step 3, whole in step 4: step 5. It changes nothing else."""
    plain, config = make_config({"run.name": "plain"}), make_config()
    assert train(plain) == 0
    asks = config.run.directory / "profile"
    after_step[2] = asks.touch
    assert train(config) == 0
    assert files(config) == ["step-00000005.json"]
    (own,) = recorded(config).ranks
    assert [e.text for e in own.events if e.kind == "F"] == ["F(0, 0)", "F(0, 1)"]
    assert not asks.exists()
    said = capsys.readouterr().out
    assert f"{asks}: recording step 5\n" in said
    assert f"timeline of step 5: {config.run.directory / FOLDER / 'step-00000005.json'}\n" in said
    assert losses(config.run.directory) == losses(plain.run.directory)


def test_a_file_in_vain_is_said_deleted_and_trained_over(
    make_config: MakeConfig, after_step: dict[int, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The next one is heard again."""
    config = make_config()
    asks = config.run.directory / "profile"
    after_step[1] = lambda: asks.write_text("steps: 0")
    after_step[3] = lambda: asks.write_text("steps: 9")
    assert train(config) == 0
    assert (
        f"nothing is recorded: {asks}: train.profile.steps=0: is too small; give a value above 0\n"
        in capsys.readouterr().out
    )
    assert files(config) == ["step-00000006.json"]
    assert not asks.exists()


def test_two_processes_agree_and_the_rank_asked_for_is_recorded(make_config: MakeConfig) -> None:
    config = make_config({"parallel.tensor": 2})
    config.run.directory.mkdir(parents=True)
    (config.run.directory / "profile").write_text("{ranks: [1], steps: 2}")

    def body(rank: int, store: Store) -> int:
        return train(config, process=Process(rank, 2, rank, 2, store, LOCAL))

    assert run_on(2, body) == [0, 0]
    assert files(config) == ["step-00000003.json"]
    (own,) = recorded(config).ranks
    assert own.name == "pp 0 · dp 0 · tp 1"
    assert [e.text for e in own.events if e.kind == "F"] == ["F(0, 0)", "F(0, 1)"] * 2
    assert {"tensor", "world"} <= {e.kind for e in own.events}


def ask(directory: Path, text: str = "") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "profile").write_text(text)
    return directory / "profile"


def walk(config: Any, steps: range, asked_at: dict[int, str]) -> list[str]:
    """Steps of one rank; a file is there, whole, from before each of the given ones."""
    said: list[str] = []
    trainer = trainer_of(config, lone_groups())
    profile = Profile(trainer, Meeting(ALONE), said.append)
    for step in steps:
        if step in asked_at:
            ask(config.run.directory, asked_at[step])
            profile._file.settled()
        profile.before(step)
        trainer.groups.recorder.add(ran(f"F(0, {step})", step, step + 1))
        profile.after(step, profile.asked())
    assert trainer.groups.recorder.take() == []
    return said


def texts(config: Any, name: str) -> list[str]:
    for path in (config.run.directory / FOLDER).glob("*"):
        if path.name != name:
            path.unlink()
    return [event.text for event in recorded(config).ranks[0].events]


def test_a_request_waits_for_its_start(make_config: MakeConfig) -> None:
    config = make_config({"train.steps": 20})
    said = walk(config, range(1, 21), {2: "{start: 7, steps: 2}"})
    assert said[0].endswith("profile: recording step 7 to 8")
    assert files(config) == ["step-00000007.json"]
    assert texts(config, "step-00000007.json") == ["F(0, 7)", "F(0, 8)"]


def test_a_start_that_is_over_is_the_next_step(make_config: MakeConfig) -> None:
    config = make_config({"train.steps": 20})
    walk(config, range(1, 21), {9: "start: 3"})
    assert files(config) == ["step-00000010.json"]


def test_requests_and_the_config_s_profile_follow_each_other(make_config: MakeConfig) -> None:
    """The config's has its steps; a request that would begin in them comes after them, and one made
    meanwhile waits in its file."""
    config = make_config({"train.steps": 20, "train.profile": {"start": 4, "steps": 3}})
    walk(config, range(1, 21), {3: "steps: 2", 5: ""})
    assert files(config) == [f"step-{step:08d}.json" for step in (4, 7, 10)]
    assert texts(config, "step-00000007.json") == ["F(0, 7)", "F(0, 8)"]


def test_a_request_in_the_last_step_is_left_for_the_next_run(make_config: MakeConfig) -> None:
    config = make_config()
    assert walk(config, range(1, 7), {6: ""}) == []
    assert (config.run.directory / "profile").exists()


def test_a_request_for_more_steps_than_there_are_has_what_there_is(make_config: MakeConfig) -> None:
    config = make_config()
    walk(config, range(1, 7), {4: "steps: 9"})
    assert texts(config, "step-00000005.json") == ["F(0, 5)", "F(0, 6)"]


def test_of_many_ranks_those_that_were_asked_for_are_recorded(make_config: MakeConfig) -> None:
    """Threads stand for the processes of a 2 x 2 grid; rank 0 alone sees the file."""
    store, grid = HashStore(), Grid(tensor=2, data=2)
    config = make_config({"train.micro_batch": 1})
    ask(config.run.directory, "ranks: [3, 1, 3]")

    def live(rank: int) -> list[bool]:
        trainer = trainer_of(config, lone_groups(), Place(grid, rank))
        meeting = Meeting(Process(rank, grid.size, rank, grid.size, store, None))
        profile = Profile(trainer, meeting, lambda _: None)
        asked = [profile.asked(), profile.asked()]
        profile.after(1, True)
        profile.before(2)
        recorder = trainer.groups.recorder
        recorder.add(ran("F(0, 0)", 1, 2))
        asked.append(recorder.on)
        profile.after(2)
        return asked

    with ThreadPoolExecutor(grid.size) as threads:
        asked = list(threads.map(live, range(grid.size)))
    # Two looks, and whether anything is kept.
    assert asked == [[False, True, False], [False] * 2 + [True], [False] * 3, [False] * 2 + [True]]
    assert [(r.name, len(r.events)) for r in recorded(config).ranks] == [
        ("pp 0 · dp 0 · tp 1", 1),
        ("pp 0 · dp 1 · tp 1", 1),
    ]


# The file


@pytest.mark.parametrize(
    "text, fault",
    [
        ("3", "not a mapping; leave it empty, or write `steps: 2`"),
        ("[1", " line 1: not YAML"),
        ("steps: two", "train.profile.steps=two: is not a whole number"),
        ("step: 2", "train.profile.step=2: is not a key here; "),
        ("{start: 7}", "train.profile.start=7: exceeds the run's 6 steps; give at most 6"),
        ("ranks: []", "train.profile.ranks=[]: has too few items; give at least 1"),
        ("ranks: [-1]", "train.profile.ranks.0=-1: is too small; give 0 or more"),
        ("ranks: [0, 4]", "train.profile.ranks: there is no rank 4; name some of 0 to 3"),
        ("steps: 0\nranks: 1", "give a value above 0; train.profile.ranks=1: is not a list"),
        ("{1: 2}", "is not a key here"),
        ("#" * (MOST_BYTES + 1), f"{MOST_BYTES + 1} bytes; leave it empty"),
        ("\xff", "not UTF-8 text"),
    ],
)
def test_a_faulty_request_is_one_line_and_gone(
    make_config: MakeConfig, tmp_path: Path, text: str, fault: str
) -> None:
    config = make_config({"train.micro_batch": 1})
    path = tmp_path / "profile"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        RequestFile(tmp_path).take(config, 4, 2)
    assert fault in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not path.exists()


@pytest.mark.parametrize("text", ["", "{}", "null", "# all of it"])
def test_an_empty_request_is_for_the_next_step_of_all_ranks(
    make_config: MakeConfig, tmp_path: Path, text: str
) -> None:
    path = ask(tmp_path, text)
    assert RequestFile(tmp_path).take(make_config(), 1, 4) == schema.Profile(start=4)
    assert not path.exists()


def test_a_file_is_read_once_it_is_as_it_was_a_look_before(tmp_path: Path) -> None:
    file = RequestFile(tmp_path)
    assert not file.settled()
    file.path.touch()
    assert not file.settled()
    file.path.write_text("steps:")
    assert not file.settled()
    file.path.write_text("steps: 2")
    assert not file.settled()
    assert file.settled()
    file.path.unlink()
    assert not file.settled()


def test_looks_are_a_while_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RequestFile, "SECONDS", 3600.0)
    file = RequestFile(tmp_path)
    file.path.touch()
    assert not file.settled()
    assert not file.settled(), "within the hour"
    file._next = 0.0
    assert file.settled()


def test_a_directory_asks_for_nothing(tmp_path: Path) -> None:
    (tmp_path / "profile").mkdir()
    file = RequestFile(tmp_path)
    assert [file.settled() for _ in range(3)] == [False] * 3


def test_a_file_that_cannot_be_deleted_is_heard_once(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, missing_ok: bool) -> None:
        raise PermissionError(13, "Permission denied")

    ask(tmp_path)
    monkeypatch.setattr(Path, "unlink", refuse)
    file = RequestFile(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot delete .*profile: Permission denied"):
        file.take(make_config(), 1, 4)
    assert [file.settled() for _ in range(3)] == [False] * 3


def test_a_config_that_names_a_rank_too_many_is_refused(make_config: MakeConfig) -> None:
    config = make_config({"train.profile": {"start": 1, "ranks": [0, 1]}})
    with pytest.raises(ConfigError, match="there is no rank 1; name some of 0 to 0"):
        train(config)


def test_a_config_s_profile_of_some_ranks(make_config: MakeConfig) -> None:
    """The ranks that are not asked for record nothing, and take part in what ends the recording."""
    config = make_config({"train.profile": {"start": 2, "ranks": [1]}, "parallel.data": 2})

    def body(rank: int, store: Store) -> int:
        torch.set_num_threads(1)
        return train(config, process=Process(rank, 2, rank, 2, store, LOCAL))

    assert run_on(2, body) == [0, 0]
    assert [r.name for r in recorded(config).ranks] == ["pp 0 · dp 1 · tp 0"]
