"""Runs every kernel on memory of exactly its operands' size: `python sanitized.py EXTENSION [+N]`.

For an extension that is built with AddressSanitizer, in an interpreter that has it loaded. Needs no
torch. Kernels are told that rows have N columns more than they have (0).
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from types import ModuleType

SIZES = (4, 2, 2, 8)  # bytes of an element, by its code in csrc/ops.h
ROWS, HEADS, THREADS, EPS = 5, 3, 2, 1e-5

libc = ctypes.CDLL(None)
libc.calloc.restype = ctypes.c_void_p
libc.calloc.argtypes = (ctypes.c_size_t, ctypes.c_size_t)


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_native", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(variant: ModuleType, code: int, columns: int, more: int) -> None:
    """All ops on one type: rows of `columns` elements, called `columns + more`."""
    size, wide_code = SIZES[code], 3 if code == 3 else 0

    def matrix(rows: int, width: int, element: int = size) -> tuple[int, int]:
        return libc.calloc(rows * width, element), width

    def heads(width: int) -> tuple[int, int, int]:
        return libc.calloc(ROWS * HEADS * width, size), HEADS * width, width

    launch = (code, ROWS, columns + more, THREADS)
    x, y, z, out = (matrix(ROWS, columns) for _ in range(4))
    w, double, double_out = matrix(1, columns), matrix(ROWS, 2 * columns), matrix(ROWS, 2 * columns)
    wide = SIZES[wide_code]
    dw, partials = matrix(1, columns, wide), (matrix(2, columns, wide)[0], 2)
    variant.rms_norm_forward(launch, x, (0, 0), w, EPS, out, (0, 0))
    variant.rms_norm_forward(launch, x, y, w, EPS, out, z)
    variant.rms_norm_backward(launch, x, y, w, EPS, (0, 0), out, partials)
    variant.rms_norm_backward(launch, x, y, w, EPS, z, out, partials)
    variant.add_partials((wide_code, 1, columns + more, THREADS), partials, dw)
    variant.swiglu_forward(launch, double, out)
    variant.swiglu_backward(launch, x, double, double_out, out)
    cos, sin = matrix(ROWS, columns, wide), matrix(ROWS, columns, wide)
    turned = heads(2 * columns)
    variant.rope(launch, HEADS, turned, cos, sin, False)


def run_loss_and_update(variant: ModuleType, code: int, columns: int, more: int) -> None:
    """The cross-entropy, with and without padding, then AdamW and the norm on one row."""
    size, wide = SIZES[code], SIZES[3 if code == 3 else 0]

    def row(length: int, element: int) -> tuple[int, int]:
        return libc.calloc(length, element), length

    launch = (code, ROWS, columns + more, THREADS)
    logits = libc.calloc(ROWS * columns, size), columns
    labels, first, second = row(ROWS, 8), row(ROWS, wide), row(ROWS, wide)
    for width in (columns + more, columns // 2):
        scratch = (libc.calloc(2 * width, wide), 2)
        variant.cross_entropy_statistics(launch, logits, labels, 0, width, first, second)
        variant.cross_entropy_gradient(launch, logits, labels, first, 0, width)
        variant.cross_entropy(launch, logits, labels, width, second, scratch)
    flat = (code, 1, columns + more, THREADS)
    weight, divisor = row(columns, size), row(1, wide)
    master, gradient, *moments = (row(columns, wide) for _ in range(4))
    factors = (0.9, 0.1, 0.9, 0.1, 1e-3, 1.0, 1e-8)
    variant.adamw(flat, master, gradient, *moments, weight, divisor, factors)
    variant.adamw(flat, master, gradient, *moments, (0, 0), divisor, factors)
    variant.squared_norm((code, 2, columns + more, THREADS), weight, row(2, 8), row(1, 8))


def run_wgrad(variant: ModuleType, code: int, columns: int, more: int) -> None:
    """The weight gradient, of an odd number of tokens that take two blocks, with little scratch."""
    tokens, outputs, panel = 515, 15, 256 * 32 + 16

    def matrix(rows: int, width: int, element: int) -> tuple[int, int]:
        return libc.calloc(rows * width, element), width

    dy, x = matrix(tokens, outputs, SIZES[code]), matrix(tokens, columns, SIZES[code])
    dw, scratch = matrix(outputs, columns, 4), matrix(2 * THREADS, panel, 4)
    variant.linear_wgrad((code, tokens, columns + more, THREADS), outputs, dy, x, dw, scratch)


def run_attention(variant: ModuleType, code: int, columns: int, more: int) -> None:
    """Two query heads of one key head, of one segment of a token and one of more than a block."""
    size, wide, tokens = SIZES[code], SIZES[3 if code == 3 else 0], 67

    def heads(count: int) -> tuple[int, int, int]:
        return libc.calloc(tokens * count * columns, size), count * columns, columns

    offsets = (ctypes.c_int64 * 3)(0, 1, tokens)
    launch = (code, tokens, columns + more, THREADS)
    attention = (ctypes.addressof(offsets), 2, 2, 1)
    (q, o), (k, v) = (heads(2), heads(2)), (heads(1), heads(1))
    lse = libc.calloc(tokens * 2, wide), 2
    variant.attention_forward(launch, attention, q, k, v, o, lse)
    gradients = heads(2), heads(1), heads(1)
    variant.attention_backward(launch, attention, heads(2), q, k, v, o, lse, *gradients)


def main() -> None:
    module, more = load(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    names = [name for name in ("portable", "avx2", "avx512") if hasattr(module, name)]
    for name in names:
        for code in range(len(SIZES)):
            for columns in (1, 3, 8, 17, 64, 71, 300):
                run(getattr(module, name), code, columns, more)
                run_loss_and_update(getattr(module, name), code, columns, more)
                run_attention(getattr(module, name), code, columns, more)
                if SIZES[code] == 2:
                    run_wgrad(getattr(module, name), code, columns, more)
    print("ran", *names)


if __name__ == "__main__":
    main()
