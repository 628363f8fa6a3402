"""Bad arguments: an error of the right type that names the one that is wrong, before any work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megallama.kernels import rms_norm, rope, swiglu

T, D, H, E, EPS = 4, 6, 3, 8, 1e-5


def good() -> dict[str, dict[str, Any]]:
    """Every op's arguments by name, in the schema's order."""

    def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.ones(shape, dtype=dtype)

    tables = dict(cos=new(T, 1, E // 2, dtype=torch.float32), sin=new(T, 1, E // 2).float())
    sums = dict(residual=new(T, D), dx=new(T, D), dw=new(D, dtype=torch.float32))
    return {
        "rms_norm_forward": dict(
            x=new(T, D), residual=new(T, D), w=new(D), eps=EPS, n=new(T, D), sum=new(T, D)
        ),
        "rms_norm_backward": dict(dn=new(T, D), x=new(T, D), w=new(D), eps=EPS, **sums),
        "rope": dict(x=new(T, H, E), **tables, inverse=False),
        "swiglu_forward": dict(gate_up=new(T, 2 * D), act=new(T, D)),
        "swiglu_backward": dict(
            dact=new(T, D), gate_up=new(T, 2 * D), dgate_up=new(T, 2 * D), act=new(T, D)
        ),
    }


OPS = {
    "rms_norm_forward": rms_norm._forward,
    "rms_norm_backward": rms_norm._backward,
    "rope": rope._rope,
    "swiglu_forward": swiglu._forward,
    "swiglu_backward": swiglu._backward,
}
#: What the others are held against.
LEADING = {"x", "gate_up"}
#: What is written, vectors aside.
RESULTS = {"n", "sum", "dx", "act", "dgate_up"}
TENSORS = [
    (op, name)
    for op, arguments in good().items()
    for name, value in arguments.items()
    if isinstance(value, Tensor)
]
every_tensor = pytest.mark.parametrize("op, name", TENSORS, ids=lambda part: part)


def spread(x: Tensor) -> Tensor:
    """The same values, with a gap between the elements of a row."""
    return x.new_empty(*x.shape[:-1], 2 * x.shape[-1])[..., ::2].copy_(x)


WRONG: dict[str, tuple[Callable[[Tensor], Tensor], type[Exception]]] = {
    "integers": (lambda x: x.int(), TypeError),
    "another type": (lambda x: x.double(), TypeError),
    "a column less": (lambda x: x[..., :-1], ValueError),
    "a row more": (lambda x: torch.cat((x, x[:1])), ValueError),
    "a dimension more": (lambda x: x[None], ValueError),
    "elements apart": (spread, ValueError),
    "another device": (lambda x: x.to("meta"), ValueError),
}


@pytest.mark.parametrize("wrong, error", WRONG.values(), ids=WRONG.keys())
@every_tensor
def test_a_wrong_tensor_is_named(op, name, wrong, error):
    arguments = good()[op]
    OPS[op](*arguments.values())
    arguments[name] = wrong(arguments[name])
    # Where it is the leading tensor, the first that disagrees with it may be the one that is named.
    with pytest.raises(error, match=None if name in LEADING else rf"\b{name}\b"):
        OPS[op](*arguments.values())


@pytest.mark.parametrize("op, name", [place for place in TENSORS if place[1] in RESULTS])
def test_a_result_that_overlaps_itself_is_named(op, name):
    """Rows that are only read may all be one row."""
    arguments = good()[op]
    arguments[name] = arguments[name][:1].expand(arguments[name].shape)
    with pytest.raises(ValueError, match=rf"\b{name}\b.*overlapping"):
        OPS[op](*arguments.values())


@pytest.mark.parametrize("missing", ["residual", "sum"])
def test_residual_and_sum_come_together(missing):
    arguments = good()["rms_norm_forward"] | {missing: None}
    with pytest.raises(ValueError, match="residual and sum"):
        OPS["rms_norm_forward"](*arguments.values())


@pytest.mark.parametrize("op, name", [("rope", "x"), ("swiglu_forward", "gate_up")])
def test_odd_widths_are_named(op, name):
    arguments = good()[op]
    arguments[name] = torch.ones(*arguments[name].shape[:-1], 7, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=rf"\b{name}\b.*\b7\b.*even"):
        OPS[op](*arguments.values())
