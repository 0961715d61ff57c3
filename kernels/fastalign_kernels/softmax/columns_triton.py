"""softmax/columns.py in Triton. Sums: one program a stretch of columns, all rows of the block in tiles. Gradient: one
program a row.

Bound by memory: a block of 256 tokens at V = 151936 in fp32 is 156 MB, 0.05 ms at an H100's 3.35 TB/s
(predicted). No atomics: what programs add to a row lies apart, and is summed afterwards.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_options import as_scalar
from .rows_triton import transformed

NUM_WARPS = 4
COLUMNS, ROWS = (
    256,
    4,
)  # a tile: 8 logits a thread (16 spill on sm_120), and 594 programs at V = 151936 for an H100's 132 multiprocessors


GRAD_COLUMNS = 1024  # of a row at a time


@triton.jit
def column_sums_kernel(
    logits,  # [B, T, V], unit stride over V
    ids,  # [B*T] int64, negative: ignored
    bias,  # [V]; read if HAS_BIAS
    stats,  # [7, B*T] of row_stats_kernel
    largest,  # [V]
    sums,  # [V]
    parts,  # [programs, 2, B*T]: each program's share of the rows' totals
    N,
    T,
    V,
    batch_stride,
    time_stride,
    logit_scale: tl.float64,
    softcap: tl.float64,
    temperature: tl.float64,
    PLAIN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    columns = program * BLOCK + tl.arange(0, BLOCK)
    inside = columns < V
    dtype = stats.dtype.element_ty
    logit_scale = as_scalar(logit_scale, dtype)
    softcap = as_scalar(softcap, dtype)
    temperature = as_scalar(temperature, dtype)
    b = tl.zeros([BLOCK], dtype)
    if HAS_BIAS:
        b = tl.load(bias + columns, mask=inside, other=0.0).to(dtype)
    top = tl.zeros([BLOCK], dtype)
    sum = tl.zeros([BLOCK], dtype)
    for begin in range(0, N, ROWS):
        n = begin + tl.arange(0, ROWS).to(tl.int64)
        kept = tl.load(ids + n, mask=n < N, other=-1) >= 0
        row_top = tl.load(stats + 4 * N + n, mask=kept, other=0.0)
        logsum = tl.load(stats + 5 * N + n, mask=kept, other=0.0)
        here = kept[:, None] & inside[None, :]
        x = tl.load(
            logits + (n // T * batch_stride + n % T * time_stride)[:, None] + columns[None, :],
            mask=here,
            other=0.0,
        ).to(dtype)
        z, dz_dx = transformed(x, b[None, :], logit_scale, softcap, temperature, PLAIN, HAS_SOFTCAP)
        logp = z - row_top[:, None] - logsum[:, None]
        p = tl.where(here, tl.exp(logp), 0.0)
        share = p * dz_dx
        weighted = share * tl.where(logp < -1e30, -1e30, logp)
        top = tl.maximum(top, tl.max(p, 0))
        sum += tl.sum(share, 0)
        row_part = parts + program * 2 * N + n
        tl.store(row_part, tl.sum(share, 1), mask=n < N)
        tl.store(row_part + N, tl.sum(tl.where(here, weighted, 0.0), 1), mask=n < N)
    tl.store(largest + columns, top, mask=inside)
    tl.store(sums + columns, sum, mask=inside)


@triton.jit
def column_grad_kernel(
    logits,  # [B, T, V], or [B, T, K] if GATHERED
    columns,  # [K] int64
    ids,  # [B*T] int64, negative: ignored
    bias,  # [V]; read if HAS_BIAS
    stats,  # [7, B*T] of row_stats_kernel
    coefficients,  # [4, B*T]
    out,  # [B, T, K]
    totals,  # [2, B*T] fp64
    N,
    T,
    K,
    batch_stride,
    time_stride,
    out_batch_stride,
    out_time_stride,
    logit_scale: tl.float64,
    softcap: tl.float64,
    temperature: tl.float64,
    GATHERED: tl.constexpr,
    PLAIN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    dtype = stats.dtype.element_ty
    logit_scale = as_scalar(logit_scale, dtype)
    softcap = as_scalar(softcap, dtype)
    temperature = as_scalar(temperature, dtype)
    id = tl.load(ids + n)
    kept = id >= 0
    top = tl.load(stats + 4 * N + n)
    logsum = tl.load(stats + 5 * N + n)
    onehot = tl.load(coefficients + n)
    prob = tl.load(coefficients + N + n)
    plogp = tl.load(coefficients + 2 * N + n)
    row = logits + n // T * batch_stride + n % T * time_stride
    out_row = out + n // T * out_batch_stride + n % T * out_time_stride
    mass = tl.zeros([BLOCK], dtype)
    weighted = tl.zeros([BLOCK], dtype)
    for begin in range(0, K, BLOCK):
        k = begin + tl.arange(0, BLOCK)
        inside = k < K
        column = tl.load(columns + k, mask=inside, other=0)
        x = tl.load(row + (k if GATHERED else column), mask=inside & kept, other=0.0).to(dtype)
        b = tl.zeros([BLOCK], dtype)
        if HAS_BIAS:
            b = tl.load(bias + column, mask=inside, other=0.0).to(dtype)
        z, dz_dx = transformed(x, b, logit_scale, softcap, temperature, PLAIN, HAS_SOFTCAP)
        logp = z - top - logsum
        logp = tl.where(logp < -1e30, -1e30, logp)
        share = tl.where(inside & kept, tl.exp(logp) * dz_dx, 0.0)
        mass += share
        weighted += share * logp
        dx = share * (prob + plogp * logp) + tl.where(column == id, onehot * dz_dx, 0.0)
        tl.store(out_row + k, tl.where(kept, dx, 0.0), mask=inside)
    tl.store(totals + n, tl.sum(mass, 0).to(tl.float64))
    tl.store(totals + N + n, tl.sum(weighted, 0).to(tl.float64))


def column_grad(
    logits: Tensor,
    columns: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    temperature: float,
    stats: Tensor,
    coefficients: Tensor,
    vocab_size: int,
    out: Tensor,
    totals: Tensor,
) -> None:
    """Fill out [B, T, K] and totals [2, B*T]; see columns.column_grad."""
    B, T, _ = logits.shape
    K = columns.numel()
    with torch.cuda.device_of(logits):
        column_grad_kernel[(B * T,)](
            logits, columns, ids, bias, stats, coefficients, out, totals, B * T, T, K, logits.stride(0), logits.stride(1), out.stride(0),
            out.stride(1), logit_scale, softcap, temperature, GATHERED=logits.shape[2] == K,
            PLAIN=bias is None and logit_scale == 1 and softcap == 0 and temperature == 1, HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap != 0, BLOCK=GRAD_COLUMNS, num_warps=NUM_WARPS,
        )  # fmt: skip


def column_sums(
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
    """Fill largest [V], sums [V] and totals [2, B*T]; see columns.column_sums."""
    B, T, V = logits.shape
    programs = triton.cdiv(V, COLUMNS)
    parts = torch.empty(programs, *totals.shape, dtype=stats.dtype, device=logits.device)
    with torch.cuda.device_of(logits):
        column_sums_kernel[(programs,)](
            logits, ids, bias, stats, largest, sums, parts, B * T, T, V, logits.stride(0), logits.stride(1), logit_scale, softcap,
            temperature, PLAIN=bias is None and logit_scale == 1 and softcap == 0 and temperature == 1, HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap != 0, BLOCK=COLUMNS, ROWS=ROWS, num_warps=NUM_WARPS,
        )  # fmt: skip
    torch.sum(parts, 0, dtype=totals.dtype, out=totals)
