"""softmax/columns.py in Triton.

For the sums, a program computes a stretch of columns over all rows of the block, in tiles. For the
gradient, a program computes a row.

Memory is the limit: a block of 256 tokens at V = 151936 in fp32 is 156 MB, 0.05 ms at an H100's 3.35 TB/s
(predicted). There are no atomics. Each program writes its part of the rows' totals to a separate place, and
the parts are added afterwards.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_launch import launch
from .columns import ColumnGrad, ColumnSums, Total
from .row_passes_triton import LOGP, LOGSUM, MAX, ONEHOT, PLOGP, PROB, transform_scalars, transformed
from .rows import RowInputs
from .rows_triton import transform_flags

# The rows of the totals by name, as constants of Triton.
TOTALS = tl.constexpr(len(Total))
MASS, WEIGHTED = (tl.constexpr(int(total)) for total in Total)

NUM_WARPS = 4
# A row of a tile lies in one warp, so that its sums need no barrier. Column sums are kept for each element of
# the tile until the last row. 8 logits a thread; V = 151936 makes 1187 programs.
COLUMNS, ROWS = 128, 8
GRAD_COLUMNS = 1024  # of a row at a time


@triton.jit
def column_sums_kernel(
    # pointers
    logits,  # [B, T, V], unit stride over V
    ids,  # [B*T] int64, negative: ignored
    bias,  # [V]; read if HAS_BIAS
    stats,  # [7, B*T] of row_stats_kernel
    largest,  # [V]
    sums,  # [V]
    parts,  # [programs, 2, B*T]: each program's part of the rows' totals
    # sizes
    N,
    T,
    V,
    # strides
    batch_stride,
    time_stride,
    # options
    logit_scale: tl.float64,
    softcap: tl.float64,
    temperature: tl.float64,
    # constants
    PLAIN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    col = program * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    inside = col < V
    dtype = stats.dtype.element_ty
    transform = transform_scalars(logit_scale, softcap, temperature, dtype)
    b = tl.zeros([BLOCK_SIZE], dtype)
    if HAS_BIAS:
        b = tl.load(bias + col, mask=inside, other=0.0).to(dtype)
    col_max = tl.zeros([ROWS, BLOCK_SIZE], dtype)
    col_sum = tl.zeros([ROWS, BLOCK_SIZE], dtype)
    for begin in range(0, N, ROWS):
        row = begin + tl.arange(0, ROWS).to(tl.int64)
        kept = tl.load(ids + row, mask=row < N, other=-1) >= 0
        row_max = tl.load(stats + MAX * N + row, mask=kept, other=0.0)
        logsum = tl.load(stats + LOGSUM * N + row, mask=kept, other=0.0)
        here = kept[:, None] & inside[None, :]
        row_start = row // T * batch_stride + row % T * time_stride
        x = tl.load(logits + row_start[:, None] + col[None, :], mask=here, other=0.0).to(dtype)
        z, dz_dx = transformed(x, b[None, :], transform, PLAIN, HAS_SOFTCAP)
        logp = z - row_max[:, None] - logsum[:, None]
        p = tl.where(here, tl.exp(logp), 0.0)
        share = p * dz_dx
        weighted = share * tl.where(logp < -1e30, -1e30, logp)
        col_max = tl.maximum(col_max, p)
        col_sum += share
        row_part = parts + program * TOTALS * N + row
        tl.store(row_part + MASS * N, tl.sum(share, 1), mask=row < N)
        tl.store(row_part + WEIGHTED * N, tl.sum(tl.where(here, weighted, 0.0), 1), mask=row < N)
    tl.store(largest + col, tl.max(col_max, 0), mask=inside)
    tl.store(sums + col, tl.sum(col_sum, 0), mask=inside)


@triton.jit
def column_grad_kernel(
    # pointers
    logits,  # [B, T, V], or [B, T, K] if GATHERED
    columns,  # [K] int64
    ids,  # [B*T] int64, negative: ignored
    bias,  # [V]; read if HAS_BIAS
    stats,  # [7, B*T] of row_stats_kernel
    coefficients,  # [4, B*T]
    out,  # [B, T, K]
    totals,  # [2, B*T] fp64
    # sizes
    N,
    T,
    K,
    # strides
    batch_stride,
    time_stride,
    out_batch_stride,
    out_time_stride,
    # options
    logit_scale: tl.float64,
    softcap: tl.float64,
    temperature: tl.float64,
    # constants
    GATHERED: tl.constexpr,
    PLAIN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    dtype = stats.dtype.element_ty
    transform = transform_scalars(logit_scale, softcap, temperature, dtype)
    token_id = tl.load(ids + row)
    kept = token_id >= 0
    row_max = tl.load(stats + MAX * N + row)
    logsum = tl.load(stats + LOGSUM * N + row)
    target_logp = tl.load(stats + LOGP * N + row)
    onehot = tl.load(coefficients + ONEHOT * N + row)
    target = tl.where(onehot != 0, token_id, -1)
    prob = tl.load(coefficients + PROB * N + row)
    plogp = tl.load(coefficients + PLOGP * N + row)
    row_logits = logits + row // T * batch_stride + row % T * time_stride
    row_out = out + row // T * out_batch_stride + row % T * out_time_stride
    mass = tl.zeros([BLOCK_SIZE], dtype)
    weighted = tl.zeros([BLOCK_SIZE], dtype)
    for begin in range(0, K, BLOCK_SIZE):
        k = begin + tl.arange(0, BLOCK_SIZE)
        inside = k < K
        col = tl.load(columns + k, mask=inside, other=0)
        x = tl.load(row_logits + (k if GATHERED else col), mask=inside & kept, other=0.0).to(dtype)
        b = tl.zeros([BLOCK_SIZE], dtype)
        if HAS_BIAS:
            b = tl.load(bias + col, mask=inside, other=0.0).to(dtype)
        z, dz_dx = transformed(x, b, transform, PLAIN, HAS_SOFTCAP)
        logp = z - row_max - logsum
        is_target = col == target
        logp = tl.where(is_target, target_logp, logp)  # as in `write_row`
        logp = tl.where(logp < -1e30, -1e30, logp)
        share = tl.where(inside & kept, tl.exp(logp) * dz_dx, 0.0)
        mass += share
        weighted += share * logp
        dx = share * (prob + plogp * logp) + tl.where(is_target, onehot * dz_dx, 0.0)
        tl.store(row_out + k, tl.where(kept, dx, 0.0), mask=inside)
    tl.store(totals + MASS * N + row, tl.sum(mass, 0).to(tl.float64))
    tl.store(totals + WEIGHTED * N + row, tl.sum(weighted, 0).to(tl.float64))


def column_sums(inputs: RowInputs, stats: Tensor, out: ColumnSums) -> None:
    """Write the sums; see columns.column_sums."""
    logits, ids, bias, transform = inputs
    largest, sums, totals = out
    B, T, V = logits.shape
    programs = triton.cdiv(V, COLUMNS)
    parts = torch.empty(programs, *totals.shape, dtype=stats.dtype, device=logits.device)
    launch(
        column_sums_kernel,
        programs,
        (logits, ids, bias, stats, largest, sums, parts),
        (B * T, T, V, *logits.stride()[:2], *transform),
        **transform_flags(bias, transform),
        BLOCK_SIZE=COLUMNS,
        ROWS=ROWS,
        num_warps=NUM_WARPS,
    )
    torch.sum(parts, 0, dtype=totals.dtype, out=totals)


def column_grad(inputs: RowInputs, given: ColumnGrad) -> None:
    """Write out [B, T, K] and totals [2, B*T]; see columns.column_grad."""
    logits, ids, bias, transform = inputs
    columns, stats, coefficients, _, out, totals = given
    B, T, _ = logits.shape
    K = columns.numel()
    launch(
        column_grad_kernel,
        B * T,
        (logits, columns, ids, bias, stats, coefficients, out, totals),
        (B * T, T, K, *logits.stride()[:2], *out.stride()[:2], *transform),
        GATHERED=logits.shape[2] == K,
        **transform_flags(bias, transform),
        BLOCK_SIZE=GRAD_COLUMNS,
        num_warps=NUM_WARPS,
    )
