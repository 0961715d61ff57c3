"""The row kernels of softmax/rows.py in Triton: V in blocks, 64-bit row offsets.

    row_stats    one program a row: the statistics that are asked for
    row_grad     one program a row: the gradient from the statistics and coefficients
    row_loss     both in one launch, for a cross-entropy whose upstream gradient is a scalar

row_loss is persistent: a few programs a multiprocessor go from row to row, so that few rows are in flight and
the second read of a row comes from the L2 cache. Bytes a logit of e bytes: statistics e, gradient 2 e,
row_loss e from memory, e from L2, and e written. Memory is the limit as long as a logit costs about twelve
instructions or fewer: row_passes_triton.py says how.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import architecture, multiprocessors
from ..triton_launch import launch
from ..triton_options import as_scalar
from .row_passes_triton import (
    LOGP,
    LOGSUM,
    MAX,
    ONEHOT,
    PLOGP,
    PROB,
    UNIFORM,
    read_row,
    store_stats,
    transform_scalars,
    transformed_logit,
    write_row,
    zero_row,
    zero_stats,
)
from .rows import ALL_STATS, NeedsStats, RowInputs, TokenLoss, Transform


class Launch(NamedTuple):
    """How a row kernel runs."""

    block_size: int  # logits; at least 16 bytes a thread
    num_warps: int
    programs: int = 0  # of a multiprocessor, which then go from row to row; 0: one program a row


LaunchTable = Mapping[int, Launch]  # by compute capability

# By kernel and bits of a logit. The times are an H200's: for bf16 [8192, 128256], where a copy takes 1.02 ms
# and amax 0.69, and for fp32 [4096, 32768], where they take 0.28 and 0.19. We assume that the other
# architectures are alike. `python -m bench.gpu.tune` times a grid on a GPU and prints the lines to paste.
LAUNCH: dict[str, LaunchTable] = {
    "row_stats_16": {80: Launch(8192, 16)},  # 0.56 ms
    "row_stats_32": {80: Launch(4096, 16)},  # 0.19
    "row_grad_16": {80: Launch(4096, 16)},  # 1.17
    "row_grad_32": {80: Launch(4096, 16)},  # 0.33
    "row_loss_16": {80: Launch(8192, 32, 2)},  # 1.45; one program a multiprocessor 1.69
    "row_loss_32": {80: Launch(8192, 32, 2), 120: Launch(4096, 16, 2)},  # 0.37; one program 0.48
}
SHORTEST = 256  # of a block, in logits


def tabled_launch(table: LaunchTable, sm: int, columns: int) -> Launch:
    """The launch for rows of `columns` logits.

    The table's for the newest architecture up to `sm`, or fewer warps, and more programs, if a row is shorter
    than a block.
    """
    found = table[max((known for known in table if known <= sm), default=min(table))]
    short = max(SHORTEST, triton.next_power_of_2(columns))
    if short >= found.block_size:
        return found
    shrink = found.block_size // short
    return Launch(short, max(1, found.num_warps // shrink), found.programs * shrink)


def launch_for(table: LaunchTable, logits: Tensor) -> Launch:
    """The launch for the rows of logits [..., V]; `table` is a value of LAUNCH."""
    device = logits.device
    sm = architecture(device.index) if device.type == "cuda" else 0  # the interpreter has none
    return tabled_launch(table, sm, logits.shape[-1])


def launch_options(table: LaunchTable, logits: Tensor) -> dict[str, int]:
    """BLOCK_SIZE and num_warps of `launch_for`."""
    found = launch_for(table, logits)
    return {"BLOCK_SIZE": found.block_size, "num_warps": found.num_warps}


def grid_size(programs: int, rows: int, device: torch.device) -> int:
    """Programs of a launch over that many rows; `programs` as in Launch."""
    return min(rows, programs * multiprocessors(device)) if programs else rows


@triton.jit
def row_stats_kernel(
    # pointers
    logits,  # [B, T, V], unit stride over V
    ids,  # [B*T] int64, negative: ignored
    bias,  # [V]; read if HAS_BIAS
    stats,  # [7, B*T], order of rows.Stat
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
    HAS_MEAN: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    PLAIN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(ids + row)
    dtype: tl.constexpr = stats.dtype.element_ty
    transform = transform_scalars(logit_scale, softcap, temperature, dtype)
    if target >= 0:
        row_logits = logits + row // T * batch_stride + row % T * time_stride
        z_id = transformed_logit(
            row_logits, bias, target, V, transform,
            dtype, PLAIN, HAS_BIAS, HAS_SOFTCAP,
        )  # fmt: skip
        row_max, sum_exp, weighted, total = read_row(
            row_logits, bias, V, transform,
            dtype, PLAIN, HAS_BIAS, HAS_SOFTCAP, HAS_MEAN, HAS_ENTROPY, False, BLOCK_SIZE,
        )  # fmt: skip
        store_stats(stats, N, row, V, z_id, row_max, sum_exp, weighted, total, dtype, HAS_MEAN, HAS_ENTROPY)
    else:
        zero_stats(stats, N, row)


@triton.jit
def row_grad_kernel(
    # pointers
    logits,  # [B, T, V], unit stride over V
    ids,  # [B*T] int64, negative: ignored
    bias,  # [V]; read if HAS_BIAS
    stats,  # [7, B*T] of row_stats_kernel
    coefficients,  # [4, B*T], order of rows.Coefficient
    out,  # [B, T, V]; the logits themselves, or memory that does not overlap them
    # sizes
    N,
    T,
    V,
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
    HAS_PLOGP: tl.constexpr,
    PLAIN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(ids + row)
    dtype: tl.constexpr = stats.dtype.element_ty
    transform = transform_scalars(logit_scale, softcap, temperature, dtype)
    row_logits = logits + row // T * batch_stride + row % T * time_stride
    out_row = out + row // T * out_batch_stride + row % T * out_time_stride
    if target >= 0:
        write_row(
            row_logits, out_row, bias, V, target, tl.load(stats + LOGP * N + row),
            tl.load(stats + MAX * N + row), tl.load(stats + LOGSUM * N + row),
            tl.load(coefficients + ONEHOT * N + row), tl.load(coefficients + PROB * N + row),
            tl.load(coefficients + PLOGP * N + row), tl.load(coefficients + UNIFORM * N + row),
            transform,
            dtype, PLAIN, HAS_BIAS, HAS_SOFTCAP, HAS_PLOGP, not PLAIN, True, BLOCK_SIZE,
        )  # fmt: skip
    else:
        zero_row(out_row, V, dtype, BLOCK_SIZE)


@triton.jit
def row_loss_kernel(
    # pointers
    logits,  # [B, T, V], unit stride over V
    ids,  # [B*T] int64, negative: ignored
    scale,  # [B*T]: what each token's loss is multiplied by
    stats,  # [7, B*T], order of rows.Stat
    out,  # [B, T, V]; the logits themselves, or memory that does not overlap them
    # sizes
    N,
    T,
    V,
    # strides
    batch_stride,
    time_stride,
    out_batch_stride,
    out_time_stride,
    # options
    softcap: tl.float64,
    temperature: tl.float64,
    label_smoothing: tl.float64,
    z_loss: tl.float64,
    # constants
    HAS_MEAN: tl.constexpr,
    PLAIN: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    dtype: tl.constexpr = stats.dtype.element_ty
    transform = transform_scalars(1.0, softcap, temperature, dtype)
    e = as_scalar(label_smoothing, dtype)
    z_loss = as_scalar(z_loss, dtype)
    for program_row in range(tl.program_id(0), N, tl.num_programs(0)):
        row = tl.full((), 0, tl.int64) + program_row
        target = tl.load(ids + row)
        row_logits = logits + row // T * batch_stride + row % T * time_stride
        out_row = out + row // T * out_batch_stride + row % T * out_time_stride
        if target >= 0:
            # before read_row's barriers: in place another thread may overwrite it after them
            z_id = transformed_logit(
                row_logits, row_logits, target, V, transform,
                dtype, PLAIN, False, HAS_SOFTCAP,
            )  # fmt: skip
            row_max, sum_exp, weighted, total = read_row(
                row_logits, row_logits, V, transform,
                dtype, PLAIN, False, HAS_SOFTCAP, HAS_MEAN, False, True, BLOCK_SIZE,
            )  # fmt: skip
            logsum = store_stats(
                stats, N, row, V, z_id, row_max, sum_exp, weighted, total, dtype, HAS_MEAN, False
            )
            # d/dz of -(1 - e) logp - e mean_logp + z_loss lse^2, times the token's scale
            s = tl.load(scale + row)
            lse_grad = 2.0 * z_loss * (row_max + logsum)
            write_row(
                row_logits, out_row, row_logits, V, target, 0.0, row_max, logsum,
                (e - 1.0) * s, (1.0 + lse_grad) * s, lse_grad, -e / V * s,
                transform, dtype, PLAIN, False, HAS_SOFTCAP, False, not PLAIN, False, BLOCK_SIZE,
            )  # fmt: skip
        else:
            zero_stats(stats, N, row)
            zero_row(out_row, V, dtype, BLOCK_SIZE)


def transform_flags(bias: Tensor | None, transform: Transform) -> dict[str, bool]:
    """The constants that say which parts of `transformed` a kernel needs."""
    return {
        "PLAIN": bias is None and transform == Transform(),
        "HAS_BIAS": bias is not None,
        "HAS_SOFTCAP": transform.softcap != 0,
    }


def _table(kernel: str, logits: Tensor) -> LaunchTable:
    return LAUNCH[f"{kernel}_{16 if logits.element_size() == 2 else 32}"]


def row_stats(inputs: RowInputs, stats: Tensor, needs: NeedsStats = ALL_STATS) -> None:
    """Write stats [7, B*T]; see rows.row_stats."""
    logits, ids, bias, transform = inputs
    B, T, V = logits.shape
    if ids.numel() == 0:
        return
    launch(
        row_stats_kernel,
        B * T,
        (logits, ids, bias, stats),
        (B * T, T, V, *logits.stride()[:2], *transform),
        HAS_MEAN=needs.mean_logp,
        HAS_ENTROPY=needs.entropy,
        **transform_flags(bias, transform),
        **launch_options(_table("row_stats", logits), logits),
    )


def row_grad(
    inputs: RowInputs, stats: Tensor, coefficients: Tensor, out: Tensor, needs: NeedsStats = ALL_STATS
) -> None:
    """Write d loss / d logits into out [B, T, V]; see rows.row_grad."""
    logits, ids, bias, transform = inputs
    B, T, V = logits.shape
    if ids.numel() == 0:
        return
    launch(
        row_grad_kernel,
        B * T,
        (logits, ids, bias, stats, coefficients, out),
        (B * T, T, V, *logits.stride()[:2], *out.stride()[:2], *transform),
        HAS_PLOGP=needs.entropy,
        **transform_flags(bias, transform),
        **launch_options(_table("row_grad", logits), logits),
    )


def row_loss(inputs: RowInputs, loss: TokenLoss, stats: Tensor, out: Tensor, needs: NeedsStats) -> None:
    """Write stats [7, B*T], and d loss / d logits into out [B, T, V]; see rows.row_loss."""
    logits, ids, _, transform = inputs
    B, T, V = logits.shape
    if ids.numel() == 0:
        return
    block_size, num_warps, programs = launch_for(_table("row_loss", logits), logits)
    sizes = (B * T, T, V, *logits.stride()[:2], *out.stride()[:2])
    launch(
        row_loss_kernel,
        grid_size(programs, B * T, logits.device),
        (logits, ids, loss.scale, stats, out),
        (*sizes, transform.softcap, transform.temperature, loss.label_smoothing, loss.z_loss),
        HAS_MEAN=needs.mean_logp,
        PLAIN=transform == Transform(),
        HAS_SOFTCAP=transform.softcap != 0,
        BLOCK_SIZE=block_size,
        num_warps=num_warps,
    )
