"""Cross-entropy over a shard of the vocabulary, on logits that are there.

c tokens, v columns of the shard: `rows` of the vocabulary from its row `first` on, then padding,
which is not read and has no gradient. A label elsewhere, or IGNORE, is no column of the shard.
Accumulates in fp32, for fp64 in fp64.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from megallama.kernels import check, native
from megallama.kernels.op import define
from megallama.spec.labels import IGNORE


def cross_entropy_statistics(
    logits_cv: Tensor, labels_c: Tensor, first: int, rows: int, out: Tensor | None = None
) -> Tensor:
    """Each token's log Σ exp over the shard, and its target's logit or 0: (2, c), fp32 or wider.

    The sum over nothing but padding is −∞.
    """
    if out is None:
        out = logits_cv.new_empty(2, len(logits_cv), dtype=check.wide(logits_cv.dtype))
    log_sums, targets = out
    _statistics(logits_cv, labels_c, first, rows, log_sums, targets)
    return out


def cross_entropy_gradient_(
    logits_cv: Tensor, labels_c: Tensor, lse_c: Tensor, first: int, rows: int
) -> Tensor:
    """Turn logits in place into the gradient of the losses' sum, softmax − one-hot.

    `lse_c` is log Σ exp over the whole vocabulary. Zero where the label is IGNORE.
    """
    _gradient(logits_cv, labels_c, lse_c, first, rows)
    return logits_cv


def cross_entropy_(logits_cv: Tensor, labels_c: Tensor, rows: int) -> Tensor:
    """Each token's loss (c,) where the shard is the whole vocabulary; logits become gradients.

    What the other two ops compute, with each row read from memory once. Zero, both, where the label
    is IGNORE.
    """
    wide = check.wide(logits_cv.dtype)
    loss_c = logits_cv.new_empty(len(logits_cv), dtype=wide)
    # A row of wide numbers for each CPU thread.
    shares = 0 if logits_cv.is_cuda else min(torch.get_num_threads(), len(logits_cv))
    _fused(logits_cv, labels_c, rows, loss_c, logits_cv.new_empty(shares, rows, dtype=wide))
    return loss_c


def _check_logits(logits_cv: Tensor, labels_c: Tensor, rows: int) -> None:
    check.floating("logits", logits_cv)
    if logits_cv.dim() != 2:
        raise ValueError(f"logits has shape {tuple(logits_cv.shape)}; (c, v) is needed")
    tokens, columns = logits_cv.shape
    check.operand("logits", logits_cv, (tokens, columns), logits_cv)
    check.operand("labels", labels_c, (tokens,), logits_cv, torch.int64)
    if not 0 <= rows <= columns:
        raise ValueError(f"rows is {rows}; 0 to {columns}, the columns of logits, is needed")


def _check_first(first: int) -> None:
    if first < 0:
        raise ValueError(f"first is {first}; a row of the vocabulary is needed")


def _check_vector(name: str, x_c: Tensor, logits_cv: Tensor) -> None:
    check.operand(name, x_c, logits_cv.shape[:1], logits_cv, check.wide(logits_cv.dtype))


def _target(labels_c: Tensor, first: int, rows: int) -> tuple[Tensor, Tensor]:
    """The tokens whose labels are the shard's, and their columns."""
    column_c = labels_c - first
    tokens = ((column_c >= 0) & (column_c < rows)).nonzero()[:, 0]
    return tokens, column_c[tokens]


def _statistics_reference(
    logits_cv: Tensor,
    labels_c: Tensor,
    first: int,
    rows: int,
    log_sums_c: Tensor,
    targets_c: Tensor,
) -> None:
    x_cv = logits_cv[:, :rows].to(log_sums_c.dtype)
    tokens, columns = _target(labels_c, first, rows)
    log_sums_c.copy_(x_cv.logsumexp(1))
    targets_c.zero_()[tokens] = x_cv[tokens, columns]


def _statistics_check(
    logits_cv: Tensor,
    labels_c: Tensor,
    first: int,
    rows: int,
    log_sums_c: Tensor,
    targets_c: Tensor,
) -> None:
    _check_logits(logits_cv, labels_c, rows)
    _check_first(first)
    _check_vector("log_sums", log_sums_c, logits_cv)
    _check_vector("targets", targets_c, logits_cv)


