"""A linear's weight gradient, dw += dyᵀ·x, with fp32 dw under operands of 16 bits.

Products are added up in fp32, and nothing is rounded to 16 bits on the way. T tokens, O outputs,
I inputs.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from megallama.kernels import check, native
from megallama.kernels.op import define

NARROW = (torch.bfloat16, torch.float16)
#: Words of scratch in which a thread packs x, and as many for dy: 1.25 MiB hold x at widths up to
#: 1,248 with AVX-512, and less would do (8,208 words are a panel). Allocated anew for each call,
#: which takes 0.07 ms at most: what a thread keeps it keeps for the life of the process.
SCRATCH = 5 << 16


def linear_wgrad_(dy_TO: Tensor, x_TI: Tensor, dw_OI: Tensor) -> None:
    """Add (O, T) · (T, I) into `dw_OI`: fp32 under bf16 and fp16, else of the operands' dtype.

    On a CPU fp32 sums have the same bits whatever the number of threads, and whether rows of dw
    are taken together or in several calls. With AVX-512 subnormal bf16 numbers count as zero.
    """
    if dw_OI.dtype == dy_TO.dtype:
        dw_OI.addmm_(dy_TO.T, x_TI)
    else:
        _linear_wgrad(dy_TO, x_TI, dw_OI)


def _reference(dy_TO: Tensor, x_TI: Tensor, dw_OI: Tensor) -> None:
    if dw_OI.is_cuda:
        # cuBLAS adds products of 16-bit numbers into an fp32 matrix: out_dtype, torch 2.11 to 2.13.
        torch.addmm(dw_OI, dy_TO.T, x_TI, out_dtype=dw_OI.dtype, out=dw_OI)
    else:
        dw_OI.addmm_(dy_TO.T.float(), x_TI.float())


def _check(dy_TO: Tensor, x_TI: Tensor, dw_OI: Tensor) -> None:
    tokens, outputs = check.matrix("dy", dy_TO)
    if dy_TO.dtype not in NARROW:
        raise TypeError(f"dy is of {dy_TO.dtype}; torch.bfloat16 or torch.float16 is needed")
    _, inputs = check.matrix("x", x_TI)
    check.operand("x", x_TI, (tokens, inputs), dy_TO)
    check.result("dw", dw_OI, (outputs, inputs), dy_TO, torch.float32)


def _run(variant: ModuleType, dy_TO: Tensor, x_TI: Tensor, dw_OI: Tensor) -> None:
    launch = native.launch(dy_TO, *x_TI.shape)
    scratch = torch.empty(2 * torch.get_num_threads(), SCRATCH, dtype=torch.int32)
    operands = map(native.rows, (dy_TO, x_TI, dw_OI, scratch))
    variant.linear_wgrad(launch, dy_TO.shape[1], *operands)


_linear_wgrad = define(
    "linear_wgrad(Tensor dy, Tensor x, Tensor(a!) dw) -> ()", _check, _run, _reference
)
