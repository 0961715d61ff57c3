"""What the row kernels do with one row of logits, as Triton functions: read it, write its gradient.

`read_row` keeps a maximum and sums relative to it in lanes. A lane takes as many neighbouring logits at a
time as 16 bytes hold (LANE_BYTES), which is what a thread loads at once: a maximum over them needs no other
thread, and the sums are scaled once for all of them. So a logit costs one exponential and six to nine
instructions: fewer than a GPU has time for while it reads. Lanes are combined once, after the loop.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from triton.language.extra import libdevice

from ..triton_options import INTERPRETED, as_scalar
from .rows import Coefficient, Stat

# The rows of both tables by name, as constants of Triton.
STATS = tl.constexpr(len(Stat))
LOGP, MEAN_LOGP, ENTROPY, LSE, MAX, LOGSUM, TOP1 = (tl.constexpr(int(stat)) for stat in Stat)
ONEHOT, PROB, PLOGP, UNIFORM = (tl.constexpr(int(coefficient)) for coefficient in Coefficient)
LANE_BYTES = tl.constexpr(16)
LOG2_E = tl.constexpr(math.log2(math.e))


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
def _exp(x):
    """e^x; in fp32 0 where it is below 2^-126.

    tl.exp keeps those too, for which it spends three instructions more on each logit.
    """
    if INTERPRETED or x.dtype != tl.float32:  # the interpreter knows no libdevice
        return tl.exp(x)
    return libdevice.exp2(x * LOG2_E)


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
def _load(
    row_logits,
    bias,
    cols,
    V,
    dtype: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MASKED: tl.constexpr,
    EVICT: tl.constexpr,
):
    """Logits and bias at `cols` in `dtype`, and which of them are in the row; all of them unless MASKED."""
    inside = cols < V
    b = 0.0
    if MASKED:
        x = tl.load(row_logits + cols, mask=inside, other=0.0, eviction_policy=EVICT).to(dtype)
        if HAS_BIAS:
            b = tl.load(bias + cols, mask=inside, other=0.0).to(dtype)
    else:
        x = tl.load(row_logits + cols, eviction_policy=EVICT).to(dtype)
        if HAS_BIAS:
            b = tl.load(bias + cols).to(dtype)
    return x, b, inside


@triton.jit
def _add_block(
    row_logits,
    bias,
    cols,
    V,
    lane_max,
    lane_sum,
    lane_weighted,
    lane_total,
    transform,
    PLAIN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    EVICT: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The lanes [L] of `read_row` with the logits at `cols` [L, logits of a lane] added."""
    dtype: tl.constexpr = lane_max.dtype
    x, b, inside = _load(row_logits, bias, cols, V, dtype, HAS_BIAS, MASKED, EVICT)
    z, _ = transformed(x, b, transform, PLAIN, HAS_SOFTCAP)
    if HAS_MEAN:
        # Subtracted: Triton 3.6 aborts (OptimizeThreadLocality, loopResult.hasOneUse) where a loop adds up a
        # sum and its result is used twice, here by the masked block and past it.
        lane_total -= tl.sum(tl.where(inside, -z, 0.0) if MASKED else -z, 1)
    if MASKED:
        z = tl.where(inside, z, float("-inf"))
    new_max = tl.maximum(lane_max, tl.max(z, 1))
    d = z - new_max[:, None]
    e = _exp(d)
    shift = lane_max - new_max
    scale = tl.exp(shift)
    if HAS_ENTROPY:
        finite = tl.maximum(d, -1e30)  # -inf * 0 is NaN, -1e30 * 0 is 0; of a NaN logit e stays NaN
        lane_weighted = scale * (lane_weighted + shift * lane_sum) + tl.sum(e * finite, 1)
    lane_sum = scale * lane_sum + tl.sum(e, 1)
    return new_max, lane_sum, lane_weighted, lane_total