def _statistics_run(
    variant: ModuleType,
    logits_cv: Tensor,
    labels_c: Tensor,
    first: int,
    rows: int,
    *out: Tensor,
) -> None:
    launch = native.launch(logits_cv, *logits_cv.shape)
    operands = (native.rows(logits_cv), native.rows(labels_c), first, rows)
    variant.cross_entropy_statistics(launch, *operands, *map(native.rows, out))


def _gradient_reference(
    logits_cv: Tensor, labels_c: Tensor, lse_c: Tensor, first: int, rows: int
) -> None:
    p_cv = (logits_cv[:, :rows].to(lse_c.dtype) - lse_c[:, None]).exp_()
    p_cv[_target(labels_c, first, rows)] -= 1
    p_cv[labels_c == IGNORE] = 0
    logits_cv.zero_()[:, :rows] = p_cv


def _gradient_check(
    logits_cv: Tensor, labels_c: Tensor, lse_c: Tensor, first: int, rows: int
) -> None:
    _check_logits(logits_cv, labels_c, rows)
    check.result("logits", logits_cv, logits_cv.shape, logits_cv)
    _check_first(first)
    _check_vector("lse", lse_c, logits_cv)


def _gradient_run(
    variant: ModuleType, logits_cv: Tensor, labels_c: Tensor, lse_c: Tensor, first: int, rows: int
) -> None:
    launch = native.launch(logits_cv, *logits_cv.shape)
    operands = map(native.rows, (logits_cv, labels_c, lse_c))
    variant.cross_entropy_gradient(launch, *operands, first, rows)


def _fused_reference(
    logits_cv: Tensor, labels_c: Tensor, rows: int, loss_c: Tensor, scratch_nv: Tensor
) -> None:
    lse_c, targets_c = torch.empty_like(loss_c), torch.empty_like(loss_c)
    _statistics_reference(logits_cv, labels_c, 0, rows, lse_c, targets_c)
    loss_c.copy_((lse_c - targets_c).where(labels_c != IGNORE, 0.0))
    _gradient_reference(logits_cv, labels_c, lse_c, 0, rows)


def _fused_check(
    logits_cv: Tensor, labels_c: Tensor, rows: int, loss_c: Tensor, scratch_nv: Tensor
) -> None:
    _check_logits(logits_cv, labels_c, rows)
    check.result("logits", logits_cv, logits_cv.shape, logits_cv)
    _check_vector("loss", loss_c, logits_cv)
    check.contiguous("scratch", scratch_nv)
    check.operand("scratch", scratch_nv, (len(scratch_nv), rows), logits_cv, loss_c.dtype)
    if len(logits_cv) and not len(scratch_nv) and not logits_cv.is_cuda:
        raise ValueError("scratch has no rows; one for each thread is needed")


def _fused_run(
    variant: ModuleType,
    logits_cv: Tensor,
    labels_c: Tensor,
    rows: int,
    loss_c: Tensor,
    scratch_nv: Tensor,
) -> None:
    launch = native.launch(logits_cv, *logits_cv.shape)
    operands = (native.rows(logits_cv), native.rows(labels_c), rows, native.rows(loss_c))
    variant.cross_entropy(launch, *operands, (scratch_nv.data_ptr(), len(scratch_nv)))


_statistics = define(
    "cross_entropy_statistics(Tensor logits, Tensor labels, int first, int rows, "
    "Tensor(a!) log_sums, Tensor(b!) targets) -> ()",
    _statistics_check,
    _statistics_run,
    _statistics_reference,
)
_gradient = define(
    "cross_entropy_gradient(Tensor(a!) logits, Tensor labels, Tensor lse, int first, int rows)"
    " -> ()",
    _gradient_check,
    _gradient_run,
    _gradient_reference,
)
_fused = define(
    "cross_entropy(Tensor(a!) logits, Tensor labels, int rows, Tensor(b!) loss, "
    "Tensor(c!) scratch) -> ()",
    _fused_check,
    _fused_run,
    _fused_reference,
)
