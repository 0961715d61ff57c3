"""The row kernels of softmax/rows.py in Triton: one program a row, V in blocks, 64-bit row offsets.

Memory is the limit: at [8192, 151936] fp32 the statistics read 4.98 GB (1.5 ms at an H100's 3.35 TB/s,
predicted). The gradient reads as much and writes half of it in bf16. Each lane keeps a running maximum and
sums relative to it, with one exponential a logit. The lanes are combined once, after the loop. A reduction
for each block would stall the row.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_options import as_scalar
from .rows import Coefficient, RowInputs, Stat, Transform

# The rows of both tables by name, as constants of Triton.
STATS = tl.constexpr(len(Stat))
LOGP, MEAN_LOGP, ENTROPY, LSE, MAX, LOGSUM, TOP1 = (tl.constexpr(int(stat)) for stat in Stat)
ONEHOT, PROB, PLOGP, UNIFORM = (tl.constexpr(int(coefficient)) for coefficient in Coefficient)

# (BLOCK_SIZE, warps) by kernel and compute capability. Measured on an H200 over fp32 [2048, 151936]: the
# statistics read 2481 GB/s with (1024, 4), and 1668 with (2048, 4). The gradient moves 3160 GB/s with
# (2048, 4). We assume that the other architectures are alike. With 16 logits a thread the statistics would
# spill on sm_100 under Triton 3.8. (4096, 16) moves the gradient at 3486 GB/s, but its bf16 variant with
# all options spills on sm_90 and sm_100. `python -m bench.gpu.tune` times a grid on a GPU and prints the
# lines to paste.
LAUNCH = {
    "row_stats": {80: (1024, 4)},
    "row_grad": {80: (2048, 4)},
}
SHORTEST = 256  # of a block, in logits: two warps of 4 logits a thread


def launch(table: Mapping[int, tuple[int, int]], sm: int, columns: int) -> tuple[int, int]:
    """(BLOCK_SIZE, warps) for rows of `columns` logits.

    The table's for the newest architecture up to `sm`, or fewer if a row is shorter than a block.
    """
    block, warps = table[max((known for known in table if known <= sm), default=min(table))]
    short = max(SHORTEST, triton.next_power_of_2(columns))
    return (short, max(1, warps * short // block)) if short < block else (block, warps)


def launch_options(table: Mapping[int, tuple[int, int]], logits: Tensor) -> dict[str, int]:
    """BLOCK_SIZE and num_warps for the rows of logits [..., V]; `table` is a value of LAUNCH."""
    # The interpreter runs on a CPU, which has no capability.
    major, minor = torch.cuda.get_device_capability(logits.device) if logits.is_cuda else (0, 0)
    block_size, warps = launch(table, 10 * major + minor, logits.shape[-1])
    return {"BLOCK_SIZE": block_size, "num_warps": warps}


@triton.jit
def _tanh(x):
    """tanh and its derivative. With t = e^-2|x|: tanh |x| = 1 - 2 t / (1 + t), by its Taylor series below
    0.25, where that cancels.

    The derivative is 4 t / (1 + t)^2. (1 - h)(1 + h) of a rounded h near 1 would have no digits left: at |x|
    = 6 it is off by 0.5 %.
    """
    t = tl.exp(-2.0 * tl.abs(x))
    # Up to x^19, so that what is left out is below 1e-17 at 0.25: up to x^11 it was 5e-11, which fp64 saw.
    s = x * x
    series = -929569.0 / 638512875 + s * (6404582.0 / 10854718875 + s * (-443861162.0 / 1856156927625))
    series = 62.0 / 2835 + s * (-1382.0 / 155925 + s * (21844.0 / 6081075 + s * series))
    near = x + x * s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * series)))
    far = 1.0 - 2.0 * t / (1.0 + t)
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far)), 4.0 * t / ((1.0 + t) * (1.0 + t))


@triton.jit
def transform_scalars(logit_scale, softcap, temperature, dtype: tl.constexpr):
    """The three options of a rows.Transform, each in `dtype`."""
    return as_scalar(logit_scale, dtype), as_scalar(softcap, dtype), as_scalar(temperature, dtype)


@triton.jit
def transformed(x, bias, transform, PLAIN: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """z and dz/dx of raw logits x, see softmax/rows.py. The compiler drops what is not used.

    transform: of `transform_scalars`.
    """
    dz_dx = tl.full(x.shape, 1.0, x.dtype)
    if PLAIN:
        return x, dz_dx
    logit_scale, softcap, temperature = transform
    z = (x + bias) * logit_scale
    if HAS_SOFTCAP:
        h, dz_dx = _tanh(z / softcap)
        z = softcap * h
    return z / temperature, dz_dx * (logit_scale / temperature)


@triton.jit
def read_row(
    row_logits, bias, V, transform,
    dtype: tl.constexpr, PLAIN: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    LEAN: tl.constexpr, READ_AGAIN: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """row_max, then in fp64 the sums over the row of e^(z - row_max) and of (z - row_max) times that, and the
    sum of z in `dtype`. The last two are 0 if LEAN.

    READ_AGAIN: the caller reads the row once more, so it should stay in the L2 cache.
    """
    lane = tl.arange(0, BLOCK_SIZE)  # begin + lane is not named: as a value of its own it spills on sm_100
    evict: tl.constexpr = "evict_last" if READ_AGAIN else ""
    # finite, so that a lane of masked logits stays free of inf - inf
    lane_max = tl.full([BLOCK_SIZE], -1e30, dtype)
    lane_sum = tl.zeros([BLOCK_SIZE], dtype)  # sum e^(z - lane_max)
    lane_weighted = tl.zeros([BLOCK_SIZE], dtype)  # sum (z - lane_max) e^(z - lane_max)
    lane_total = tl.zeros([BLOCK_SIZE], dtype)
    for begin in range(0, V, BLOCK_SIZE):
        inside = begin + lane < V
        x = tl.load(row_logits + begin + lane, mask=inside, other=0.0, eviction_policy=evict).to(dtype)
        b = 0.0
        if HAS_BIAS:
            b = tl.load(bias + begin + lane, mask=inside, other=0.0).to(dtype)
        z, _ = transformed(x, b, transform, PLAIN, HAS_SOFTCAP)
        if not LEAN:
            lane_total += tl.where(inside, z, 0.0)
        z = tl.where(inside, z, float("-inf"))
        d = z - lane_max
        rises = d > 0
        if LEAN:
            e = tl.exp(tl.where(rises, -d, d))
        else:
            finite = tl.where(d < -1e30, -1e30, d)  # -inf * 0 is NaN, -1e30 * 0 is 0; NaN passes
            e = tl.exp(tl.where(rises, -finite, finite))
            lane_weighted = tl.where(
                rises, e * (lane_weighted - finite * lane_sum), lane_weighted + finite * e
            )
        lane_sum = tl.where(rises, lane_sum * e + 1.0, lane_sum + e)
        lane_max = tl.where(rises, z, lane_max)
    row_max = tl.max(lane_max, 0)
    shift = lane_max - row_max
    scale = tl.exp(shift)
    # In fp64: fp32 would round a confident row's 1 + 8e-7 at every level, and log(sum), all that is left
    # of its loss, to half.
    sum_exp = tl.sum((scale * lane_sum).to(tl.float64), 0)
    row_weighted = tl.full((), 0.0, tl.float64)
    row_total = tl.full((), 0.0, dtype)
    if not LEAN:
        row_weighted = tl.sum((scale * (lane_weighted + shift * lane_sum)).to(tl.float64), 0)
        row_total = tl.sum(lane_total, 0)
    return row_max, sum_exp, row_weighted, row_total


@triton.jit
def transformed_logit(
    row_logits, bias, col, V, transform,
    dtype: tl.constexpr, PLAIN: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """z of one logit; NaN if `col` is not in [0, V)."""
    inside = (col >= 0) & (col < V)
    b = 0.0
    if HAS_BIAS:
        b = tl.load(bias + col, mask=inside, other=0.0).to(dtype)
    x = tl.load(row_logits + col, mask=inside, other=float("nan")).to(dtype)
    z, _ = transformed(x, b, transform, PLAIN, HAS_SOFTCAP)
    return z


@triton.jit
def store_stats(
    stats, N, row, V, z_id, row_max, sum_exp, weighted, total, dtype: tl.constexpr, LEAN: tl.constexpr
):
    """Stores column `row` of the table [7, N] from `read_row`'s sums and the id's z. Returns log(sum_exp).

    LEAN leaves MEAN_LOGP and ENTROPY as they are.
    """
    logsum = tl.log(sum_exp).to(dtype)
    tl.store(stats + LOGP * N + row, z_id - row_max - logsum)
    if not LEAN:
        tl.store(stats + MEAN_LOGP * N + row, total / V - row_max - logsum)
        tl.store(stats + ENTROPY * N + row, tl.log(sum_exp) - weighted / sum_exp)
    tl.store(stats + LSE * N + row, row_max + logsum)
    tl.store(stats + MAX * N + row, row_max)
    tl.store(stats + LOGSUM * N + row, logsum)
    tl.store(stats + TOP1 * N + row, (z_id == row_max).to(dtype))
    return logsum


@triton.jit
def write_row(
    row_logits, out_row, bias, V, target, row_max, logsum,
    onehot, prob, plogp, uniform, transform,
    dtype: tl.constexpr, PLAIN: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_PLOGP: tl.constexpr, HAS_SLOPE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Write P (prob + plogp log P) + uniform, and onehot more at the target, times dz/dx if HAS_SLOPE."""
    lane = tl.arange(0, BLOCK_SIZE)
    for begin in range(0, V, BLOCK_SIZE):
        inside = begin + lane < V
        x = tl.load(
            row_logits + begin + lane, mask=inside, other=0.0, eviction_policy="evict_first"
        ).to(dtype)  # fmt: skip
        b = 0.0
        if HAS_BIAS:
            b = tl.load(bias + begin + lane, mask=inside, other=0.0).to(dtype)
        z, dz_dx = transformed(x, b, transform, PLAIN, HAS_SOFTCAP)
        logp = z - row_max - logsum
        factor = prob
        if HAS_PLOGP:
            factor = prob + plogp * tl.where(logp < -1e30, -1e30, logp)
        dz = tl.exp(logp) * factor + uniform
        dz += tl.where(begin + lane == target, onehot, 0.0)
        if HAS_SLOPE:
            dz *= dz_dx
        tl.store(out_row + begin + lane, dz, mask=inside)


