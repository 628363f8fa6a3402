"""What a pass is made of, as data: kernels, and collectives that are started and waited for.

Passes are generators of these steps (`megallama.plan.layer`); `megallama.plan.driver` makes of them
the one order in which a rank issues everything, `megallama.plan.streams` times it, and
`megallama.plan.costs` says what each step takes.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

Phase = Literal["forward", "dgrad", "wgrad"]


@dataclass(frozen=True)
class Gemm:
    """(m, k) · (k, n), `itemsize` bytes an element, `out` of the result; `again`: a recomputation.

    `count`: so many of them in one launch.
    """

    name: str
    phase: Phase
    m: int
    n: int
    k: int
    itemsize: int = 2
    again: bool = False
    count: int = 1

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k * self.count

    @property
    def bytes(self) -> int:
        """Read and written once; a weight gradient is added into a buffer of 4 bytes or more."""
        out = 2 * max(self.itemsize, 4) if self.phase == "wgrad" else self.itemsize
        operands = self.itemsize * (self.m + self.n) * self.k
        return self.count * (operands + out * self.m * self.n)


@dataclass(frozen=True)
class Attend:
    """Causal flash attention over samples of `length` tokens, `width` columns of queries in all.

    Counted are half of S²: 2 products forward, 5 backward (arXiv 2307.08691, §3.1.2).
    """

    name: str
    phase: Literal["forward", "backward"]
    tokens: int
    length: int
    width: int
    again: bool = False

    @property
    def flops(self) -> int:
        each = self.tokens * self.length * self.width
        return (2 if self.phase == "forward" else 5) * each


@dataclass(frozen=True)
class Move:
    """A kernel that moves memory; `share` names what it reaches (`hardware.Shares`)."""

    name: str
    share: str
    bytes: int


Compute: TypeAlias = Gemm | Attend | Move


@dataclass(frozen=True)
class Collective:
    """Among `ranks` ranks of a group; `bytes`: what one of them sends, as `spec.collectives`."""

    group: str
    operation: str
    ranks: int
    bytes: int


@dataclass(eq=False)
class Start:
    """A collective is issued. Two of the same are two."""

    collective: Collective


@dataclass(frozen=True)
class Wait:
    """What was started is needed; nothing, where there is one rank, or a turn ends.

    `cover`: how many deferred weight gradients are worth running before (`dist.handle.Handle`).
    """

    started: tuple[Start, ...] = ()
    cover: int = 0


@dataclass(frozen=True)
class Defer:
    """Kernels of weight gradients that are put off to a later wait, as one piece."""

    pieces: tuple[Compute, ...]


Step: TypeAlias = Compute | Start | Wait | Defer
#: What `driver.drive` leaves.
Issued: TypeAlias = Compute | Start | Wait

T = TypeVar("T")
#: A pass gives its steps, and returns a T.
Pass: TypeAlias = Generator[Step, None, T]

#: Yielded where a pass waits for nothing and another may take its turn (`autograd.passes.PAUSE`).
PAUSE = Wait(cover=1)
