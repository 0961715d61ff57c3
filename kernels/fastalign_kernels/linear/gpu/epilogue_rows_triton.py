"""Kernels of epilogue.py over rows: what comes before and after the logits GEMM.

Bytes: `gather_kernel` reads and writes N H elements and reads the sampled columns of the weight;
`dlogits_kernel` reads and writes N H elements, and 2 V bytes twice for each row that needs a pass;
`scatter_kernel` reads 4 N H bytes and writes the gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from ...triton_options import INTERPRETED, as_scalar
from .epilogue_triton import LIFT, LN2, LOWEST, WINDOW, base2


@triton.jit(do_not_specialize=["keep_places"])  # no other kernel may be needed under graph capture
def gather_kernel(
    hidden,  # [N, H], any strides
    weight,  # [V, H], unit stride over H
    ids,  # [N] int64, negative: ignored
    bias,  # [V]; read if HAS_BIAS
    order,  # [N + 1] int32: the tokens that are not ignored first, in order; then the rest; then their number
    count,  # [1] int32, in the host's memory: their number
    stats,  # [7, N] fp32; filled with 0 if PUSH
    gathered,  # [rows, H]: hidden states of tokens order[first : first + rows]
    gathered_ids,  # [rows] int32
    state,  # [4, rows] fp32: the reference, and NaN in row 3 for the z2 of the id
    first,
    rows,
    N,
    V,
    H,
    token_stride,
    hidden_stride,
    weight_stride,
    sample,
    keep_places,  # 1: under graph capture ignored tokens keep their places, and all are counted
    scale_in: tl.float64,
    scale_out: tl.float64,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PUSH: tl.constexpr,  # find the order: a program takes BM tokens. Else read it: a program takes BM rows
    REFERENCE: tl.constexpr,
    NEW: tl.constexpr,  # false: the state is there already
    BM: tl.constexpr,
    SAMPLE: tl.constexpr,
    BK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Bring a block's tokens together. Find each a reference from SAMPLE columns, from `sample` on.

    Nothing of an ignored token is read. With PUSH each program counts the tokens before its own: 4 N^2 / BM
    bytes from L2, 8 MiB at N 8192. A launch of its own, or a sort, would take longer.
    """
    scale_in = as_scalar(scale_in, tl.float32)
    scale_out = as_scalar(scale_out, tl.float32)
    begin_slot = tl.program_id(0) * BM
    slot = begin_slot + tl.arange(0, BM)
    if PUSH:
        token = slot
        listed = token < N
        keep = (tl.load(ids + token, mask=listed, other=-1) >= 0) | (listed & (keep_places > 0))
        keep = keep.to(tl.int32)
        before = tl.full((), 0, tl.int32)
        for begin in range(0, begin_slot, BLOCK):
            earlier = begin + tl.arange(0, BLOCK)
            earlier_id = tl.load(ids + earlier, mask=earlier < begin_slot, other=-1)
            before += tl.sum((earlier_id >= 0).to(tl.int32), 0)
        before = tl.where(keep_places > 0, begin_slot, before)
        rank = before + tl.cumsum(keep, 0) - keep  # kept tokens before this one
        position = tl.where(keep > 0, rank, N - 1 - (token - rank))
        tl.store(order + position, token, mask=listed)
        if begin_slot + BM >= N:
            total = before + tl.sum(keep, 0)
            tl.store(order + N, total)
            tl.store(count, total)
        for stat in range(7):
            tl.store(stats + stat * N + token, 0.0, mask=listed)
        live = keep > 0
    else:
        position = first + slot
        listed = slot < rows
        token = tl.load(order + position, mask=listed, other=0)
        total = tl.load(order + N)
        live = position < total
        if begin_slot == 0:
            tl.store(count, total)
    row = position - first
    inside = listed & (row >= 0) & (row < rows)
    if tl.max(inside.to(tl.int32), 0) > 0:
        live = live & inside
        # one outside [0, V) is in no tile: its z2 stays NaN, or it is ignored. A mere cast makes 2^32 + 5 5.
        token_id = tl.load(ids + token, mask=live, other=-1)
        token_id = tl.where(token_id < V, tl.maximum(token_id, -1), 0x7FFFFFFF).to(tl.int32)
        read = live & (token_id >= 0)  # under graph capture an ignored token has a place, but is not read
        cols = sample + tl.arange(0, SAMPLE)
        acc = tl.zeros((BM, SAMPLE), tl.float32)
        source = hidden + token[:, None].to(tl.int64) * token_stride
        goal = gathered + row[:, None].to(tl.int64) * H
        for begin in range(0, H, BK):
            k = begin + tl.arange(0, BK)
            x = tl.load(source + k[None, :] * hidden_stride, mask=read[:, None] & (k < H)[None, :], other=0.0)
            tl.store(goal + k[None, :], x, mask=inside[:, None] & (k < H)[None, :])
            if REFERENCE and NEW:
                w = tl.load(
                    weight + cols[:, None].to(tl.int64) * weight_stride + k[None, :],
                    mask=(cols < V)[:, None] & (k < H)[None, :],
                    other=0.0,
                )
                acc = tl.dot(x, tl.trans(w), acc)
        reference = tl.full((BM,), LOWEST, tl.float32)
        if REFERENCE and NEW:
            z = base2(acc, bias, cols, V, scale_in, scale_out, HAS_BIAS, HAS_SOFTCAP)
            reference = tl.maximum(tl.max(tl.where((cols < V)[None, :], z, LOWEST), 1), LOWEST) + LIFT
        tl.store(gathered_ids + row, token_id, mask=inside)
        if NEW:
            tl.store(state + row, reference, mask=inside)
            tl.store(state + 3 * rows + row, float("nan"), mask=inside)