@triton.jit
def read_row(
    row_logits,
    bias,
    V,
    transform,
    dtype: tl.constexpr,
    PLAIN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    READ_AGAIN: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """row_max, then in fp64 the sums over the row of e^(z - row_max) and of (z - row_max) times that, and the
    sum of z in `dtype`. The last two are 0 without HAS_ENTROPY and HAS_MEAN.

    READ_AGAIN: the caller reads the row once more, so it should stay in the L2 cache.
    """
    EVICT: tl.constexpr = "evict_last" if READ_AGAIN else ""
    WIDTH: tl.constexpr = LANE_BYTES * 8 // row_logits.dtype.element_ty.primitive_bitwidth
    LANES: tl.constexpr = BLOCK_SIZE // WIDTH
    offsets = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    # finite, so that a lane of masked logits stays free of inf - inf
    lane_max = tl.full([LANES], -1e30, dtype)
    lane_sum = tl.zeros([LANES], dtype)  # sum e^(z - lane_max)
    lane_weighted = tl.zeros([LANES], dtype)  # sum (z - lane_max) e^(z - lane_max)
    lane_total = tl.zeros([LANES], dtype)
    whole = V // BLOCK_SIZE * BLOCK_SIZE
    for begin in range(0, whole, BLOCK_SIZE):
        lane_max, lane_sum, lane_weighted, lane_total = _add_block(
            row_logits, bias, begin + offsets, V, lane_max, lane_sum, lane_weighted, lane_total,
            transform, PLAIN, HAS_BIAS, HAS_SOFTCAP, HAS_MEAN, HAS_ENTROPY, EVICT, False,
        )  # fmt: skip
    if whole < V:
        lane_max, lane_sum, lane_weighted, lane_total = _add_block(
            row_logits, bias, whole + offsets, V, lane_max, lane_sum, lane_weighted, lane_total,
            transform, PLAIN, HAS_BIAS, HAS_SOFTCAP, HAS_MEAN, HAS_ENTROPY, EVICT, True,
        )  # fmt: skip
    row_max = tl.max(lane_max, 0)
    shift = lane_max - row_max
    scale = tl.exp(shift)
    # In fp64: fp32 would round a confident row's 1 + 8e-7 at every level, and log(sum), all that is left
    # of its loss, to half.
    sum_exp = tl.sum((scale * lane_sum).to(tl.float64), 0)
    row_weighted = tl.full((), 0.0, tl.float64)
    row_total = tl.full((), 0.0, dtype)
    if HAS_ENTROPY:
        row_weighted = tl.sum((scale * (lane_weighted + shift * lane_sum)).to(tl.float64), 0)
    if HAS_MEAN:
        row_total = tl.sum(lane_total, 0)
    return row_max, sum_exp, row_weighted, row_total


@triton.jit
def transformed_logit(
    row_logits,
    bias,
    col,
    V,
    transform,
    dtype: tl.constexpr,
    PLAIN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
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
    stats,
    N,
    row,
    V,
    z_id,
    row_max,
    sum_exp,
    weighted,
    total,
    dtype: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
):
    """Stores column `row` of the table [7, N] from `read_row`'s sums and the id's z. Returns log(sum_exp).

    MEAN_LOGP and ENTROPY are 0 without HAS_MEAN and HAS_ENTROPY.
    """
    logsum = tl.log(sum_exp).to(dtype)
    mean_logp = tl.full((), 0.0, dtype)
    entropy = tl.full((), 0.0, dtype)
    if HAS_MEAN:
        mean_logp = total / V - row_max - logsum
    if HAS_ENTROPY:
        entropy = (tl.log(sum_exp) - weighted / sum_exp).to(dtype)
    tl.store(stats + LOGP * N + row, z_id - row_max - logsum)
    tl.store(stats + MEAN_LOGP * N + row, mean_logp)
    tl.store(stats + ENTROPY * N + row, entropy)
    tl.store(stats + LSE * N + row, row_max + logsum)
    tl.store(stats + MAX * N + row, row_max)
    tl.store(stats + LOGSUM * N + row, logsum)
    tl.store(stats + TOP1 * N + row, (z_id == row_max).to(dtype))
    return logsum


@triton.jit
def zero_stats(stats, N, row):
    """Column `row` of the table [7, N] of an ignored row."""
    for stat in tl.static_range(STATS):
        tl.store(stats + stat * N + row, 0.0)


@triton.jit
def _gradient(shifted, logsum, prob, plogp, uniform, HAS_PLOGP: tl.constexpr):
    """P (prob + plogp log P) + uniform of logits z, from shifted = z - row_max.

    Without HAS_PLOGP `prob` has e^-logsum in it, so that a logit costs one subtraction less.
    """
    if HAS_PLOGP:
        logp = shifted - logsum
        return _exp(logp) * (prob + plogp * tl.where(logp < -1e30, -1e30, logp)) + uniform
    return _exp(shifted) * prob + uniform


@triton.jit
def _write_block(
    row_logits,
    out_row,
    bias,
    cols,
    V,
    row_max,
    logsum,
    prob,
    plogp,
    uniform,
    transform,
    dtype: tl.constexpr,
    PLAIN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_PLOGP: tl.constexpr,
    HAS_SLOPE: tl.constexpr,
    MASKED: tl.constexpr,
):
    x, b, inside = _load(row_logits, bias, cols, V, dtype, HAS_BIAS, MASKED, "evict_first")
    z, dz_dx = transformed(x, b, transform, PLAIN, HAS_SOFTCAP)
    dz = _gradient(z - row_max, logsum, prob, plogp, uniform, HAS_PLOGP)
    if HAS_SLOPE:
        dz *= dz_dx
    if MASKED:
        tl.store(out_row + cols, dz, mask=inside)
    else:
        tl.store(out_row + cols, dz)


@triton.jit
def write_row(
    row_logits,
    out_row,
    bias,
    V,
    target,
    target_logp,
    row_max,
    logsum,
    onehot,
    prob,
    plogp,
    uniform,
    transform,
    dtype: tl.constexpr,
    PLAIN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_PLOGP: tl.constexpr,
    HAS_SLOPE: tl.constexpr,
    RECOMPUTED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Write P (prob + plogp log P) + uniform, and onehot more at the target, times dz/dx if HAS_SLOPE.

    The target's element is written again at the end: looking for it at each logit would cost three
    instructions of eleven. A target outside [0, V) has no element.

    target_logp: with RECOMPUTED log P of the target from the statistics, used where onehot is not 0. These
        logits may then be those of a second GEMM, which is off in the last bit where its shape differs. At
        z = 131 that is 2^-16, and P - 1 of a sure token would be 2^-16 where it is 0. Without onehot the
        target may stand for none (`ColumnGrads`, a sharded head), and its element is that of any column.
    """
    inside = (target >= 0) & (target < V)
    x = tl.load(row_logits + target, mask=inside, other=0.0).to(dtype)
    b = 0.0
    if HAS_BIAS:
        b = tl.load(bias + target, mask=inside, other=0.0).to(dtype)
    if not HAS_PLOGP:
        prob *= tl.exp(-logsum)
    z, slope = transformed(x, b, transform, PLAIN, HAS_SOFTCAP)
    shifted = z - row_max
    if RECOMPUTED:
        shifted = tl.where(onehot != 0, target_logp + logsum, shifted)
    target_dz = _gradient(shifted, logsum, prob, plogp, uniform, HAS_PLOGP) + onehot
    if HAS_SLOPE:
        target_dz *= slope
    tl.debug_barrier()  # in place another thread overwrites the target's logit
    # Backwards: what read_row read last is still in the caches. On an H200 row_loss took 1.45 ms so, and 1.53
    # forwards.
    lane = tl.arange(0, BLOCK_SIZE)
    whole = V // BLOCK_SIZE * BLOCK_SIZE
    if whole < V:
        _write_block(
            row_logits, out_row, bias, whole + lane, V, row_max, logsum, prob, plogp, uniform, transform,
            dtype, PLAIN, HAS_BIAS, HAS_SOFTCAP, HAS_PLOGP, HAS_SLOPE, True,
        )  # fmt: skip
    for end in range(whole, 0, -BLOCK_SIZE):
        _write_block(
            row_logits, out_row, bias, end - BLOCK_SIZE + lane, V, row_max, logsum, prob, plogp, uniform,
            transform, dtype, PLAIN, HAS_BIAS, HAS_SOFTCAP, HAS_PLOGP, HAS_SLOPE, False,
        )  # fmt: skip
    tl.debug_barrier()  # behind the thread that wrote the target's element with its block
    tl.store(out_row + target, target_dz, mask=inside)


@triton.jit
def zero_row(out_row, V, dtype: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Write zeros, the gradient of an ignored row."""
    lane = tl.arange(0, BLOCK_SIZE)
    for begin in range(0, V, BLOCK_SIZE):
        tl.store(out_row + begin + lane, tl.zeros([BLOCK_SIZE], dtype), mask=begin + lane < V)
