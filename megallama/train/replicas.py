"""Silent damage of what several ranks hold alike, found by comparing checksums.

The weights that a data rank multiplies by are copies of its owners' masters, rounded. The masters
and moments of norms and of replicated key/value heads, and of a tied embedding's two ends, are the
same on several ranks. A rank where one differs has lost bits, in memory or on the way, and so have
the gradients that it made: nothing is repaired or saved, the run goes on from its last checkpoint.

A checksum is the sum of an array's 8-byte words, modulo 2^64: one flipped bit always changes it.
What one rank alone holds, the masters and moments of a row, has nothing to be compared with.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from megallama.dist.group import Group
from megallama.errors import LostError
from megallama.spec.groups import TIED
from megallama.spec.parameters import EMBEDDING
from megallama.spec.stages import owners_of
from megallama.train.build import Trainer
from megallama.train.host import read_back
from megallama.train.meeting import Meeting

WORD = 8  # bytes


@dataclass(frozen=True)
class Difference:
    """A tensor of global rank `rank` that is not what it is on rank `other`: where that is the same
    rank, not what its master rounds to."""

    rank: int
    tensor: str
    other: int
    #: Whether the other one may be wrong just as well: two differ, and there is no third.
    either: bool = False

    def text(self, host: str) -> str:
        where = f"rank {self.rank} (host {host})"
        if self.rank == self.other:
            return f"{where}: {self.tensor} or its master there is damaged"
        doubt = ", and either may be wrong" if self.either else ""
        return f"{where}: {self.tensor} is not what rank {self.other} has{doubt}"


@dataclass(frozen=True)
class _Compared:
    """A comparison over a group: where `differs` (R, n) says so, column i of rank r is not this
    rank's. `explain` turns what differs into differences of this rank."""

    differs: Tensor
    explain: Callable[[list[tuple[int, int]]], Iterable[Difference]]


class Replicas:
    """Compares what the ranks of a trainer hold alike."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.state, self.place = trainer, trainer.model.state, trainer.place
        self._found: list[_Compared] = []
        pieces = [
            (shard.name, piece)
            for shard in self.state.table
            for piece in shard.own_pieces
            if piece.copies > 1
        ]
        optimizer = trainer.optimizer
        kinds = {
            "master": self.state.masters,
            "first moment": optimizer.exp_avg,
            "second moment": optimizer.exp_avg_sq,
        }
        #: Of what several tensor ranks hold: its name, how many do, and this rank's.
        self._shared = [
            (f"the {kind} of {piece.part.name}", piece.copies, tensors[name][piece.rows])
            for kind, tensors in kinds.items()
            for name, piece in pieces
        ]
        #: The same of a tied embedding whose ends are on two pipeline ranks.
        self._tied = [
            (f"the {kind} of {EMBEDDING}", 2, tensors[EMBEDDING])
            for kind, tensors in kinds.items()
            if TIED in trainer.groups.by_name
        ]
        self._neighbours = self._mask("tensor", self._shared)
        self._ends = self._mask(TIED, self._tied)

    def compare(self) -> Tensor:
        """Compare, between a step's backward and its update; whether this rank found a difference,
        as a flag () on its device: it travels in the step's sum, and the host waits for nothing.

        All ranks call it alike.
        """
        for handle in self.state.arriving.values():
            handle.wait()
        grid, rank = self.place.grid, self.place.rank
        found = []
        if grid.data > 1 or self.state.own_weights:
            found.append(self._weights())
        if grid.tensor > 1 and self._shared:
            tensor = self.trainer.groups["tensor"]
            ranks = grid.group("tensor", rank)
            found.append(_copies(tensor, ranks, self._shared, self._neighbours))
        if self._tied:
            ends = grid.group("pipeline", rank)
            head = owners_of(self.trainer.config, grid)[-1]
            tied = self.trainer.groups[TIED]
            found.append(_copies(tied, (ends[0], ends[head]), self._tied, self._ends))
        self._found = found
        if not found:
            return torch.zeros((), dtype=torch.bool, device=self.state.device)
        return torch.stack([one.differs.any() for one in found]).any()

    @property
    def differences(self) -> list[Difference]:
        """What this rank found in the last comparison. The host waits: for a rank that is lost."""
        return [one for found in self._found for one in found.explain(_places(found.differs))]

    def lost(self, meeting: Meeting, step: int) -> LostError:
        """The error that every rank ends with, where one found a difference in this step."""

        def tell() -> str:
            found = [asdict(difference) for difference in self.differences]
            return json.dumps({"host": socket.gethostname(), "found": found})

        def conclude(ranks: Sequence[str]) -> str:
            told = [json.loads(rank) for rank in ranks]
            found = [Difference(**fields) for rank in told for fields in rank["found"]]
            odd = odd_ones(found, self.place.grid.data)
            return "; ".join(one.text(told[one.rank]["host"]) for one in odd)

        words = meeting.hold(tell, conclude)
        error = LostError(
            f"step {step}: {words}; memory or a link is faulty: leave that machine out, and "
            "resume from the last checkpoint"
        )
        error.shared = True
        return error

    def _mask(self, name: str, held: Sequence[tuple[str, int, Tensor]]) -> Tensor:
        """Whether a rank of a group holds what this one does, of each of n tensors: (R, n) bool.

        Made once: a transfer to the device would hold the step up.
        """
        group = self.trainer.groups.by_name.get(name)
        if group is None or not held:
            return torch.zeros(0, len(held), dtype=torch.bool)
        counts = torch.tensor([copies for _, copies, _ in held])
        neighbours = torch.arange(group.size)[:, None] // counts
        return (neighbours == group.rank // counts).to(self.state.device)

    def _weights(self) -> _Compared:
        """This rank's weights beside the masters of the data ranks that own the rows."""
        state, group = self.state, self.trainer.groups["data"]
        names = [shard.name for shard in state.table]
        wanted_P = torch.stack([checksums(state.masters[n].to(state.compute), 1)[0] for n in names])
        held = [checksums(state.padded_weights[name], group.size) for name in names]
        owners = self.place.grid.group("data", self.place.rank)
        wanted_RP = group.all_gather(wanted_P[None]).wait()

        def explain(places: list[tuple[int, int]]) -> Iterable[Difference]:
            for owner, parameter in places:
                name, either = f"the weight {names[parameter]}", group.size == 2
                either &= not state.own_weights  # there is no master apart from the weights
                yield Difference(self.place.rank, name, owners[owner], either)

        return _Compared(torch.stack(held, dim=1) != wanted_RP, explain)


