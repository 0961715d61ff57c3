"""Statistics of rows that come as slices of the vocabulary (linear/gpu/vocab_slices.py).

A slice is merged into running sums. One program a row of the slice. Bytes a logit: 4.
"""

from __future__ import annotations

from enum import IntEnum

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_launch import launch
from .row_passes_triton import read_row, store_stats, transform_scalars, transformed_logit
from .rows_triton import launch_options
from .tile_rows_triton import LAUNCH, Rows, Softmaxes, flags, row_token


class Running(IntEnum):
    """Rows of the running sums [5, N], fp64, over the columns so far."""

    MAX = 0  # max z
    SUM_EXP = 1  # sum e^(z - MAX)
    WEIGHTED = 2  # sum (z - MAX) e^(z - MAX)
    TOTAL = 3  # sum z
    Z_ID = 4  # z of the id


# As constants of Triton.
MAX, SUM_EXP, WEIGHTED, TOTAL, Z_ID = (tl.constexpr(int(row)) for row in Running)


@triton.jit
def slice_stats_kernel(
    # pointers
    logits,  # [C, V_slice], unit stride over V_slice
    tokens,  # [C] int64, the row's token; read if HAS_TOKENS, else it is first_token + row
    ids,  # [N] int64, negative: ignored
    bias,  # [V_slice]; read if HAS_BIAS
    running,  # [5, N] fp64, order of Running
    stats,  # [7, N], order of rows.Stat; of the columns up to this slice's end
    # sizes
    first_token,
    first_column,  # id of the slice's first column
    N,
    V_slice,
    V,
    # strides
    row_stride,
    # options
    logit_scale: tl.float64,
    softcap: tl.float64,
    temperature: tl.float64,
    # constants
    LEAN: tl.constexpr,
    HAS_TOKENS: tl.constexpr,
    PLAIN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token, target = row_token(tokens, ids, row, first_token, HAS_TOKENS)
    dtype: tl.constexpr = stats.dtype.element_ty
    transform = transform_scalars(logit_scale, softcap, temperature, dtype)
    if target >= 0:
        row_logits = logits + row * row_stride
        row_max, sum_exp, weighted, total = read_row(
            row_logits, bias, V_slice, transform,
            dtype, PLAIN, HAS_BIAS, HAS_SOFTCAP, not LEAN, not LEAN, False, BLOCK_SIZE,
        )  # fmt: skip
        col = target - first_column
        z_id = tl.load(running + Z_ID * N + token).to(dtype)
        z_id = tl.where(target < V, z_id, float("nan"))  # as in the other engines
        if (col >= 0) & (col < V_slice):
            z_id = transformed_logit(
                row_logits, bias, col, V_slice, transform, dtype, PLAIN, HAS_BIAS, HAS_SOFTCAP
            )
        old_max = tl.load(running + MAX * N + token)
        old_sum = tl.load(running + SUM_EXP * N + token)
        old_weighted = tl.load(running + WEIGHTED * N + token)
        new_max = tl.maximum(old_max, row_max.to(tl.float64), propagate_nan=tl.PropagateNan.ALL)
        old_shift = old_max - new_max
        shift = row_max.to(tl.float64) - new_max
        old_factor = tl.exp(old_shift)
        factor = tl.exp(shift)
        weighted = factor * (weighted + shift * sum_exp) + old_factor * (old_weighted + old_shift * old_sum)
        sum_exp = factor * sum_exp + old_factor * old_sum
        total = tl.load(running + TOTAL * N + token) + total
        tl.store(running + MAX * N + token, new_max)
        tl.store(running + SUM_EXP * N + token, sum_exp)
        tl.store(running + WEIGHTED * N + token, weighted)
        tl.store(running + TOTAL * N + token, total)
        tl.store(running + Z_ID * N + token, z_id.to(tl.float64))
        row_max = new_max.to(dtype)
        store_stats(
            stats, N, token, V, z_id, row_max, sum_exp, weighted, total.to(dtype), dtype, not LEAN, not LEAN
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
    launch(
        slice_stats_kernel,
        C,
        (tile, rows.indices, ids, bias, running, table),
        (rows.first, first_column, ids.shape[0], width, vocab_size, tile.stride(0), *transform),
        HAS_TOKENS=rows.indices is not None,
        **flags(softmaxes),
        **launch_options(LAUNCH["slice_lean" if lean else "slice_full"], tile),
    )


def new_running(ids: Tensor) -> Tensor:
    """The running sums [5, N] before the first slice."""
    running = torch.zeros(len(Running), ids.shape[0], dtype=torch.float64, device=ids.device)
    running[Running.MAX] = -1e30
    return running