@triton.jit
def zero_row(out_row, V, dtype: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    lane = tl.arange(0, BLOCK_SIZE)
    for begin in range(0, V, BLOCK_SIZE):
        tl.store(out_row + begin + lane, tl.zeros([BLOCK_SIZE], dtype), mask=begin + lane < V)


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
        row_max, sum_exp, weighted, total = read_row(
            row_logits, bias, V, transform,
            dtype, PLAIN, HAS_BIAS, HAS_SOFTCAP, False, False, BLOCK_SIZE,
        )  # fmt: skip
        z_id = transformed_logit(row_logits, bias, target, V, transform, dtype, PLAIN, HAS_BIAS, HAS_SOFTCAP)
        store_stats(stats, N, row, V, z_id, row_max, sum_exp, weighted, total, dtype, False)
    else:
        for stat in tl.static_range(STATS):
            tl.store(stats + stat * N + row, 0.0)


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
            row_logits, out_row, bias, V, target,
            tl.load(stats + MAX * N + row), tl.load(stats + LOGSUM * N + row),
            tl.load(coefficients + ONEHOT * N + row), tl.load(coefficients + PROB * N + row),
            tl.load(coefficients + PLOGP * N + row), tl.load(coefficients + UNIFORM * N + row),
            transform, dtype, PLAIN, HAS_BIAS, HAS_SOFTCAP, True, not PLAIN, BLOCK_SIZE,
        )  # fmt: skip
    else:
        zero_row(out_row, V, dtype, BLOCK_SIZE)


