"""The tail's kernels between the logits GEMM and the gradients' GEMMs, in the order of tail.py.

`kept` is what the engine keeps of the softmax, e in 16 bits with P = e 2^shift: e and the shift of
epilogue_triton.py. Tokens come in parts, vocabulary ids in column tiles of TILE.

Bytes: `columns_kernel` and `collect_kernel` each read kept once, 2 N V. The latter writes 2 bytes for each
token and column that it keeps. The rest touch a few numbers a column.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_options import as_scalar
from .epilogue_triton import LN2, LOWEST, WINDOW

# Of the matrices of the rank-1 parts: one for each part of a block, at most 15, and one for label smoothing.
MATRIX_ROWS = tl.constexpr(16)


@triton.jit
def _shift(state, tile, row, inside, rows):
    """log2(P / e) of rows in a tile of columns."""
    reference = tl.load(state + row, mask=inside, other=0.0)
    row_max = tl.load(state + rows + row, mask=inside, other=0.0)
    logsum = tl.load(state + 2 * rows + row, mask=inside, other=0.0)
    tile_max = tl.load(state + (4 + tile.to(tl.int64)) * rows + row, mask=inside, other=0.0)
    return (tl.where(tile_max > reference + WINDOW, tile_max, reference) - row_max) - logsum


@triton.jit
def columns_kernel(
    # pointers
    kept,  # [rows, V]
    state,  # [4, rows] fp32 of merge_kernel, then the largest z2 of each tile of BN columns [tiles, rows]
    ids,  # [rows] int32
    stats,  # [7, N] fp32
    order,  # [N + 1] int32
    margins,  # [rows] fp32, or None: powers of 2 within which a column may be a token's largest
    largest,  # [parts, V] fp32: largest P of a part's tokens, 2 for the tokens' ids and such columns
    sums,  # [parts, V] fp32: sum over a part's tokens of P, under a softcap of P times the slope of tanh
    # sizes
    first,
    rows,
    live,
    N,
    V,
    part_rows,
    # strides
    kept_stride,
    # options
    inverse_cap: tl.float64,  # temperature / softcap
    # constants
    HAS_SOFTCAP: tl.constexpr,
    KEPT_SCALE: tl.constexpr,
    BN: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The sums of BN columns over the tokens of a part."""
    tile = tl.program_id(0)
    part = tl.program_id(1)
    inverse_cap = as_scalar(inverse_cap, tl.float32)
    col = tile * BN + tl.arange(0, BN)
    inside = col < V
    top = tl.zeros((ROWS, BN), tl.float32)
    total = tl.zeros((ROWS, BN), tl.float32)
    end = tl.minimum((part + 1) * part_rows, live)
    for begin in tl.range(part * part_rows, end, ROWS, num_stages=STAGES):
        row = begin + tl.arange(0, ROWS)
        here = row < end
        token_id = tl.load(ids + row, mask=here, other=-1)
        shift = _shift(state, tile, row, here, rows)
        at = kept + row[:, None].to(tl.int64) * kept_stride + col[None, :]
        e = tl.load(at, mask=here[:, None] & inside[None, :], other=0.0).to(tl.float32)
        p = e * (tl.exp2(shift) * (1.0 / KEPT_SCALE))[:, None]
        sure = col[None, :] == token_id[:, None]
        if margins is not None:
            logsum = tl.load(state + 2 * rows + row, mask=here, other=0.0)
            margin = tl.load(margins + row, mask=here, other=0.0)
            sure |= p >= tl.exp2(-logsum - margin)[:, None]
        top = tl.maximum(top, tl.where(sure, 2.0, p))
        if HAS_SOFTCAP:
            token = tl.load(order + first + row, mask=here, other=0)
            lse = tl.load(stats + 3 * N + token, mask=here, other=0.0)
            tanh = (tl.log2(p) * LN2 + lse[:, None]) * inverse_cap
            tanh = tl.minimum(tl.maximum(tanh, -1.0), 1.0)
            p *= (1.0 - tanh) * (1.0 + tanh)
        total += p
    tl.store(largest + as_scalar(part, tl.int64) * V + col, tl.max(top, 0), mask=inside)
    tl.store(sums + as_scalar(part, tl.int64) * V + col, tl.sum(total, 0), mask=inside)


