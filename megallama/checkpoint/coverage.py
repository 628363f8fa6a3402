"""Whether rectangles tile a tensor: every element in one of them, none in two."""

from __future__ import annotations

from array import array
from itertools import product

import numpy as np
import numpy.typing as npt


class Tiling:
    """The rectangles of one tensor of `shape`.

    Plain numbers in one array: as objects, two million of them keep the garbage collector busy.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self._edges = array("q")

    def add(self, start: tuple[int, ...], size: tuple[int, ...]) -> None:
        """A rectangle that begins at `start`."""
        self._edges.extend(start)
        self._edges.extend(size)

    def add_all(self, boxes: npt.NDArray[np.int64]) -> None:
        """N rectangles: (N, 2 · dimensions), where each begins and then its size."""
        self._edges.frombytes(np.ascontiguousarray(boxes).tobytes())

    def fault(self) -> str:
        """What is wrong with it; empty where nothing is.

        The rectangles' edges cut the tensor into cells. Each rectangle adds 1 at its first corner,
        taken back behind its ends, so that cumulative sums along all dimensions count the
        rectangles over each cell. Time and memory are those of the cells: of 2,048 ranks that
        divide rows, or rows and columns, there are 2,048.
        """
        shape = np.array(self.shape, np.int64)
        boxes = np.array(self._edges, np.int64).reshape(-1, 2, len(shape))
        begins, ends = boxes[:, 0], boxes.sum(1)
        if (begins < 0).any() or (ends > shape).any():
            return "a slice reaches beyond the tensor"
        cuts = [
            np.unique(np.concatenate([begins[:, dim], ends[:, dim], [0, size]]))
            for dim, size in enumerate(self.shape)
        ]
        over = np.zeros([len(cut) for cut in cuts], np.int32)
        for corner in product((0, 1), repeat=len(shape)):
            at = tuple(
                np.searchsorted(cuts[dim], (begins, ends)[side][:, dim])
                for dim, side in enumerate(corner)
            )
            np.add.at(over, at, (-1) ** sum(corner))
        for dim in range(len(shape)):
            over = np.cumsum(over, dim)
        inside = over[tuple(slice(-1) for _ in self.shape)]
        if (inside > 1).any():
            return "elements are in two slices"
        missing = shape.prod() - boxes[:, 1].prod(1).sum()
        return "" if (inside == 1).all() else f"{missing} elements are in no slice"
