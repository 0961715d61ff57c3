"""The row kernels of softmax/rows.py in Triton: one program a row, V in blocks, 64-bit row offsets.

Bound by memory: at [8192, 151936] fp32 the statistics read 4.98 GB (1.5 ms at an H100's 3.35 TB/s,
predicted), the gradient reads that and writes half of it in bf16. Each lane keeps a running maximum and sums
relative to it (one exponential a logit) and the lanes meet once, after the loop: a reduction per block would
stall the row at every block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_options import as_scalar

# (BLOCK, warps) by kernel and compute capability. Measured on an H200 over fp32 [2048, 151936]: statistics
# read 2481 GB/s with (1024, 4), where (2048, 4) reads 1668; the gradient moves 3160 GB/s with (2048, 4). The
# other architectures are taken to be alike. With 16 logits a thread the statistics would spill on sm_100
# under Triton 3.8. (4096, 16) moves the gradient at 3486 GB/s, but its bf16 variant with all options spills
# on sm_90 and sm_100. `python -m bench.gpu.tune` times a grid on a GPU and prints the lines to paste.
LAUNCH = {
    "row_stats": {80: (1024, 4)},
    "row_grad": {80: (2048, 4)},
}
SHORTEST = 256  # of a block, in logits: two warps of 4 logits a thread


def launch(kernel: str, sm: int, vocab: int) -> tuple[int, int]:
    """(BLOCK, warps) for rows of `vocab` logits: the newest architecture's in LAUNCH up to `sm`, less for a
    row shorter than a block."""
    table = LAUNCH[kernel]
    block, warps = table[max((known for known in table if known <= sm), default=min(table))]
    short = max(SHORTEST, triton.next_power_of_2(vocab))
    return (short, max(1, warps * short // block)) if short < block else (block, warps)


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
def transformed(x, bias, logit_scale, softcap, temperature, PLAIN: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """z and dz/dx of raw logits x, see softmax/rows.py. The compiler drops what is not used."""
    slope = tl.full(x.shape, 1.0, x.dtype)
    if PLAIN:
        return x, slope
    z = (x + bias) * logit_scale
    if HAS_SOFTCAP:
        h, slope = _tanh(z / softcap)
        z = softcap * h
    return z / temperature, slope * (logit_scale / temperature)


@triton.jit
def row_stats_kernel(
    logits,  # [B, T, V], unit stride over V
    ids,  # [B*T] int64, negative: ignored
    bias,  # [V]; read if HAS_BIAS
    stats,  # [7, B*T], order of rows.Stat
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
):
    n = tl.program_id(0).to(tl.int64)
    id = tl.load(ids + n)
    dtype = stats.dtype.element_ty
    logit_scale = as_scalar(logit_scale, dtype)
    softcap = as_scalar(softcap, dtype)
    temperature = as_scalar(temperature, dtype)
    if id >= 0:
        row = logits + n // T * batch_stride + n % T * time_stride
        columns = tl.arange(0, BLOCK)
        top = tl.full(
            [BLOCK], -1e30, dtype
        )  # finite, so that a lane of masked logits stays free of inf - inf
        total = tl.zeros([BLOCK], dtype)
        sum = tl.zeros([BLOCK], dtype)  # sum e^(z - top)
        weighted = tl.zeros([BLOCK], dtype)  # sum (z - top) e^(z - top)
        for begin in range(0, V, BLOCK):
            inside = begin + columns < V
            x = tl.load(row + begin + columns, mask=inside, other=0.0).to(dtype)
            b = 0.0
            if HAS_BIAS:
                b = tl.load(bias + begin + columns, mask=inside, other=0.0).to(dtype)
            z, _ = transformed(x, b, logit_scale, softcap, temperature, PLAIN, HAS_SOFTCAP)
            total += tl.where(inside, z, 0.0)
            z = tl.where(inside, z, float("-inf"))
            d = z - top
            rises = d > 0
            finite = tl.where(d < -1e30, -1e30, d)  # -inf * 0 is NaN, -1e30 * 0 is 0; NaN passes
            e = tl.exp(tl.where(rises, -finite, finite))
            weighted = tl.where(rises, e * (weighted - finite * sum), weighted + finite * e)
            sum = tl.where(rises, sum * e + 1.0, sum + e)
            top = tl.where(rises, z, top)
        row_top = tl.max(top, 0)
        shift = top - row_top
        scale = tl.exp(shift)
        # In fp64: fp32 would round a confident row's 1 + 8e-7 at every level, and log(sum), all that is left
        # of its loss, to half.
        row_weighted = tl.sum((scale * (weighted + shift * sum)).to(tl.float64), 0)
        row_sum = tl.sum((scale * sum).to(tl.float64), 0)
        logsum = tl.log(row_sum).to(dtype)
        b_id = 0.0
        if HAS_BIAS:
            b_id = tl.load(bias + id, mask=id < V, other=0.0).to(dtype)
        x_id = tl.load(row + id, mask=id < V, other=float("nan")).to(dtype)
        z_id, _ = transformed(x_id, b_id, logit_scale, softcap, temperature, PLAIN, HAS_SOFTCAP)
        tl.store(stats + n, z_id - row_top - logsum)
        tl.store(stats + N + n, tl.sum(total, 0) / V - row_top - logsum)
        tl.store(stats + 2 * N + n, tl.log(row_sum) - row_weighted / row_sum)
        tl.store(stats + 3 * N + n, row_top + logsum)
        tl.store(stats + 4 * N + n, row_top)
        tl.store(stats + 5 * N + n, logsum)
        tl.store(stats + 6 * N + n, (z_id == row_top).to(dtype))
    else:
        for k in tl.static_range(7):
            tl.store(stats + k * N + n, 0.0)


@triton.jit
def row_grad_kernel(
    logits,  # [B, T, V], unit stride over V
    ids,  # [B*T] int64, negative: ignored
    bias,  # [V]; read if HAS_BIAS
    stats,  # [7, B*T] of row_stats_kernel
    coefficients,  # [4, B*T], order of rows.coefficients
    out,  # [B, T, V]; the logits themselves, or memory that does not overlap them
    N,
    T,
    V,
    batch_stride,
    time_stride,
    out_batch_stride,
    out_time_stride,
    logit_scale: tl.float64,
    softcap: tl.float64,
    temperature: tl.float64,
    PLAIN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    id = tl.load(ids + n)
    dtype = stats.dtype.element_ty
    logit_scale = as_scalar(logit_scale, dtype)
    softcap = as_scalar(softcap, dtype)
    temperature = as_scalar(temperature, dtype)
    row = logits + n // T * batch_stride + n % T * time_stride
    out_row = out + n // T * out_batch_stride + n % T * out_time_stride
    columns = tl.arange(0, BLOCK)
    if id >= 0:
        top = tl.load(stats + 4 * N + n)
        logsum = tl.load(stats + 5 * N + n)
        onehot = tl.load(coefficients + n)
        prob = tl.load(coefficients + N + n)
        plogp = tl.load(coefficients + 2 * N + n)
        uniform = tl.load(coefficients + 3 * N + n)
        for begin in range(0, V, BLOCK):
            inside = begin + columns < V
            x = tl.load(row + begin + columns, mask=inside, other=0.0).to(dtype)
            b = 0.0
            if HAS_BIAS:
                b = tl.load(bias + begin + columns, mask=inside, other=0.0).to(dtype)
            z, slope = transformed(x, b, logit_scale, softcap, temperature, PLAIN, HAS_SOFTCAP)
            logp = z - top - logsum
            finite = tl.where(logp < -1e30, -1e30, logp)
            dz = tl.exp(logp) * (prob + plogp * finite) + uniform
            dz += tl.where(begin + columns == id, onehot, 0.0)
            if not PLAIN:
                dz *= slope
            tl.store(out_row + begin + columns, dz, mask=inside)
    else:
        for begin in range(0, V, BLOCK):
            tl.store(
                out_row + begin + columns, tl.zeros([BLOCK], stats.dtype.element_ty), mask=begin + columns < V
            )


def _flags(
    kernel: str, logits: Tensor, bias: Tensor | None, logit_scale: float, softcap: float, temperature: float
) -> dict[str, bool | int]:
    major, minor = (
        torch.cuda.get_device_capability(logits.device) if logits.is_cuda else (0, 0)
    )  # the interpreter runs on a CPU
    block, warps = launch(kernel, 10 * major + minor, logits.shape[-1])
    return {
        "PLAIN": bias is None and logit_scale == 1 and softcap == 0 and temperature == 1,
        "HAS_BIAS": bias is not None,
        "HAS_SOFTCAP": softcap != 0,
        "BLOCK": block,
        "num_warps": warps,
    }


def row_stats(
    logits: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    temperature: float,
    stats: Tensor,
) -> None:
    """Fill stats [7, B*T]; see rows.row_stats."""
    B, T, V = logits.shape
    if ids.numel() == 0:
        return
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        row_stats_kernel[(B * T,)](
            logits, ids, bias, stats, B * T, T, V, logits.stride(0), logits.stride(1), logit_scale, softcap, temperature,
            **_flags("row_stats", logits, bias, logit_scale, softcap, temperature),
        )  # fmt: skip


def row_grad(
    logits: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    temperature: float,
    stats: Tensor,
    coefficients: Tensor,
    out: Tensor,
) -> None:
    """Write d loss / d logits into out [B, T, V]; see rows.row_grad."""
    B, T, V = logits.shape
    if ids.numel() == 0:
        return
    with torch.cuda.device_of(logits):
        row_grad_kernel[(B * T,)](
            logits, ids, bias, stats, coefficients, out, B * T, T, V, logits.stride(0), logits.stride(1), out.stride(0), out.stride(1),
            logit_scale, softcap, temperature, **_flags("row_grad", logits, bias, logit_scale, softcap, temperature),
        )  # fmt: skip
