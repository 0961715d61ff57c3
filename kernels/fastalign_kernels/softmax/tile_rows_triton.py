"""Row kernels of the head's GPU engines (linear/gpu/kept_softmax.py, linear/gpu/vocab_slices.py).

One program a row of a tile of logits [C, V], 64-bit row offsets:

    tile_rows        statistics of a row, its gradient, or both in one launch; or the softmax P itself
    kept_rows        a kept P into the gradient, in place
    slice_stats      in slice_rows_triton.py: statistics of rows that come as slices of the vocabulary

They read ids and write the table of statistics by token, so that no launch gathers or scatters them.

Bytes a logit of an fp32 tile with a bf16 gradient: statistics 4; statistics and gradient in one launch
4 + 4 + 2; gradient alone 4 + 2; kept_rows 2 + 2. LAUNCH has the times that an H200 took.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..triton_launch import launch
from ..triton_options import as_scalar
from .row_passes_triton import (
    LOGP,
    LOGSUM,
    LSE,
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
)
from .rows import TokenLoss, Transform
from .rows_triton import Launch, grid_size, launch_for, launch_options, transform_flags

# By launch and compute capability. "lean" computes lse and logp alone, "full" all statistics. The times are
# an H200's over fp32 [1024, 151936], where amax takes 0.271 ms; each call was timed by itself, so some 0.05
# ms are the host's. Entries without a time are those of a similar kernel, or were measured before the passes
# over a row were rewritten. `python -m bench.gpu.tune_tiles` times them. Other architectures are taken to be
# alike.
LAUNCH = {
    "stats_lean": {80: Launch(1024, 4)},  # 0.269; (2048, 8) 0.291
    "stats_full": {80: Launch(2048, 16)},
    "loss_lean": {80: Launch(8192, 32, 1)},  # 0.480; (2048, 16) 0.488
    "loss_full": {80: Launch(1024, 4)},
    "softmax_lean": {80: Launch(2048, 8), 120: Launch(1024, 8)},  # 0.487; (4096, 16) 0.472 spills on sm_100
    "softmax_full": {80: Launch(2048, 8)},
    # 0.364; (2048, 16) takes 0.357 and spills on sm_120, and (2048, 8) on sm_100
    "given_lean": {80: Launch(2048, 8), 100: Launch(1024, 8), 120: Launch(2048, 8)},
    "given_full": {80: Launch(2048, 8)},
    "slice_lean": {80: Launch(1024, 4)},
    "slice_full": {80: Launch(1024, 4)},
    "kept": {80: Launch(1024, 8)},
    # Logits in bf16, over which the gradient is written: as row_loss, row_stats and row_grad.
    "stats_lean_16": {80: Launch(4096, 16)},
    "stats_full_16": {80: Launch(4096, 8)},
    "loss_lean_16": {80: Launch(8192, 32, 2)},
    "loss_full_16": {80: Launch(8192, 32, 2)},
    "given_lean_16": {80: Launch(2048, 8)},
    "given_full_16": {80: Launch(4096, 8)},
}

# What tile_rows_kernel writes beside the statistics.
NOTHING, TOKEN_LOSS, GIVEN, SOFTMAX = (tl.constexpr(i) for i in range(4))
WRITES = ("stats", "loss", "given", "softmax")  # their names in LAUNCH


@triton.jit
def row_token(tokens, ids, row, first_token, HAS_TOKENS: tl.constexpr):
    """The token of a row of the tile, and the token's id."""
    token = first_token + row
    if HAS_TOKENS:
        token = tl.load(tokens + row)
    return token, tl.load(ids + token)


@triton.jit
def load_coefficients(coefficients, stride, row):
    """onehot, prob, plogp and uniform of one row of a table [4, C]."""
    return (
        tl.load(coefficients + ONEHOT * stride + row),
        tl.load(coefficients + PROB * stride + row),
        tl.load(coefficients + PLOGP * stride + row),
        tl.load(coefficients + UNIFORM * stride + row),
    )


