"""Connect this process's groups.

Only the members of a group meet, in keys of the store that have the group's name and its members.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch

from megallama.dist import compat
from megallama.dist.gloo import GlooGroup
from megallama.dist.group import Group, SingleGroup
from megallama.dist.link import Link
from megallama.dist.nccl import NcclGroup
from megallama.dist.recorder import Recorder
from megallama.dist.traffic import Traffic
from megallama.dist.watch import Watch
from megallama.errors import LostError

#: How long a rank waits for an operation before it calls a peer lost. What counts is the time that
#: somebody waits for its handle, not the operation's own: in a pipeline a send may be under way for
#: many passes before its receive is posted, and a receive is posted a pass or more before it is
#: needed, behind others of its group. None of that time says anything about the peer. It is up to
#: the one who waits, for that is where the job stands still.
TIMEOUT = timedelta(minutes=10)


@dataclass
class Groups:
    """The groups of one process by name, what it sent in all of them, and what ran when."""

    by_name: dict[str, Group]
    traffic: Traffic
    recorder: Recorder = field(default_factory=Recorder)
    #: Knows how long this process waited, on gloo; None on NCCL, where the device waits.
    watch: Watch | None = None

    def __getitem__(self, name: str) -> Group:
        return self.by_name[name]

    def close(self) -> None:
        """Close every group."""
        for group in self.by_name.values():
            group.close()


@dataclass(frozen=True)
class _Setup:
    """What the groups of one process have in common."""

    store: compat.Store | None
    rank: int
    traffic: Traffic
    recorder: Recorder
    watch: Watch
    strict: bool
    timeout: timedelta
    hostname: str | None


def connect(
    store: compat.Store | None,
    rank: int,
    members: Mapping[str, Sequence[int]],
    device: torch.device,
    *,
    strict: bool = False,
    timeout: timedelta = TIMEOUT,
    hostname: str | None = None,
) -> Groups:
    """The groups of global rank `rank`: gloo on a CPU, NCCL on CUDA.

    Returns when all ranks are there; NCCL connects with its first operation.

    `store`: where they meet; None where every group is of one.
    `members`: group name → the global ranks of this rank's group of that name, in group order; all
    of them name it alike. A group of one is a SingleGroup.
    `strict`: compare every operation across its group before it runs (gloo only); ranks that
    differ get a SequenceError.
    `timeout`: how long to wait for the members here, and for a handle, before LostError. It is
    raised at most about 2 s later, for the ranks to agree on who is missing.
    `hostname`: the address that gloo listens on ("127.0.0.1" for local workers); None: the network
    interface of GLOO_SOCKET_IFNAME, else gloo's choice.
    """
    for name, ranks in members.items():
        if rank not in ranks or len(set(ranks)) != len(ranks):
            raise ValueError(f"group {name!r}: {list(ranks)} is no group of rank {rank}")
    if strict and device.type != "cpu":
        raise ValueError(f"the strict mode compares on gloo, not on {device}")
    watch = Watch(store, rank, timeout)
    watch.announce()
    setup = _Setup(store, rank, Traffic(), Recorder(), watch, strict, timeout, hostname)
    groups: dict[str, Group] = {}
    # A group's connection waits for its members: one order of names on all ranks, whatever groups
    # each is in, so that nobody waits in a circle.
    for name in sorted(members):
        ranks = members[name]
        if len(ranks) == 1:
            groups[name] = SingleGroup(name)
        elif device.type == "cpu":
            groups[name] = _gloo(setup, name, ranks)
        else:
            groups[name] = _nccl(setup, name, ranks)
    gloo = watch if device.type == "cpu" else None
    return Groups(groups, setup.traffic, setup.recorder, gloo)


def _own_store(setup: _Setup, name: str, ranks: Sequence[int]) -> compat.Store:
    """Keys of this group alone: two groups of a grid share a name, and their members differ."""
    if setup.store is None:
        raise ValueError(f"group {name!r} of ranks {list(ranks)} has no store to meet in")
    return compat.PrefixStore(f"{name}/{'-'.join(map(str, ranks))}", setup.store)


def _gloo(setup: _Setup, name: str, ranks: Sequence[int]) -> Group:
    position = list(ranks).index(setup.rank)
    own = _own_store(setup, name, ranks)
    try:
        backend = compat.gloo_backend(own, position, len(ranks), setup.timeout, setup.hostname)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise LostError(
            f"group {name!r}: rank {setup.rank} could not connect with ranks {list(ranks)} "
            f"({reason}); try again",
            follows=True,
        ) from None
    link = Link(backend, name, position, ranks)
    vigil = setup.watch.over(link)
    return GlooGroup(link, vigil, setup.traffic, setup.recorder, strict=setup.strict)


def _nccl(setup: _Setup, name: str, ranks: Sequence[int]) -> Group:
    position = list(ranks).index(setup.rank)
    backend = compat.nccl_backend(
        _own_store(setup, name, ranks), position, len(ranks), setup.timeout
    )
    return NcclGroup(backend, name, position, len(ranks), setup.traffic)
