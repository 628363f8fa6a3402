"""Which parameters travel together between data ranks, in the order in which a forward needs them.

A bucket is a layer's matrices, about as much as a layer's compute hides. The norms' weights are
needed first and their gradients come last, like the embedding's, so they share its bucket. The
head's weight is needed last and its gradient is there when the last forward ends: a bucket of its
own. In a pipeline every chunk has buckets of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from megallama.spec.parameters import EMBEDDING, FINAL_NORM, OUTPUT, Parameter


def buckets(table: Sequence[Parameter]) -> tuple[tuple[str, ...], ...]:
    """The names in each bucket of a chunk's table; no bucket is empty.

    An embedding that follows the final norm is the head's weight: the copy of a tied one, on
    another rank than the embedding itself.
    """
    found: dict[float, list[str]] = {}
    after_norm = False
    for parameter in table:
        if parameter.name == OUTPUT or (parameter.name == EMBEDDING and after_norm):
            place = inf
        elif parameter.layer is None or not parameter.decays:
            place = -1
        else:
            place = parameter.layer
        after_norm |= parameter.name == FINAL_NORM
        found.setdefault(place, []).append(parameter.name)
    return tuple(tuple(found[place]) for place in sorted(found))
