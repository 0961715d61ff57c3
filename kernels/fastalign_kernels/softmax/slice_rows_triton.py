"""Statistics of rows that come as slices of the vocabulary (linear/vocab_slices.py).

A slice is merged into running sums. One program a row of the slice. Bytes a logit: 4.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_options import as_scalar
from .rows_triton import read_row, store_stats, transformed_logit
from .tile_rows_triton import Rows, Softmaxes, flags, launch


@triton.jit
def slice_stats_kernel(
    logits,  # [C, V_slice], unit stride
    tokens,  # [C] int64, the row's token; read if HAS_TOKENS, else it is first_token + row
    ids,  # [N] int64, negative: ignored
    bias,  # [V_slice]; read if HAS_BIAS
    running,  # [5, N] fp64: max, sum e^(z - max), sum (z - max) e^(z - max), sum z, z of the id
    stats,  # [7, N], of the columns up to this slice's end
    first_token,
    first_column,
    N,
    V_slice,
    V,
    row_stride,
    logit_scale: tl.float64,
    softcap: tl.float64,
    temperature: tl.float64,
    LEAN: tl.constexpr,
    HAS_TOKENS: tl.constexpr,
    PLAIN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    token = first_token + n
    if HAS_TOKENS:
        token = tl.load(tokens + n)
    target = tl.load(ids + token)
    dtype: tl.constexpr = stats.dtype.element_ty
    logit_scale = as_scalar(logit_scale, dtype)
    softcap = as_scalar(softcap, dtype)
    temperature = as_scalar(temperature, dtype)
    if target >= 0:
        row = logits + n * row_stride
        row_max, sum_exp, weighted, total = read_row(
            row, bias, V_slice, logit_scale, softcap, temperature,
            dtype, PLAIN, HAS_BIAS, HAS_SOFTCAP, LEAN, False, BLOCK,
        )  # fmt: skip
        col = target - first_column
        z_id = tl.load(running + 4 * N + token).to(dtype)
        if (col >= 0) & (col < V_slice):
            z_id = transformed_logit(
                row, bias, col, V_slice, logit_scale, softcap, temperature,
                dtype, PLAIN, HAS_BIAS, HAS_SOFTCAP,
            )  # fmt: skip
        old_max = tl.load(running + token)
        old_sum = tl.load(running + N + token)
        old_weighted = tl.load(running + 2 * N + token)
        new_max = tl.maximum(old_max, row_max.to(tl.float64), propagate_nan=tl.PropagateNan.ALL)
        old_shift = old_max - new_max
        shift = row_max.to(tl.float64) - new_max
        old_factor = tl.exp(old_shift)
        factor = tl.exp(shift)
        weighted = factor * (weighted + shift * sum_exp) + old_factor * (old_weighted + old_shift * old_sum)
        sum_exp = factor * sum_exp + old_factor * old_sum
        total_all = tl.load(running + 3 * N + token) + total
        tl.store(running + token, new_max)
        tl.store(running + N + token, sum_exp)
        tl.store(running + 2 * N + token, weighted)
        tl.store(running + 3 * N + token, total_all)
        tl.store(running + 4 * N + token, z_id.to(tl.float64))
        store_stats(
            stats, N, token, V, z_id, new_max.to(dtype), sum_exp, weighted, total_all.to(dtype), dtype, LEAN
        )


def slice_stats(
    tile: Tensor, rows: Rows, softmaxes: Softmaxes, running: Tensor, first_column: int, vocab_size: int
) -> None:
    """Merge the statistics of the columns from first_column on, tile [C, V_slice], into running [5, N].

    The table has those of the columns so far, and is right once all slices are merged.
    """
    C, width = tile.shape
    if C == 0:
        return
    ids, bias, transform, table, lean = softmaxes
    bias = None if bias is None else bias[first_column : first_column + width]
    with torch.cuda.device_of(tile):
        slice_stats_kernel[(C,)](
            tile, rows.indices, ids, bias, running, table,
            rows.first, first_column, ids.shape[0], width, vocab_size, tile.stride(0), *transform,
            HAS_TOKENS=rows.indices is not None, **flags(softmaxes),
            **launch("slice_lean" if lean else "slice_full", tile, width),
        )  # fmt: skip


def new_running(ids: Tensor) -> Tensor:
    """The running sums [5, N] before the first slice."""
    running = torch.zeros(5, ids.shape[0], dtype=torch.float64, device=ids.device)
    running[0] = -1e30
    return running
