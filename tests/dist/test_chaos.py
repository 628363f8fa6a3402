"""Every named point of a run once: a rank is killed there, and not a bit is lost."""

from __future__ import annotations

import json
import random
import signal
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.chaos.__main__ import SECTIONS
from tests.chaos.kills import POINTS, RANKS, RECOVERY, SAVING, TRAINING, Blow, Case, drawn, parse
from tests.chaos.runs import Arena, Outcome
from tests.chaos.tally import Tally
from tests.conftest import TinyData
from tests.dist.commands import write_config

FIRST = Blow("save-committed", 0)  # so that there is a checkpoint to recover from


def cases() -> list[str]:
    """Each point once. A run is struck several times over: a start costs more than its steps."""
    return [
        # While ranks meet: at the start and to go on.
        "data recovery-leased@0#0!SIGSTOP gather@1#4!SIGSTOP recovery-read@0#0!SIGSTOP",
        # Nobody else is there but the supervisor.
        "one update@0#30!SIGSTOP",
        "pipeline backward@1#3!SIGSTOP",
        # At the last save.
        "tensor save-fsync@1#2!SIGSTOP",
        "thirds forward@2#4!SIGTERM",
        "tensor update@1#20!SIGUSR1",
        str(Case("data", (FIRST, *(struck_at(name, "data") for name in RECOVERY)))),
        *killed("data", "time", "message", "reduce"),
        *killed("pipeline", "forward", "backward", "gather"),
        *killed("one", "update", "row", "save-start", "save-begun"),
        *killed("tensor", "save-copy", "save-create", "save-write"),
        *killed("data", "save-begin", "save-fsync", "save-commit", "save-verify"),
        *killed("one", "save-fsynced", "save-committed", "retention-rmdir"),
        *killed("data", "retention"),
    ]


def killed(layout: str, *points: str) -> list[str]:
    """A case in which ranks are killed at points, the last rank where all ranks pass them."""
    return [str(Case(layout, tuple(struck_at(point, layout) for point in points)))]


def struck_at(name: str, layout: str) -> Blow:
    return Blow(name, 0 if POINTS[name].leads else RANKS[layout] - 1)


@pytest.fixture(scope="module")
def outcomes(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    folder = tmp_path_factory.mktemp("chaos")
    config = write_config(folder, tiny_data, **SECTIONS)
    found = Arena(folder, config).fight(map(parse, cases()), at_once=8)
    return {str(outcome.case): outcome for outcome in found}


@pytest.mark.parametrize("text", cases())
def test_nothing_is_lost(outcomes: dict[str, Outcome], text: str) -> None:
    outcome = outcomes[text]
    assert outcome.faults == []
    assert outcome.fell == len(outcome.case.blows), "a blow that did not fall proves nothing"


def test_a_case_is_its_text() -> None:
    generator = random.Random(3)
    for kind in (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP):
        for case in drawn(generator, kind, 50):
            assert parse(str(case)) == case
    assert {*TRAINING, *SAVING, *RECOVERY} == set(POINTS)


def test_a_rank_is_killed_at_every_point() -> None:
    blows = [blow for text in cases() for blow in parse(text).blows]
    assert {blow.point for blow in blows if blow.signal == signal.SIGKILL} == set(POINTS)


def test_pieces_of_a_campaign_add_up(outcomes: dict[str, Outcome], tmp_path: Path) -> None:
    """To what the whole comes to."""
    whole, paths = Tally("SIGKILL", [1, 2]), [tmp_path / "1", tmp_path / "2"]
    pieces = Tally("SIGKILL", [1]), Tally("SIGKILL", [2])
    for number, outcome in enumerate(sorted(outcomes.values())):
        for tally in (whole, pieces[number % 2]):
            tally.add(outcome)
    for piece, path in zip(pieces, paths, strict=True):
        path.write_text(json.dumps(asdict(piece)))
    total = Tally.read(paths)
    for name, value in asdict(whole).items():
        found = asdict(total)[name]
        assert (sorted(found) if isinstance(value, list) else found) == (
            sorted(value) if isinstance(value, list) else value
        )
    assert whole.cases == len(cases())
    assert sum(whole.fell.values()) == sum(len(parse(text).blows) for text in cases())
    assert len(whole.late) == 6
    assert [steps for steps, _ in whole.stops] in ([0, 0], [0, 1], [1, 0], [1, 1])
    assert whole.short(1000) == ["save"] * (200 - whole.fell["save"]) + ["recovery"] * (
        50 - whole.fell["recovery"]
    )