def _copies(
    group: Group,
    ranks: Sequence[int],
    held: Sequence[tuple[str, int, Tensor]],
    neighbours_Rn: Tensor,
) -> _Compared:
    """Tensors that neighbours in a group hold, as many as said beside each."""
    mine = torch.stack([checksums(tensor, 1)[0] for _, _, tensor in held])
    differs = group.all_gather(mine[None]).wait() != mine
    differs &= neighbours_Rn

    def explain(places: list[tuple[int, int]]) -> Iterable[Difference]:
        for index, (name, copies, _) in enumerate(held):
            others = [ranks[other] for other, column in places if column == index]
            even = 2 * len(others) == copies
            # The smaller part is odd; of two halves the one without the first rank says so.
            if 2 * len(others) > copies or (even and min(others) < ranks[group.rank]):
                yield Difference(ranks[group.rank], name, min(others), either=even)

    return _Compared(differs, explain)


def checksums(x: Tensor, parts: int) -> Tensor:
    """Of each of so many equal parts of x, which follow each other: (parts,) int64."""
    x_PN = x.reshape(parts, -1)
    if x_PN.shape[1] * x.itemsize % WORD:  # 40 times slower, for shapes that no real model has
        return x_PN.view(_INTEGERS[x.itemsize]).sum(1, dtype=torch.int64)
    if x_PN.storage_offset() * x.itemsize % WORD:
        x_PN = x_PN.clone()
    return x_PN.view(torch.int64).sum(1)


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def odd_ones(found: Sequence[Difference], data: int) -> list[Difference]:
    """What all ranks found, without what follows from it; `data`: the number of data ranks.

    Where all of several others have not what an owner has, the owner is the odd one.
    """
    tellers: dict[tuple[int, str], set[int]] = {}
    for one in found:
        tellers.setdefault((one.other, one.tensor), set()).add(one.rank)
    odd: dict[tuple[int, str], Difference] = {}
    for one in found:
        owner, told = one.other, tellers[one.other, one.tensor]
        if len(told - {owner}) == data - 1 and len(told) > 1:
            one = Difference(owner, one.tensor, owner)
        odd.setdefault((one.rank, one.tensor), one)
    return sorted(odd.values(), key=lambda one: one.rank)


def _places(mask: Tensor) -> list[tuple[int, int]]:
    """Row and column of everything that is true in a matrix."""
    columns = mask.shape[1]
    (flags,) = read_back(mask.flatten())
    return [divmod(index, columns) for index, flag in enumerate(flags) if flag]
