"""Registers ops with torch.library: a schema, checks, a kernel and its reference.

Every op writes into tensors that it is given and returns nothing: whoever calls decides what is
allocated, and the implementation for fake tensors is the checks alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megallama.kernels import native

#: Keeps the registrations for the life of the process, as torch asks.
LIBRARY = torch.library.Library("megallama", "FRAGMENT")


def define(
    schema: str,
    check: Callable[..., None],
    run: Callable[..., None],
    reference: Callable[..., None],
) -> Callable[..., None]:
    """Return the op `torch.ops.megallama.<name of the schema>`.

    All three take the schema's arguments: `check` raises TypeError or ValueError naming the one
    that is wrong, `run` has the variant of the extension in front, `reference` is plain PyTorch.
    The first tensor's device and type decide between the two; where the extension has no kernel
    because PyTorch's own is as good, the reference runs.
    """
    name = schema.partition("(")[0]

    def implementation(*args: Any) -> None:
        check(*args)
        first = next(x for x in args if isinstance(x, Tensor))
        variant = native.variant_for(first)
        if variant is None or not hasattr(variant, name):
            reference(*args)
        else:
            run(variant, *args)

    LIBRARY.define(schema)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"megallama::{name}", check, lib=LIBRARY)
    op: Callable[..., None] = getattr(torch.ops.megallama, name).default
    return op
