"""What one rank asks of its groups: the operations that it issues, and where it waits for them.

A rank's *program* is all that decides whether a job goes on: what a pass computes does not. An
operation is issued into its group's stream and runs when every rank that takes part has issued its
own; the rank goes on until it waits for one.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import megallama

PACKAGE = Path(megallama.__file__).parent
#: Files whose lines say nothing of who wanted an operation: whoever called them does.
PASSED_OVER = ("check/", "dist/", "parallel/tokens.py")

#: What every rank that takes part must say alike: label, shapes, dtypes, the wire's; of a
#: collective kind and place in the code, and of a message who sends to whom.
Meaning = tuple[object, ...]


@dataclass(frozen=True)
class Operation:
    """One call of a group. `ends`: of a message, the sender's and the receiver's places in the
    group. `sent`: bytes that this rank sends. `site`: file and line of whoever wanted it. `label`:
    of a message what its sender calls it; of rows the names of the parameters, where known."""

    group: str
    kind: str
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    wire: str | None
    sent: int
    site: str
    ends: tuple[int, int] | None = None
    label: str = ""

    @property
    def meaning(self) -> Meaning:
        """Of a collective also who wants it, and of which parameters: two of one shape, in another
        order on some rank, run and mix up their data."""
        how = (self.kind, self.site) if self.ends is None else (self.ends,)
        return *how, self.label, self.shapes, self.dtypes, self.wire

    def __str__(self) -> str:
        shapes = list(map(list, self.shapes[:3])) if len(self.shapes) > 1 else [*self.shapes[0]]
        more = f" and {len(self.shapes) - 3} more" if len(self.shapes) > 3 else ""
        wire = f" as {self.wire}" if self.wire else ""
        label = f" of {self.label}" if self.label else ""
        return f"{self.kind} {shapes}{more} {self.dtypes[0]}{wire}{label} at {self.site}"


class Book:
    """Every operation that some rank of a job issues, by number: programs are lists of these."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self._numbers: dict[Operation, int] = {}
        self._meanings: dict[Meaning, int] = {}
        #: Of each operation the number of its meaning: equal where operations match.
        self.meanings: list[int] = []

    def number(self, operation: Operation) -> int:
        found = self._numbers.get(operation)
        if found is None:
            found = self._numbers[operation] = len(self.operations)
            self.operations.append(operation)
            meaning = self._meanings.setdefault(operation.meaning, len(self._meanings))
            self.meanings.append(meaning)
        return found


class Log:
    """A rank's program as it comes about.

    `events`: of an issued operation its number in the book; of a wait -1 - n for the n-th operation
    that this rank issued. `names`: of tensors that live as long as the rank, by `id`.
    """

    def __init__(self, book: Book) -> None:
        self.book = book
        self.events = array("l")
        self.issued = 0
        self.names: dict[int, str] = {}

    def issue(self, operation: Operation) -> int:
        """Note an operation; returns how many were issued before."""
        return self.issue_again(self.book.number(operation))

    def issue_again(self, number: int) -> int:
        """As `issue`, of an operation that the book has."""
        self.events.append(number)
        self.issued += 1
        return self.issued - 1

    def wait(self, place: int) -> None:
        """Note a wait for the operation that `issue` returned this for."""
        self.events.append(-1 - place)


def issued(book: Book, events: Sequence[int]) -> Iterator[Operation]:
    """The operations of a stretch of a program, in order."""
    return (book.operations[event] for event in events if event >= 0)


def call_site() -> str:
    """File and line of the nearest caller in this package that is not `PASSED_OVER`."""
    root, frame = f"{PACKAGE}/", sys._getframe(1)
    while frame.f_back is not None:
        name = frame.f_code.co_filename
        if name.startswith(root) and not name[len(root) :].startswith(PASSED_OVER):
            break
        frame = frame.f_back
    name = frame.f_code.co_filename.removeprefix(f"{PACKAGE.parent}/")
    return f"{name}:{frame.f_lineno}"
