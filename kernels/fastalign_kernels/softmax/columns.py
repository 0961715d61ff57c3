"""One block of logits by its columns: which matter to the block's gradient, and what the rest add up to.

With P = softmax(z) and the transform of softmax/rows.py, over the rows n and the columns v of a block [N, V]:

    largest[v] = max_n P[n, v]        sums[v] = sum_n P[n, v] dz/dx
    totals[0, n] = sum_v P dz/dx      totals[1, n] = sum_v P log P dz/dx

dz/dx is logit_scale / temperature, and smaller where the softcap bends. Ignored rows (negative ids) are not
read, and their totals are zero. Bytes: N*V*e read.

A second function gives the gradient of softmax/rows.py at K of the columns, and the totals over these
columns. Bytes: N*K*e read and written, and more if the K lie scattered among the V, because whole lines of
memory are read. The implementations are those of softmax/rows.py, with the same arguments.
"""

from __future__ import annotations

from enum import IntEnum
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import Kernels
from ..namespace import ops
from .rows import RowInputs, Stat, Transform, accumulator_dtype, slope_ref, transform_ref


class Total(IntEnum):
    """Rows of the totals [2, N]."""

    MASS = 0  # sum P dz/dx
    WEIGHTED = 1  # sum P log P dz/dx


class ColumnSums(NamedTuple):
    largest: Tensor  # [V]
    sums: Tensor  # [V]
    totals: Tensor  # [2, N], fp64: differences of them are taken


class ColumnGrad(NamedTuple):
    """What the gradient of K columns reads beside the logits, and what it writes."""

    columns: Tensor  # [K]
    stats: Tensor  # [7, N]
    coefficients: Tensor  # [4, N]
    vocab_size: int
    out: Tensor  # [1, N, K]
    totals: Tensor  # [2, N]


def column_sums(
    logits: Tensor, ids: Tensor, bias: Tensor | None, transform: Transform, stats: Tensor
) -> ColumnSums:
    """The sums of logits [N, V] (unit stride over V); ids [N] int64, bias [V] of the logits' dtype, stats [7,
    N] of `row_stats`."""
    N, V = logits.shape
    dtype = accumulator_dtype(logits.dtype)
    out = ColumnSums(
        torch.empty(V, dtype=dtype, device=logits.device),
        torch.empty(V, dtype=dtype, device=logits.device),
        torch.empty(2, N, dtype=torch.float64, device=logits.device),
    )
    KERNELS.select(logits).column_sums(RowInputs(logits[None], ids, bias, transform), stats, out)
    return out


def column_grad(
    logits: Tensor,
    columns: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    transform: Transform,
    stats: Tensor,
    coefficients: Tensor,
    *,
    vocab_size: int,
    out: Tensor,
) -> Tensor:
    """Write dlogits without `uniform` of the columns [K] (ascending) into out [N, K].

    Returns the totals [2, N] over these columns, fp64.

    logits: [N, V], or [N, K] of these columns, of out's dtype on a CPU. ids, bias [V], stats and coefficients
    [4, N] as in `row_grad`.
    """
    totals = torch.empty(2, logits.shape[0], dtype=torch.float64, device=logits.device)
    inputs = RowInputs(logits[None], ids, bias, transform)
    given = ColumnGrad(columns, stats, coefficients, vocab_size, out[None], totals)
    KERNELS.select(logits).column_grad(inputs, given)
    return totals


def column_sums_ref(
    logits: Tensor, ids: Tensor, bias: Tensor | None, transform: Transform, stats: Tensor
) -> ColumnSums:
    """The specification of `column_sums`."""
    p, share, logp, _ = _shares(logits, ids, bias, transform, stats)
    return ColumnSums(p.amax(0), share.sum(0), _totals(share, logp))


def _shares(
    logits: Tensor, ids: Tensor, bias: Tensor | None, transform: Transform, stats: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """P, P dz/dx, log P and dz/dx, [N, V]; the first three 0 in ignored rows."""
    z = transform_ref(logits, bias, transform)
    slope = slope_ref(logits, bias, transform)
    kept = (ids >= 0)[:, None]
    logp = torch.where(kept, (z - stats[Stat.MAX][:, None] - stats[Stat.LOGSUM][:, None]).clamp(min=-1e30), 0)
    p = torch.where(kept, logp.exp(), 0)
    return p, torch.where(kept, p * slope, 0), logp, slope


def _totals(share: Tensor, logp: Tensor) -> Tensor:
    return torch.stack([share.sum(1, dtype=torch.float64), (share * logp).sum(1, dtype=torch.float64)])


def _column_sums(inputs: RowInputs, stats: Tensor, out: ColumnSums) -> None:
    logits, ids, bias, transform = inputs
    for written, value in zip(out, column_sums_ref(logits[0], ids, bias, transform, stats)):
        written.copy_(value)


def _column_grad(inputs: RowInputs, given: ColumnGrad) -> None:
    """The specification of `column_grad`."""
    logits, ids, bias, transform = inputs
    columns, stats, coefficients, _, out, totals = given
    x = logits[0] if logits.shape[2] == columns.numel() else logits[0].index_select(1, columns)
    _, share, logp, slope = _shares(x, ids, None if bias is None else bias[columns], transform, stats)
    onehot, prob, plogp, _ = coefficients[..., None]
    here = columns == ids[:, None]
    out[0] = (share * (prob + plogp * logp) + torch.where(here, onehot * slope, 0)).to(out.dtype)
    totals.copy_(_totals(share, logp))


def _native_column_sums(inputs: RowInputs, stats: Tensor, out: ColumnSums) -> None:
    logits, ids, bias, transform = inputs
    ops.column_sums(logits, ids, bias, *transform, stats, *out)


def _native_column_grad(inputs: RowInputs, given: ColumnGrad) -> None:
    logits, ids, bias, transform = inputs
    columns, *rest = given
    ops.column_grad(logits, columns, ids, bias, *transform, *rest)


KERNELS = Kernels(
    SimpleNamespace(column_sums=_column_sums, column_grad=_column_grad),
    native=SimpleNamespace(column_sums=_native_column_sums, column_grad=_native_column_grad),
    triton=".softmax.columns_triton",
)