@triton.jit
def rank_kernel(
    largest,  # [parts, V] fp32
    ranks,  # [V] int16
    V,
    parts,
    tail_eps: tl.float64,
    BLOCK: tl.constexpr,
):
    """Where a column stands in the Gray code of the parts that keep it, 0 if none does.

    Neighbours in this order are kept by nearly the same parts. Of SmolLM2-135M's columns at 2^-12 with 8
    parts, tiles of 128 keep 22 % of all elements, where single columns would keep 19 % and the columns that
    any part keeps are 37 %.
    """
    tail_eps = as_scalar(tail_eps, tl.float32)
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = col < V
    rank = tl.zeros((BLOCK,), tl.int32)
    for part in range(parts):
        p = tl.load(largest + as_scalar(part, tl.int64) * V + col, mask=inside, other=0.0)
        rank |= (p > tail_eps).to(tl.int32) << part
    rank ^= rank >> 1
    rank ^= rank >> 2
    rank ^= rank >> 4
    rank ^= rank >> 8
    tl.store(ranks + col, rank.to(tl.int16), mask=inside)


@triton.jit
def _either(left, right):
    return left | right


@triton.jit
def place_kernel(
    # pointers
    ranks,  # [V] int16, descending
    columns,  # [V] int64, the columns in that order
    places,  # [V] int32: where a column stands in the order
    column_parts,  # [V] int32: the parts that keep a column, a bit each
    tile_parts,  # [tiles, 16] int32: numbers of the parts that keep a tile
    tile_counts,  # [tiles] int32: how many those are
    tile_bits,  # [tiles] int32: the same, a bit each
    sums,  # [16, V]: q of each part, which becomes 0 where the part keeps the column; then ones
    by_place,  # [V, 16]: the same by place, 0 in the other numbers
    # sizes
    V,
    parts,
    # constants
    TILE: tl.constexpr,
):
    """Record which parts keep a tile: those that keep one of its columns. GEMMs take whole tiles anyway."""
    tile = tl.program_id(0)
    at = tile * TILE + tl.arange(0, TILE)
    inside = at < V
    rank = tl.load(ranks + at, mask=inside, other=0).to(tl.int32)
    column = tl.load(columns + at, mask=inside, other=0)
    bits = tl.reduce(rank ^ (rank >> 1), 0, _either)
    tl.store(places + column, at, mask=inside)
    tl.store(column_parts + column, tl.zeros((TILE,), tl.int32) + bits, mask=inside)
    count = bits * 0
    for part in range(parts):
        keeps = (bits >> part) & 1
        tl.store(tile_parts + tile * 16 + count, part, mask=keeps == 1)
        count += keeps
    tl.store(tile_counts + tile, count)
    tl.store(tile_bits + tile, bits)
    number = tl.arange(0, MATRIX_ROWS)
    mask = inside[:, None] & (number < parts)[None, :]
    source = sums + number[None, :].to(tl.int64) * V + column[:, None]
    dropped = tl.where(((bits >> number) & 1)[None, :] == 1, 0.0, tl.load(source, mask=mask, other=0.0))
    q = tl.where((number == parts)[None, :], 1.0, dropped)
    tl.store(source, q, mask=inside[:, None] & (number <= parts)[None, :])
    tl.store(by_place + at[:, None].to(tl.int64) * MATRIX_ROWS + number[None, :], q, mask=inside[:, None])


@triton.jit
def list_kernel(
    tile_bits,  # [tiles] int32
    lists,  # [parts, tiles] int32: the tiles that a part keeps
    counts,  # [parts + 1] int32: how many those are; last, the tiles that some part keeps
    tiles,
    parts,
    BLOCK: tl.constexpr,
):
    part = tl.program_id(0)
    count = tl.full((), 0, tl.int32)
    for begin in range(0, tiles, BLOCK):
        tile = begin + tl.arange(0, BLOCK)
        bits = tl.load(tile_bits + tile, mask=tile < tiles, other=0)
        keeps = tl.where(part == parts, (bits != 0).to(tl.int32), (bits >> part) & 1)
        rank = count + tl.cumsum(keeps, 0) - keeps
        tl.store(lists + part * tiles + rank, tile, mask=(keeps == 1) & (part < parts))
        count += tl.sum(keeps, 0)
    tl.store(counts + part, count)


