"""Which parameters travel together between data ranks, in the order in which a forward needs them.

A bucket is a layer's matrices, about as much as a layer's compute hides. The norms' weights are
needed first and their gradients come last, like the embedding's, so they share its bucket.
"""

from __future__ import annotations

from collections.abc import Sequence

from megallama.spec.parameters import OUTPUT, Parameter


def buckets(table: Sequence[Parameter]) -> tuple[tuple[str, ...], ...]:
    """The names in each bucket; no bucket is empty."""
    found: dict[int, list[str]] = {}
    for parameter in table:
        if parameter.name == OUTPUT:
            place = len(table)
        elif parameter.layer is None or not parameter.decays:
            place = -1
        else:
            place = parameter.layer
        found.setdefault(place, []).append(parameter.name)
    return tuple(tuple(found[place]) for place in sorted(found))
