"""One block of logits by its columns: which of them matter to the block's gradient, and what the others add up to.

With P = softmax(z) and the transform of rows.py, over the rows n and the columns v of a block [N, V]:

    largest[v] = max_n P[n, v]        sums[v] = sum_n P[n, v] dz/dx
    totals[0, n] = sum_v P dz/dx      totals[1, n] = sum_v P log P dz/dx

dz/dx is logit_scale / temperature, less where the softcap bends. Ignored rows (negative ids) are not read; their totals are zero.
Bytes: N*V*e read. Implementations as in rows.py, with the same arguments.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import native
from .rows import Stat, Transform, accumulator_dtype, transform_ref


class ColumnSums(NamedTuple):
    largest: Tensor  # [V]
    sums: Tensor  # [V]
    totals: Tensor  # [2, N], fp64: differences of them are taken


def column_sums(logits: Tensor, ids: Tensor, bias: Tensor | None, transform: Transform, stats: Tensor) -> ColumnSums:
    """The sums of logits [N, V] (unit stride over V); ids [N] int64, bias [V] of the logits' dtype, stats [7, N] of `row_stats`."""
    N, V = logits.shape
    dtype = accumulator_dtype(logits.dtype)
    out = ColumnSums(
        torch.empty(V, dtype=dtype, device=logits.device),
        torch.empty(V, dtype=dtype, device=logits.device),
        torch.empty(2, N, dtype=torch.float64, device=logits.device),
    )
    _implementation(logits).column_sums(logits[None], ids, bias, *transform, stats, *out)
    return out


def _implementation(logits: Tensor) -> Any:
    if not logits.is_cuda:
        return _reference if native.missing else torch.ops.fastalign
    if native.triton_missing:
        return _reference
    from . import columns_triton  # here, because triton is absent on macOS and Windows

    return columns_triton


def column_sums_ref(logits: Tensor, ids: Tensor, bias: Tensor | None, transform: Transform, stats: Tensor) -> ColumnSums:
    """The specification of `column_sums`."""
    z = transform_ref(logits, bias, transform)
    slope = torch.full_like(z, transform.logit_scale / transform.temperature)
    if transform.softcap:
        slope = slope * (1 - (z * transform.temperature / transform.softcap) ** 2)
    logp = z - stats[Stat.MAX][:, None] - stats[Stat.LOGSUM][:, None]
    kept = (ids >= 0)[:, None]
    p = torch.where(kept, logp.exp(), 0)
    share = torch.where(kept, p * slope, 0)
    weighted = torch.where(kept, share * logp.clamp(min=-1e30), 0)
    totals = torch.stack([share.sum(1, dtype=torch.float64), weighted.sum(1, dtype=torch.float64)])
    return ColumnSums(p.amax(0), share.sum(0), totals)


def _column_sums_reference(
    logits: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    temperature: float,
    stats: Tensor,
    largest: Tensor,
    sums: Tensor,
    totals: Tensor,
) -> None:
    result = column_sums_ref(logits[0], ids, bias, Transform(logit_scale, softcap, temperature), stats)
    for out, value in zip((largest, sums, totals), result):
        out.copy_(value)


_reference = SimpleNamespace(column_sums=_column_sums_reference)