@triton.jit
def _log2(x):
    """log2 of e, which has 8 digits: the hardware's, off by 2^-22 of it or of 1, in one instruction."""
    if INTERPRETED:  # knows no libdevice
        return tl.log2(x)
    return libdevice.fast_log2f(x)


@triton.jit
def _write_row(row, V, constant, slope_of_log, uniform, BLOCK: tl.constexpr):
    """A row of e becomes (constant + slope_of_log log2 e) e + uniform."""
    for begin in range(0, V, BLOCK):
        col = begin + tl.arange(0, BLOCK)
        e = tl.load(row + col, mask=col < V, other=0.0).to(tl.float32)
        dz = (constant + slope_of_log * tl.maximum(_log2(e), LOWEST)) * e + uniform
        tl.store(row + col, dz, mask=col < V)


@triton.jit
def dlogits_kernel(
    kept,  # [rows, V] e of forward_kernel, kept_stride apart; becomes dlogits / row_scale
    state,  # [4, rows] fp32 of merge_kernel, then the tiles' max [col_tiles, rows]
    ids,  # [rows] int32
    stats,  # [7, N] fp32, order of rows.Stat
    order,  # [N + 1] int32
    coefficients,  # [4, rows], order of rows.Coefficient; with CROSS_ENTROPY [N], each token's loss scale
    gathered,  # [rows, H] hidden states
    scaled,  # [rows, H], or the same memory: row_scale times them with SCALE_HIDDEN
    row_scale,  # [rows] fp32
    first,
    rows,
    N,
    V,
    H,
    kept_stride,
    coefficient_stride,
    label_smoothing: tl.float64,
    z_loss: tl.float64,
    slope: tl.float64,  # dz/dx without a softcap, nats
    softcap: tl.float64,  # of z in base 2, after the temperature
    CROSS_ENTROPY: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ONE_REFERENCE: tl.constexpr,
    PART: tl.constexpr,  # the columns are a part of the vocabulary; a target outside has an id from V on
    SCALE_HIDDEN: tl.constexpr,
    KEPT_SCALE: tl.constexpr,
    BN: tl.constexpr,
    TILES: tl.constexpr,  # tiles of a row that one step of a pass takes
    BLOCK: tl.constexpr,  # of hidden states
):
    """Turns e into dlogits for any coefficients: dX = row_scale (dlogits W), dW = dlogits^T (row_scale X).

    In most rows P = e 2^(reference - lse) for all columns. Then dlogits = prob P everywhere but at the
    target. So prob and the power go into row_scale, and the target's element is written from fp32.

    A row needs a pass over all its columns if its tiles differ in reference, if its coefficients have a
    plogp or uniform part, with a softcap (its slope differs by column), and in fp16. There log2 e and z
    come from the rounded e, so they are off by up to 2^-8 / ln 2, or 0.006 in base 2. A pass over a row of
    one reference (`_write_row`) takes 7 instructions an element, one that asks each tile for its own 45
    (counted in the machine code for sm_90).
    """
    n = tl.program_id(0)
    slope = as_scalar(slope, tl.float32)
    softcap = as_scalar(softcap, tl.float32)
    token_id = tl.load(ids + n)
    token = tl.load(order + first + n)
    reference = tl.load(state + n)
    row_max = tl.load(state + rows + n)
    logsum = tl.load(state + 2 * rows + n)
    if CROSS_ENTROPY:  # as TokenCrossEntropy has it
        label_smoothing = as_scalar(label_smoothing, tl.float32)
        z_loss = as_scalar(z_loss, tl.float32)
        factor = tl.load(coefficients + token)
        onehot = (label_smoothing - 1.0) * factor
        prob = factor
        if z_loss != 0:
            prob += 2.0 * z_loss * tl.load(stats + 3 * N + token) * factor
        plogp = factor * 0.0
        uniform = -label_smoothing * factor / V
    else:
        onehot = tl.load(coefficients + n)
        prob = tl.load(coefficients + coefficient_stride + n)
        plogp = tl.load(coefficients + 2 * coefficient_stride + n)
        uniform = tl.load(coefficients + 3 * coefficient_stride + n)
    log_p = tl.load(stats + token, mask=token_id >= 0, other=0.0)
    p_less_1 = tl.where(log_p > -0.02, log_p * (1 + log_p * (0.5 + log_p * (1.0 / 6))), tl.exp(log_p) - 1.0)
    finite = tl.maximum(log_p, LOWEST)
    at_id = prob * p_less_1 + (prob + onehot) + (1.0 + p_less_1) * plogp * finite + uniform
    at_id = tl.where(log_p == log_p, at_id, log_p)
    row = kept + n.to(tl.int64) * kept_stride
    valid = (token_id >= 0) & (token_id < V)

    scale = prob * slope * tl.exp2((reference - row_max) - logsum)
    # The target's element is onehot / prob / P at most: it and the scale stay far inside of bf16's range.
    in_range = (tl.abs(prob) * 1048576.0 >= tl.abs(onehot)) & ((tl.abs(scale) > 1e-30) | (prob == 0))
    one_reference = row_max <= reference + WINDOW
    simple = (plogp == 0) & (uniform == 0) & in_range & one_reference
    if token_id < 0:  # has a place only under graph capture; its e may be anything
        scale = tl.full((), 0.0, tl.float32)
        for begin in range(0, V, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            tl.store(row + at, 0.0, mask=at < V)
    elif ONE_REFERENCE and simple:
        kept_id = (at_id * slope / scale).to(kept.dtype.element_ty)
        exact = valid & (tl.abs(at_id) > 0.5 * tl.abs(prob)) & (scale != 0)
        tl.store(row + token_id, kept_id, mask=valid & (scale != 0))
        if not PART:
            # The factor takes up the target's rounding where that element is most of the gradient.
            scale = tl.where(exact, at_id * slope / kept_id.to(tl.float32), scale)
    elif ONE_REFERENCE and one_reference:
        shift = (reference - row_max) - logsum
        factor = tl.exp2(shift) * slope
        _write_row(
            row,
            V,
            factor * (prob + plogp * (shift * LN2)),
            factor * (plogp * LN2),
            uniform * slope,
            2 * TILES * BN,
        )
        tl.debug_barrier()  # so that the target's element is written last
        tl.store(row + token_id, at_id * slope, mask=valid)
        scale = tl.full((), 1.0, tl.float32)
    else:
        scale = tl.full((), 1.0, tl.float32)
        col = tl.arange(0, BN)
        slot = tl.arange(0, TILES)
        if HAS_SOFTCAP:
            tanh_id = ((log_p / LN2 + logsum) + row_max) / softcap
            at_id *= (1.0 - tanh_id) * (1.0 + tanh_id)
        for begin in range(0, tl.cdiv(V, BN), TILES):
            tile = begin + slot
            maximum = state + (4 + tile.to(tl.int64)) * rows + n
            tile_max = tl.load(maximum, mask=tile < tl.cdiv(V, BN), other=LOWEST)
            r = tl.where(tile_max > reference + WINDOW, tile_max, reference)
            cols = tile[:, None] * BN + col[None, :]
            inside = cols < V
            e = tl.load(row + cols, mask=inside, other=0.0).to(tl.float32) * (1.0 / KEPT_SCALE)
            log2_p = tl.maximum(tl.log2(e), LOWEST) + ((r - row_max) - logsum)[:, None]
            p = e * tl.exp2((r - row_max) - logsum)[:, None]
            dz = p * (prob + plogp * (log2_p * LN2)) + uniform
            if HAS_SOFTCAP:
                tanh = tl.minimum(tl.maximum(((log2_p + logsum) + row_max) / softcap, -1.0), 1.0)
                dz *= (1.0 - tanh) * (1.0 + tanh)
            dz = tl.where(cols == token_id, at_id, dz)
            tl.store(row + cols, dz * slope, mask=inside)
    if ONE_REFERENCE:
        tl.store(row_scale + n, scale)
        if SCALE_HIDDEN:
            for begin in range(0, H, BLOCK):
                k = begin + tl.arange(0, BLOCK)
                x = tl.load(gathered + n.to(tl.int64) * H + k, mask=k < H, other=0.0).to(tl.float32)
                tl.store(scaled + n.to(tl.int64) * H + k, x * scale, mask=k < H)


@triton.jit
def scatter_kernel(
    source,  # [rows, H] fp32, or hidden's dtype
    row_scale,  # [rows] fp32; read if SCALED
    order,  # [N + 1] int32
    out,  # [N, H]
    first,
    H,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[order[first + n]] = row_scale[n] source[n], rounded once."""
    n = tl.program_id(0)
    token = tl.load(order + first + n).to(tl.int64)
    scale = 1.0
    if SCALED:
        scale = tl.load(row_scale + n)
    for begin in range(0, H, BLOCK):
        k = begin + tl.arange(0, BLOCK)
        x = tl.load(source + n.to(tl.int64) * H + k, mask=k < H, other=0.0).to(tl.float32)
        tl.store(out + token * H + k, x * scale, mask=k < H)