def transform_flags(bias: Tensor | None, transform: Transform) -> dict[str, bool]:
    """The constants that say which parts of `transformed` a kernel needs."""
    return {
        "PLAIN": bias is None and transform == Transform(),
        "HAS_BIAS": bias is not None,
        "HAS_SOFTCAP": transform.softcap != 0,
    }


def row_stats(inputs: RowInputs, stats: Tensor) -> None:
    """Write stats [7, B*T]; see rows.row_stats."""
    logits, ids, bias, transform = inputs
    B, T, V = logits.shape
    if ids.numel() == 0:
        return
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        row_stats_kernel[(B * T,)](
            logits, ids, bias, stats, B * T, T, V, *logits.stride()[:2], *transform,
            **transform_flags(bias, transform), **launch_options(LAUNCH["row_stats"], logits),
        )  # fmt: skip


def row_grad(inputs: RowInputs, stats: Tensor, coefficients: Tensor, out: Tensor) -> None:
    """Write d loss / d logits into out [B, T, V]; see rows.row_grad."""
    logits, ids, bias, transform = inputs
    B, T, V = logits.shape
    if ids.numel() == 0:
        return
    with torch.cuda.device_of(logits):
        row_grad_kernel[(B * T,)](
            logits, ids, bias, stats, coefficients, out, B * T, T, V, *logits.stride()[:2], *out.stride()[:2],
            *transform, **transform_flags(bias, transform), **launch_options(LAUNCH["row_grad"], logits),
        )  # fmt: skip
