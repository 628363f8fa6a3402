"""The strict mode's comparison: do all ranks of a group ask for the same thing at the same time?

A NCCL group whose ranks issue different collectives, or the same in another order, hangs or mixes
up data. On gloo a comparison before every operation names the two sides instead.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from megallama.dist.link import CHECK, POINT_CHECK, Link

#: Bytes of a fingerprint: a digest of all operations so far, then the beginning of the last one.
LENGTH, DIGEST = 512, 16


class SequenceError(RuntimeError):
    """Ranks of a group asked for different operations: a bug in whoever issued them."""


def describe(operation: str, *tensors: Tensor, **more: object) -> str:
    """An operation as a fingerprint has it: its name, shapes, dtypes and options."""
    shapes = [f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors]
    options = [f"{key}={value}" for key, value in more.items() if value is not None]
    return " ".join([operation, ", ".join(shapes), *options]).strip()


def _fingerprint(digest: bytes, text: str) -> Tensor:
    """(LENGTH,) uint8."""
    data = (digest + text.encode()[: LENGTH - DIGEST]).ljust(LENGTH)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _text(fingerprint: Tensor) -> str:
    return bytes(fingerprint[DIGEST:].tolist()).decode(errors="ignore").strip()


def _digest(*parts: bytes) -> bytes:
    return hashlib.blake2b(b"\n".join(parts), digest_size=DIGEST).digest()


class Check:
    """Compares each operation of one group with what its other ranks ask for."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._history = bytes(DIGEST)
        self._collectives = 0
        self._points = dict.fromkeys(range(link.size), 0)

    def collective(self, text: str) -> None:
        """Raise SequenceError, on every rank alike, unless all ranks ask for `text` next."""
        link, number = self._link, self._collectives
        self._collectives += 1
        self._history = _digest(self._history, text.encode())
        mine = _fingerprint(self._history, text)
        asked = {rank: torch.empty_like(mine) for rank in link.peers()}
        link.exchange(
            f"to compare operation {number}, {text}",
            {rank: [mine] for rank in asked},
            {rank: [theirs] for rank, theirs in asked.items()},
            CHECK,
        )
        if all(torch.equal(mine, theirs) for theirs in asked.values()):
            return
        asked[link.rank] = mine
        lines = [f"rank {link.members[r]} asked for {_text(asked[r])}" for r in range(link.size)]
        raise SequenceError(
            f"group {link.name!r}, operation {number}: its ranks differ: {'; '.join(lines)}"
        )

    def point(self, peer: int, sends: bool, tensor: Tensor, label: str) -> None:
        """Compare a send with its receive, labels included; only the two ranks take part.

        Both sides meet here, so a send goes on when its receive is reached and no sooner. The
        number counts the messages of the two ranks, in both directions.
        """
        link, number = self._link, self._points[peer]
        self._points[peer] += 1
        ends = (link.rank, peer) if sends else (peer, link.rank)
        source, target = (link.members[rank] for rank in ends)
        text = describe(" ".join(f"rank {source} sends to rank {target}: {label}".split()), tensor)
        mine = _fingerprint(_digest(text.encode()), text)
        theirs = torch.empty_like(mine)
        owed = f"to compare message {number}, {text}"
        link.exchange(owed, {peer: [mine]}, {peer: [theirs]}, POINT_CHECK)
        if not torch.equal(mine, theirs):
            here, there = link.members[link.rank], link.members[peer]
            raise SequenceError(
                f"group {link.name!r}, message {number} between ranks {here} and {there}: they "
                f"differ: rank {here} has '{text}'; rank {there} has '{_text(theirs)}'"
            )
