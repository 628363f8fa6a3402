"""Where a micro-batch's passes keep what its backward needs: one saved set a layer.

Every set is taken exactly once, by the pass that last needs it, so what is held at any time can be
counted.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator

from torch import Tensor

Saved = dict[str, Tensor]


class Stash:
    """Saved sets by key."""

    def __init__(self) -> None:
        self._sets: dict[Hashable, Saved] = {}

    def put(self, key: Hashable, saved: Saved) -> Saved:
        """Keep a saved set until it is taken, and return it.

        Raises:
            KeyError: the key is in use: two micro-batches share the stash, and one would get the
                other's activations.
        """
        if key in self._sets:
            raise KeyError(f"a saved set of {key!r} is waiting for its backward")
        self._sets[key] = saved
        return saved

    def take(self, key: Hashable) -> Saved:
        """Hand over a saved set and forget it."""
        return self._sets.pop(key)

    def peek(self, key: Hashable) -> Saved:
        """Look at a saved set that stays."""
        return self._sets[key]

    def __iter__(self) -> Iterator[Hashable]:
        """The keys."""
        return iter(self._sets)

    def __len__(self) -> int:
        return len(self._sets)

    def bytes_held(self) -> int:
        """Bytes of all storages that the saved sets keep alive, each counted once."""
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for saved in self._sets.values()
            for t in saved.values()
        }
        return sum(storages.values())