@triton.jit
def token_terms(
    # pointers
    stats,  # [7, N] fp32
    coefficients,  # [4, live], order of rows.Coefficient; with CROSS_ENTROPY [N], each token's loss scale
    # of tokens
    token,  # indices into stats
    row,  # and into coefficients
    here,
    # sizes
    N,
    V,
    coefficient_stride,
    # options
    label_smoothing,
    z_loss,
    slope,
    inverse_cap,
    # constants
    CROSS_ENTROPY: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PLOGP: tl.constexpr,
):
    """What dlogits of tokens follow from: the coefficients of P, of P log P and of every column, and the
    target's dlogit."""
    if CROSS_ENTROPY:  # as TokenCrossEntropy has it
        label_smoothing = as_scalar(label_smoothing, tl.float32)
        factor = tl.load(coefficients + token, mask=here, other=0.0)
        onehot = (label_smoothing - 1.0) * factor
        lse_grad = 2.0 * as_scalar(z_loss, tl.float32) * tl.load(stats + 3 * N + token, mask=here, other=0.0)
        prob = factor + lse_grad * factor
        plogp = factor * 0.0
        uniform = -label_smoothing * factor / V
    else:
        onehot = tl.load(coefficients + row, mask=here, other=0.0)
        prob = tl.load(coefficients + coefficient_stride + row, mask=here, other=0.0)
        plogp = tl.load(coefficients + 2 * coefficient_stride + row, mask=here, other=0.0)
        uniform = tl.load(coefficients + 3 * coefficient_stride + row, mask=here, other=0.0)
    # the target's element from the statistics: P - 1 of a sure token keeps its digits
    log_p = tl.load(stats + token, mask=here, other=0.0)
    p_less_1 = tl.where(log_p > -0.02, log_p * (1 + log_p * (0.5 + log_p * (1.0 / 6))), tl.exp(log_p) - 1.0)
    at_id = prob * p_less_1 + (prob + onehot)
    if PLOGP:
        at_id += (1.0 + p_less_1) * plogp * tl.maximum(log_p, LOWEST)
    if HAS_SOFTCAP:
        lse = tl.load(stats + 3 * N + token, mask=here, other=0.0)
        tanh_id = (log_p + lse) * inverse_cap
        at_id *= (1.0 - tanh_id) * (1.0 + tanh_id)
    at_id = tl.where(log_p == log_p, at_id * slope, log_p)
    return prob, plogp, uniform, at_id


