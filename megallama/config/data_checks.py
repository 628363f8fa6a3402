"""Mixtures and phases that contradict themselves or each other; `config.checks` runs these."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from megallama.config.faults import Fault, at
from megallama.config.schema import Phase, Source


def phases_in_order(mixture: tuple[Source, ...], phases: tuple[Phase, ...]) -> Iterator[Fault]:
    """One of mixture and phases; every phase but the last ends, above the one before it."""
    if mixture and phases:
        yield Fault(
            f"data.phases (of {len(phases)})", "given with data.mixture", "remove one of them"
        )
    ends = [phase.until_tokens for phase in phases]
    for i, (end, following) in enumerate(pairwise(ends)):
        if end is None:
            yield Fault(
                f"data.phases.{i}.until_tokens",
                "is missing, and other phases follow",
                "set it: the last phase alone may go without",
            )
        elif following is not None and following <= end:
            yield Fault(
                at(f"data.phases.{i + 1}.until_tokens", following),
                f"is not above the phase before it, which ends at {end}",
                "put the phases in order: each counts tokens from the start of the run",
            )


def sources_alike(mixture: tuple[Source, ...], phases: tuple[Phase, ...]) -> Iterator[Fault]:
    """A name is one source of a mixture, and the same files in every phase."""
    mixtures = {"data.mixture": mixture}
    mixtures |= {f"data.phases.{i}.mixture": phase.mixture for i, phase in enumerate(phases)}
    paths: dict[str, Path] = {}
    for place, sources in mixtures.items():
        for name, times in Counter(source.name for source in sources).items():
            if times > 1:
                yield Fault(
                    at(f"{place}.name", name),
                    f"names {times} sources",
                    "give each source a name of its own",
                )
        for source in {source.name: source for source in sources}.values():
            first = paths.setdefault(source.name, source.path)
            if source.path != first:
                yield Fault(
                    at(f"{place}.{source.name}.path", str(source.path)),
                    f"the same source is at {first} in an earlier phase",
                    "give it that path or another name",
                )