@triton.jit
def tile_rows_kernel(
    # pointers
    logits,  # [C, V], unit stride over V
    out,  # [C, V], unit stride over V; the logits themselves, or memory that does not overlap them
    tokens,  # [C] int64, the row's token; read if HAS_TOKENS, else it is first_token + row
    ids,  # [N] int64, negative: ignored
    bias,  # [V]; read if HAS_BIAS
    stats,  # [7, N], order of rows.Stat; written if STATS, else read
    token_scale,  # [N]; read for TOKEN_LOSS
    coefficients,  # [4, C], order of rows.Coefficient; read for GIVEN
    # sizes
    first_token,
    first_column,  # id of the tile's first column
    C,
    N,
    V,
    # strides
    row_stride,
    out_stride,
    scale_stride,
    coefficient_stride,
    # options
    logit_scale: tl.float64,
    softcap: tl.float64,
    temperature: tl.float64,
    label_smoothing: tl.float64,
    z_loss: tl.float64,
    softmax_scale: tl.float64,
    # constants
    STATS: tl.constexpr,
    LEAN: tl.constexpr,
    WRITE: tl.constexpr,
    HAS_TOKENS: tl.constexpr,
    PLAIN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    dtype: tl.constexpr = stats.dtype.element_ty
    transform = transform_scalars(logit_scale, softcap, temperature, dtype)
    for program_row in range(tl.program_id(0), C, tl.num_programs(0)):
        row = tl.full((), 0, tl.int64) + program_row
        token, target = row_token(tokens, ids, row, first_token, HAS_TOKENS)
        row_logits = logits + row * row_stride
        out_row = out + row * out_stride
        if target >= 0:
            col = target - first_column
            if STATS:
                # before read_row's barriers: in place another thread may overwrite it after them
                z_id = transformed_logit(
                    row_logits, bias, col, V, transform, dtype, PLAIN, HAS_BIAS, HAS_SOFTCAP
                )
                row_max, sum_exp, weighted, total = read_row(
                    row_logits, bias, V, transform,
                    dtype, PLAIN, HAS_BIAS, HAS_SOFTCAP, not LEAN, not LEAN, WRITE != NOTHING, BLOCK_SIZE,
                )  # fmt: skip
                logsum = store_stats(
                    stats, N, token, V, z_id, row_max, sum_exp, weighted, total, dtype, not LEAN, not LEAN
                )
            else:
                row_max = tl.load(stats + MAX * N + token)
                logsum = tl.load(stats + LOGSUM * N + token)
            if WRITE == SOFTMAX:
                zero = tl.full((), 0.0, dtype)
                write_row(
                    row_logits, out_row, bias, V, -1, 0.0, row_max, logsum,
                    zero, as_scalar(softmax_scale, dtype), zero, zero, transform,
                    dtype, PLAIN, HAS_BIAS, HAS_SOFTCAP, False, False, False, BLOCK_SIZE,
                )  # fmt: skip
            if WRITE == TOKEN_LOSS:
                # d/dz of -(1 - e) logp - e mean_logp + z_loss lse^2, times the token's scale
                scale = tl.load(token_scale + token * scale_stride).to(dtype)
                e = as_scalar(label_smoothing, dtype)
                lse_grad = 2.0 * as_scalar(z_loss, dtype) * (row_max + logsum)
                write_row(
                    row_logits, out_row, bias, V, col, 0.0, row_max, logsum,
                    (e - 1.0) * scale, (1.0 + lse_grad) * scale, lse_grad, -e / V * scale, transform,
                    dtype, PLAIN, HAS_BIAS, HAS_SOFTCAP, False, not PLAIN, False, BLOCK_SIZE,
                )  # fmt: skip
            if WRITE == GIVEN:
                onehot, prob, plogp, uniform = load_coefficients(coefficients, coefficient_stride, row)
                write_row(
                    row_logits, out_row, bias, V, col, tl.load(stats + LOGP * N + token), row_max, logsum,
                    onehot, prob, plogp, uniform, transform,
                    dtype, PLAIN, HAS_BIAS, HAS_SOFTCAP, not LEAN, not PLAIN, not STATS, BLOCK_SIZE,
                )  # fmt: skip
        elif WRITE != NOTHING:
            zero_row(out_row, V, dtype, BLOCK_SIZE)


@triton.jit
def kept_rows_kernel(
    # pointers
    softmax,  # [C, V], unit stride over V: P times softmax_scale
    out,  # [C, V], the same memory, of the same or another 16-bit dtype
    tokens,  # [C] int64, the row's token; read if HAS_TOKENS, else it is first_token + row
    ids,  # [N] int64, negative: ignored
    stats,  # [7, N], order of rows.Stat
    coefficients,  # [4, C], order of rows.Coefficient
    # sizes
    first_token,
    N,
    V,
    # strides
    row_stride,
    coefficient_stride,
    # options
    logit_scale: tl.float64,
    softcap: tl.float64,
    temperature: tl.float64,
    softmax_scale: tl.float64,
    # constants
    LEAN: tl.constexpr,
    HAS_TOKENS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token, target = row_token(tokens, ids, row, first_token, HAS_TOKENS)
    dtype: tl.constexpr = stats.dtype.element_ty
    out_row = out + row * row_stride
    if target >= 0:
        row_softmax = softmax + row * row_stride
        target_logp = tl.load(stats + LOGP * N + token)
        lse = tl.load(stats + LSE * N + token)
        onehot, prob, plogp, uniform = load_coefficients(coefficients, coefficient_stride, row)
        slope = as_scalar(logit_scale, dtype) / as_scalar(temperature, dtype)
        inverse = 1.0 / as_scalar(softmax_scale, dtype)
        to_h = as_scalar(temperature, dtype)
        if HAS_SOFTCAP:
            to_h = to_h / as_scalar(softcap, dtype)
        target_p = tl.exp(target_logp)
        lane = tl.arange(0, BLOCK_SIZE)
        for begin in range(0, V, BLOCK_SIZE):
            inside = begin + lane < V
            is_target = begin + lane == target
            p = tl.load(row_softmax + begin + lane, mask=inside, other=0.0).to(dtype) * inverse
            p = tl.where(is_target, target_p, p)
            factor = prob
            if HAS_SOFTCAP or not LEAN:
                logp = tl.where(is_target, target_logp, tl.log(tl.maximum(p, 1e-37)))
            if not LEAN:
                factor = prob + plogp * logp
            dz = p * factor + uniform
            dz += tl.where(is_target, onehot, 0.0)
            if HAS_SOFTCAP:
                h = (logp + lse) * to_h
                dz *= (1.0 - h) * (1.0 + h)
            tl.store(out_row + begin + lane, dz * slope, mask=inside)
    else:
        zero_row(out_row, V, dtype, BLOCK_SIZE)


class Rows(NamedTuple):
    """The tokens of a tile's rows: `indices` [C], or from `first` on."""

    indices: Tensor | None
    first: int


class Softmaxes(NamedTuple):
    """What a head's rows share."""

    ids: Tensor  # [N]
    bias: Tensor | None  # [V], of the accumulator's dtype
    transform: Transform
    stats: Tensor  # [7, N]
    lean: bool  # only LOGP, LSE, MAX, LOGSUM and TOP1 are asked for


def flags(softmaxes: Softmaxes) -> dict[str, bool]:
    """The constexprs that follow from a head's options."""
    return {"LEAN": softmaxes.lean, **transform_flags(softmaxes.bias, softmaxes.transform)}


def _tile_rows(
    tile: Tensor,
    rows: Rows,
    softmaxes: Softmaxes,
    *,
    stats: bool,
    write: int,
    out: Tensor | None = None,
    loss: TokenLoss | None = None,
    coefficients: Tensor | None = None,
    first_column: int = 0,
    softmax_scale: float = 1.0,
) -> None:
    C, V = tile.shape
    if C == 0:
        return
    out = tile if out is None else out
    ids, bias, transform, table, lean = softmaxes
    bias = None if bias is None else bias[first_column : first_column + V]
    given = ids if coefficients is None else coefficients
    kernel = WRITES[write] + ("_lean" if lean else "_full") + ("_16" if tile.element_size() == 2 else "")
    scale = TokenLoss(ids, 0.0, 0.0) if loss is None else loss
    block_size, num_warps, programs = launch_for(LAUNCH[kernel], tile)
    sizes = (rows.first, first_column, C, ids.shape[0], V)
    strides = (tile.stride(0), out.stride(0), scale.scale.stride(0), given.stride(0))
    launch(
        tile_rows_kernel,
        grid_size(programs, C, tile.device),
        (tile, out, rows.indices, ids, bias, table, scale.scale, given),
        (*sizes, *strides, *transform, scale.label_smoothing, scale.z_loss, softmax_scale),
        STATS=stats,
        WRITE=write,
        HAS_TOKENS=rows.indices is not None,
        **flags(softmaxes),
        BLOCK_SIZE=block_size,
        num_warps=num_warps,
    )


def tile_stats(tile: Tensor, rows: Rows, softmaxes: Softmaxes) -> None:
    """Write the statistics of the rows of tile [C, V] into the table."""
    _tile_rows(tile, rows, softmaxes, stats=True, write=NOTHING.value)


def tile_loss(tile: Tensor, rows: Rows, softmaxes: Softmaxes, loss: TokenLoss, out: Tensor) -> None:
    """Write the statistics, and the gradient of the token's loss into out [C, V], in one launch."""
    _tile_rows(tile, rows, softmaxes, stats=True, write=TOKEN_LOSS.value, out=out, loss=loss)


def tile_softmax(tile: Tensor, rows: Rows, softmaxes: Softmaxes, out: Tensor, softmax_scale: float) -> None:
    """Write the statistics, and P times softmax_scale into out [C, V], in one launch."""
    _tile_rows(tile, rows, softmaxes, stats=True, write=SOFTMAX.value, out=out, softmax_scale=softmax_scale)


def tile_grad(
    tile: Tensor,
    rows: Rows,
    softmaxes: Softmaxes,
    coefficients: Tensor,
    out: Tensor,
    *,
    first_column: int = 0,
) -> None:
    """Write the gradient for coefficients [4, C] into out [C, V], from statistics in the table."""
    _tile_rows(
        tile, rows, softmaxes, stats=False, write=GIVEN.value, out=out,
        coefficients=coefficients, first_column=first_column,
    )  # fmt: skip


def kept_grad(
    kept: Tensor, out: Tensor, rows: Rows, softmaxes: Softmaxes, coefficients: Tensor, softmax_scale: float
) -> None:
    """Turn P times softmax_scale [C, V] into the gradient for coefficients [4, C], in the same memory `out`.

    The target's P and log P come from the table, so that P - 1 of a sure token keeps its digits. The other
    columns' P is off by the rounding of what was kept, at most 2^-8 of itself in bf16 and 2^-11 in fp16. The
    entropy's term P plogp log P takes log P from the same number: besides P's relative error, log P is off by
    at most 2^-8, so the term by at most 2^-8 |plogp| P. PyTorch's own logits in bf16 put log P off by up to
    2^-8 |z|. A softcap's slope 1 - h^2 is off by 2^-7 temperature / softcap.
    """
    C, V = kept.shape
    if C == 0:
        return
    ids, _, transform, table, lean = softmaxes
    sizes = (rows.first, ids.shape[0], V, kept.stride(0), coefficients.stride(0))
    launch(
        kept_rows_kernel,
        C,
        (kept, out, rows.indices, ids, table, coefficients),
        (*sizes, *transform, softmax_scale),
        LEAN=lean,
        HAS_TOKENS=rows.indices is not None,
        HAS_SOFTCAP=transform.softcap != 0,
        **launch_options(LAUNCH["kept"], kept),
    )