@triton.jit
def collect_kernel(
    # pointers
    kept,  # [rows, V]
    state,  # [4, rows] fp32 of merge_kernel, then the largest z2 of each tile of BN columns [tiles, rows]
    ids,  # [rows] int32
    stats,  # [7, N] fp32
    order,  # [N + 1] int32
    coefficients,  # [4, live], order of rows.Coefficient; with CROSS_ENTROPY [N], each token's loss scale
    places,  # [V] int32
    column_parts,  # [V] int32
    grad,  # [tiles that are kept * TILE, live] of kept's dtype: dlogits of kept columns, by place
    dropped,  # [slices, 16, live] fp32: by part, sums of a token's dropped dlogits; then what smoothing adds
    # sizes
    first,
    rows,
    live,
    N,
    V,
    part_rows,
    parts,
    slice_columns,  # columns of a program
    # strides
    kept_stride,
    coefficient_stride,
    grad_stride,
    # options
    label_smoothing: tl.float64,
    z_loss: tl.float64,
    slope: tl.float64,  # dz/dx without a softcap
    inverse_cap: tl.float64,  # temperature / softcap
    # constants
    CROSS_ENTROPY: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PLOGP: tl.constexpr,  # coefficients may have that part
    KEPT_SCALE: tl.constexpr,
    BN: tl.constexpr,
    COLUMNS: tl.constexpr,  # at a time; BN or a part of it
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dlogits of the kept columns of ROWS tokens of one part, rounded once, and the sums of the rest.

    A kept column is written as a line of ROWS tokens. In rows of columns each number would be a transaction
    of its own: an H200 then took 19 ps a number beside 1.3 ms at N 8192 and V 151936.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = row < live
    part = tl.program_id(0) * ROWS // part_rows
    slope = as_scalar(slope, tl.float32)
    inverse_cap = as_scalar(inverse_cap, tl.float32)
    token_id = tl.load(ids + row, mask=here, other=-1)
    token = tl.load(order + first + row, mask=here, other=0)
    prob, plogp, uniform, at_id = token_terms(
        stats,
        coefficients,
        token,
        row,
        here,
        N,
        V,
        coefficient_stride,
        label_smoothing,
        z_loss,
        slope,
        inverse_cap,
        CROSS_ENTROPY,
        HAS_SOFTCAP,
        PLOGP,
    )
    lse = tl.load(stats + 3 * N + token, mask=here, other=0.0)

    reference = tl.load(state + row, mask=here, other=0.0)
    below = tl.load(state + rows + row, mask=here, other=0.0)
    logsum = tl.load(state + 2 * rows + row, mask=here, other=0.0)
    rest = tl.zeros((ROWS,), tl.float32)
    begin = tl.program_id(1) * slice_columns
    end = tl.minimum(begin + slice_columns, V)
    for first_col in tl.range(begin, end, COLUMNS, num_stages=STAGES):
        tile_max = tl.load(
            state + (4 + as_scalar(first_col // BN, tl.int64)) * rows + row, mask=here, other=0.0
        )
        shift = (tl.where(tile_max > reference + WINDOW, tile_max, reference) - below) - logsum
        col = first_col + tl.arange(0, COLUMNS)
        inside = col < V
        place = tl.load(places + col, mask=inside, other=0)
        keeps = ((tl.load(column_parts + col, mask=inside, other=0) >> part) & 1) == 1
        at = kept + row[:, None].to(tl.int64) * kept_stride + col[None, :]
        e = tl.load(at, mask=here[:, None] & inside[None, :], other=0.0).to(tl.float32)
        p = e * (tl.exp2(shift) * (1.0 / KEPT_SCALE))[:, None]
        if PLOGP or HAS_SOFTCAP:
            logp = tl.maximum(tl.log2(p), LOWEST) * LN2
            over_p = tl.zeros_like(p) + (prob * slope)[:, None]
            if PLOGP:
                over_p += (plogp * slope)[:, None] * logp
            if HAS_SOFTCAP:
                tanh = tl.minimum(tl.maximum((logp + lse[:, None]) * inverse_cap, -1.0), 1.0)
                over_p *= (1.0 - tanh) * (1.0 + tanh)
            dz = p * over_p
        else:
            dz = p * (prob * slope)[:, None]
        rest += tl.sum(tl.where(keeps[None, :], 0.0, dz), 1)
        goal = grad + place[None, :].to(tl.int64) * grad_stride + row[:, None]
        # up to grad_stride, a multiple of 16, so that a thread writes 16 bytes at a time
        tl.store(goal, dz.to(grad.dtype.element_ty), mask=(row < grad_stride)[:, None] & keeps[None, :])
    # The target's element. Its column is kept, and this program has written it if it lies in its slice.
    tl.debug_barrier()
    here_id = here & (token_id >= begin) & (token_id < begin + slice_columns) & (token_id < V)
    place_id = tl.load(places + token_id, mask=here_id, other=0).to(tl.int64)
    tl.store(grad + place_id * grad_stride + row, at_id.to(grad.dtype.element_ty), mask=here_id)
    sums = dropped + tl.program_id(1).to(tl.int64) * MATRIX_ROWS * live + row
    tl.store(sums + as_scalar(part, tl.int64) * live, rest, mask=here)
    if begin == 0:
        tl.store(sums + as_scalar(parts, tl.int64) * live, uniform * slope, mask=here)
