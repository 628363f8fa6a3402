"""What a campaign came to: counts, faults and times, of one piece or of several."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from tests.chaos.kills import PLACES, place_of
from tests.chaos.runs import Outcome

#: The least share of a campaign's cases whose blow falls there.
LEAST = {"save": 0.2, "recovery": 0.05}


@dataclass
class Tally:
    """`fell`: blows by the place where they fell; `late` and `stops`: see `Outcome`."""

    signal: str
    seeds: list[int]
    cases: int = 0
    fell: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PLACES, 0))
    layouts: dict[str, int] = field(default_factory=dict)
    faulty: dict[str, list[str]] = field(default_factory=dict)
    late: list[float] = field(default_factory=list)
    stops: list[list[float]] = field(default_factory=list)
    seconds: int = 0

    def add(self, outcome: Outcome) -> None:
        """Count a case; a faulty one is printed, so that it can be repeated."""
        case = outcome.case
        self.cases += 1
        self.layouts[case.layout] = self.layouts.get(case.layout, 0) + 1
        for blow in case.blows[: outcome.fell]:
            self.fell[place_of(blow.point)] += 1
        self.late += [round(seconds, 3) for seconds in outcome.late]
        self.stops += [[steps, round(seconds, 3)] for steps, seconds in outcome.stops]
        if outcome.faults:
            self.faulty[str(case)] = outcome.faults
            print(f"FAULTY: --case '{case}'", *outcome.faults, sep="\n  ", flush=True)

    def short(self, count: int) -> list[str]:
        """The places of cases that must be added to a campaign of `count`."""
        return [
            place
            for place, share in LEAST.items()
            for _ in range(math.ceil(share * count) - self.fell[place])
        ]

    def text(self) -> str:
        where = ", ".join(f"{count} in {place}" for place, count in self.fell.items())
        lines = [
            f"{self.cases} cases of {self.signal} at {len(self.layouts)} layouts, seeds "
            f"{', '.join(map(str, self.seeds))}: {sum(self.fell.values())} signals fell ({where}); "
            f"{len(self.faulty)} cases faulty; {self.seconds} s"
        ]
        if self.late:
            lines.append(
                f"{len(self.late)} stopped ranks named {_spread(self.late)} s after the time limit"
            )
        if self.stops:
            steps = [int(steps) for steps, _ in self.stops]
            lines.append(
                f"{len(steps)} requests to stop: {steps.count(0)} heard in the step under way, "
                f"{len(steps) - steps.count(0)} at most {max(steps)} later; exit "
                f"{_spread([seconds for _, seconds in self.stops])} s after the signal"
            )
        return "\n".join(lines)

    @staticmethod
    def read(paths: Iterable[Path]) -> Tally:
        """The sum of summaries of one signal.

        Raises ValueError where they are of several, or of one seed.
        """
        pieces = [Tally(**json.loads(path.read_text())) for path in paths]
        whole = Tally(pieces[0].signal, [])
        for piece in pieces:
            if piece.signal != whole.signal or set(piece.seeds) & set(whole.seeds):
                raise ValueError(f"{piece.signal} of seeds {piece.seeds} does not add to {whole}")
            whole.seeds += piece.seeds
            whole.cases += piece.cases
            whole.seconds += piece.seconds
            for mine, its in ((whole.fell, piece.fell), (whole.layouts, piece.layouts)):
                for name, count in its.items():
                    mine[name] = mine.get(name, 0) + count
            whole.faulty |= piece.faulty
            whole.late += piece.late
            whole.stops += piece.stops
        return whole


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.2f} (median) to {max(values):.2f}"
