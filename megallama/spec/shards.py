"""Which rectangle of which global tensor a rank holds: the one place where that is worked out.

Tensor parallelism divides a parameter along its `shard_dim`; data parallelism (ZeRO-1, arXiv
1910.02054) divides what is left by rows (elements of a vector), padded to a multiple of the data
ranks, so every shard is made of rectangles of global tensors, whatever the layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from megallama.spec.grid import Place
from megallama.spec.parameters import Parameter, Part


@dataclass(frozen=True)
class Piece:
    """A rectangle of a part, and the first row at which it lies in the local tensor.

    `copies`: the number of tensor ranks that hold this rectangle. `owned`: of these this rank is
    the first, and the parameter is no copy of another pipeline rank's (tied embeddings); what is
    counted or written once is so by its owner.
    """

    part: Part
    start: tuple[int, ...]
    shape: tuple[int, ...]
    row: int
    copies: int
    owned: bool

    @property
    def rows(self) -> slice:
        """Where the piece lies in its local tensor."""
        return slice(self.row, self.row + self.shape[0])

    @property
    def region(self) -> tuple[slice, ...]:
        """Where the piece lies in its part."""
        return tuple(
            slice(begin, begin + n) for begin, n in zip(self.start, self.shape, strict=True)
        )


@dataclass(frozen=True)
class Shard:
    """A parameter as one rank holds it.

    The passes multiply by a tensor of `shape`; `padded_rows` is its number of rows made a multiple
    of the data ranks, of which the optimizer here has `own_rows`. `pieces` lie in the tensor of the
    passes, `own_pieces` in the optimizer's.
    """

    parameter: Parameter
    shape: tuple[int, ...]
    padded_rows: int
    own_rows: slice
    pieces: tuple[Piece, ...]
    own_pieces: tuple[Piece, ...]

    @property
    def name(self) -> str:
        return self.parameter.name

    @property
    def padded_shape(self) -> tuple[int, ...]:
        return (self.padded_rows, *self.shape[1:])

    @property
    def own_shape(self) -> tuple[int, ...]:
        return (self.own_rows.stop - self.own_rows.start, *self.shape[1:])


def shard_table(table: Iterable[Parameter], place: Place) -> tuple[Shard, ...]:
    """Every parameter's shard at a place of the grid."""
    return tuple(shard(parameter, place) for parameter in table)


def shard(parameter: Parameter, place: Place, copy: bool = False) -> Shard:
    """What the rank at `place` holds of a parameter.

    `copy`: another pipeline rank holds the same, and it is the one that owns the pieces.
    """
    pieces, rows = _tensor_pieces(parameter, place.along("tensor"), place.grid.tensor)
    if copy:
        pieces = tuple(replace(piece, owned=False) for piece in pieces)
    columns = parameter.shape[1:]
    if parameter.shard_dim == 1:
        columns = (columns[0] // place.grid.tensor,)
    own = -(-rows // place.grid.data)
    own_rows = slice(own * place.along("data"), own * (place.along("data") + 1))
    return Shard(
        parameter,
        (rows, *columns),
        own * place.grid.data,
        own_rows,
        pieces,
        tuple(_within(pieces, own_rows)),
    )


def vocab_rows(vocab: int, tensor: int) -> int:
    """Rows of the vocabulary on each tensor rank; the last ranks' may be padding."""
    return -(-vocab // tensor)


def _tensor_pieces(parameter: Parameter, rank: int, size: int) -> tuple[tuple[Piece, ...], int]:
    """The pieces of a tensor rank, and the rows of its local tensor, padding included."""
    pieces, row = [], 0
    for part in parameter.parts:
        start, shape, held = _rectangle(parameter, part, rank, size)
        if shape[0]:
            copies = _copies(parameter, part, size)
            pieces.append(Piece(part, start, shape, row, copies, owned=rank % copies == 0))
        row += held
    return tuple(pieces), row


def _copies(parameter: Parameter, part: Part, size: int) -> int:
    """Tensor ranks, always neighbours, that hold the same rectangle of a part."""
    if parameter.shard_dim is None:
        return size
    return max(1, size // part.heads) if part.heads else 1


def _rectangle(
    parameter: Parameter, part: Part, rank: int, size: int
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Start, shape and the number of rows set aside for the rectangle of a tensor rank."""
    rows = part.shape[0]
    if parameter.shard_dim is None:
        return (0,) * len(part.shape), part.shape, rows
    columns = part.shape[1]
    if parameter.shard_dim == 1:
        return (0, rank * columns // size), (rows, columns // size), rows
    if part.heads:
        height = rows // part.heads * max(1, part.heads // size)
        first = rank * part.heads // size * (rows // part.heads)
        return (first, 0), (height, columns), height
    height = vocab_rows(rows, size)
    first = min(rows, rank * height)
    return (first, 0), (min(height, rows - first), columns), height


def _within(pieces: Sequence[Piece], rows: slice) -> Iterable[Piece]:
    """The pieces cut to some rows of the local tensor, which become a tensor of their own."""
    for piece in pieces:
        first, last = max(piece.row, rows.start), min(piece.rows.stop, rows.stop)
        if first < last:
            yield replace(
                piece,
                start=(piece.start[0] + first - piece.row, *piece.start[1:]),
                shape=(last - first, *piece.shape[1:]),
                row=first - rows.start,
            )
