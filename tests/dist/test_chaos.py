"""Every named point of a run once: a rank is killed there, and not a bit is lost."""

from __future__ import annotations

import random
import signal

import pytest

from tests.chaos.__main__ import SECTIONS
from tests.chaos.kills import POINTS, RANKS, RECOVERY, SAVING, TRAINING, Blow, Case, draw, parse
from tests.chaos.runs import Arena, Outcome
from tests.conftest import TinyData
from tests.dist.commands import write_config

FIRST = Blow("save-committed", 0)  # so that there is a checkpoint to recover from


def cases() -> list[str]:
    """Each point at one layout, in turn; the rank is the last one's where all ranks pass it."""
    texts = []
    names = ("data", "tensor", "one", "pipeline", "data", "grid", "gpipe", "stages")
    for number, (name, point) in enumerate(POINTS.items()):
        layout = names[number % len(names)]
        blow = Blow(name, 0 if point.leads else RANKS[layout] - 1, min(point.times - 1, 2))
        if name in RECOVERY:
            blow = blow._replace(number=0)
        texts.append(str(Case(layout, (FIRST, blow) if name in RECOVERY else (blow,))))
    return [
        *texts,
        "grid forward@3#4!SIGTERM",
        "tensor update@1#20!SIGUSR1",
        "stages backward@2#3!SIGSTOP",
        "data gather@0#4!SIGSTOP",
    ]


@pytest.fixture(scope="module")
def outcomes(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    folder = tmp_path_factory.mktemp("chaos")
    config = write_config(folder, tiny_data, **SECTIONS)
    found = Arena(folder, config).fight(map(parse, cases()), at_once=6)
    return {str(outcome.case): outcome for outcome in found}


@pytest.mark.parametrize("text", cases())
def test_nothing_is_lost(outcomes: dict[str, Outcome], text: str) -> None:
    outcome = outcomes[text]
    assert outcome.faults == []
    assert outcome.fell == len(outcome.case.blows), "a blow that did not fall proves nothing"


def test_a_case_is_its_text() -> None:
    generator = random.Random(3)
    for kind in (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP):
        for _ in range(50):
            case = draw(generator, kind)
            assert parse(str(case)) == case
    assert {*TRAINING, *SAVING, *RECOVERY} == set(POINTS)
