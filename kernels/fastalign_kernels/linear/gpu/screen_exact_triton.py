"""The kernels of screen.py between the 8-bit logits and the gradients' GEMMs: exact logits of the
columns that are kept, and statistics of both together.

e, state and shifts are those of epilogue_triton.py, made of 8-bit logits; lse8 is their logsumexp. p is
2^(z2 - lse8) in all of this, so that sums over kept columns (exact z2) and over the rest (e) add up to

    S = 2^(lse - lse8),    P = p / S.

The target is left out of the sums and added in fp64, as in merge_kernel.

Bytes: `rest_kernel` reads e once, 2 N V. `exact_kernel` is a GEMM over the kept tiles and writes 2 bytes for
each of their elements; `finish_kernel` reads and writes these. The rest touch a few numbers a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_options import as_scalar
from .epilogue_triton import LN2, LOWEST, WINDOW, halves
from .tail_triton import token_terms


@triton.jit
def rest_kernel(
    # pointers
    kept,  # [rows, V] e
    state,  # [4, rows] fp32 of merge_kernel, then the largest z2 of each tile of BN columns [tiles, rows]
    column_parts,  # [V] int32
    bounds,  # [rows] fp32 in powers of 2, or None: |z2 - z2 of 8 bits| is at most that
    sums,  # [slices, 3, live] fp32, out: of columns that a token's part does not keep the sum of p; of
    # p log2 p (FULL); the number of columns whose probability may exceed eps by the bound
    # sizes
    rows,
    live,
    V,
    part_rows,
    slice_columns,  # columns of a program
    # strides
    kept_stride,
    # options
    eps: tl.float64,
    # constants
    FULL: tl.constexpr,
    KEPT_SCALE: tl.constexpr,
    BN: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sums over the columns that are not kept, of ROWS tokens of one part."""
    eps = as_scalar(eps, tl.float32)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = row < live
    part = tl.program_id(0) * ROWS // part_rows
    reference = tl.load(state + row, mask=here, other=0.0)
    below = tl.load(state + rows + row, mask=here, other=0.0)
    logsum = tl.load(state + 2 * rows + row, mask=here, other=0.0)
    mass = tl.zeros((ROWS,), tl.float32)
    weighted = tl.zeros((ROWS,), tl.float32)
    opened = tl.zeros((ROWS,), tl.float32)
    begin = tl.program_id(1) * slice_columns
    end = tl.minimum(begin + slice_columns, V)
    for first_col in tl.range(begin, end, COLUMNS, num_stages=STAGES):
        tile_max = tl.load(
            state + (4 + as_scalar(first_col // BN, tl.int64)) * rows + row, mask=here, other=0.0
        )
        shift = (tl.where(tile_max > reference + WINDOW, tile_max, reference) - below) - logsum
        col = first_col + tl.arange(0, COLUMNS)
        inside = col < V
        keeps = ((tl.load(column_parts + col, mask=inside, other=-1) >> part) & 1) == 1
        at = kept + row[:, None].to(tl.int64) * kept_stride + col[None, :]
        e = tl.load(at, mask=here[:, None] & inside[None, :], other=0.0).to(tl.float32)
        p = tl.where(keeps[None, :], 0.0, e * (tl.exp2(shift) * (1.0 / KEPT_SCALE))[:, None])
        mass += tl.sum(p, 1)
        if FULL:
            weighted += tl.sum(p * tl.maximum(tl.log2(p), LOWEST), 1)
        if bounds is not None:
            bound = tl.load(bounds + row, mask=here, other=0.0)
            opened += tl.sum((p * tl.exp2(bound)[:, None] > eps).to(tl.float32), 1)
    out = sums + tl.program_id(1).to(tl.int64) * 3 * live + row
    tl.store(out, mass, mask=here)
    tl.store(out + live, weighted, mask=here)
    tl.store(out + 2 * live, opened, mask=here)


@triton.jit
def _write_part(
    acc,  # [TILE, tokens] products of a tile
    exact,
    ids,
    state,
    partial,  # of the tile
    column,  # [TILE], -1 beyond the vocabulary
    place0,
    row0,
    rows,
    live,
    plane,
    scale,
    FULL: tl.constexpr,
):
    """p and the numbers of some tokens; the arguments are those of `exact_kernel`."""
    row = row0 + tl.arange(0, acc.shape[1])
    here = row < live
    token_id = tl.load(ids + row, mask=here, other=-2)
    lse8 = tl.load(state + rows + row, mask=here, other=0.0)
    lse8 += tl.load(state + 2 * rows + row, mask=here, other=0.0)
    z = tl.where((column >= 0)[:, None], acc * scale, LOWEST)
    tl.store(partial + row, tl.max(z, 0), mask=here)
    hit = column[:, None] == token_id[None, :]
    z_id = tl.max(tl.where(hit, z, LOWEST), 0)
    tl.store(state + 3 * rows + row, z_id, mask=here & (z_id > LOWEST))
    z -= lse8[None, :]
    p = tl.exp2(z)
    exact.store([place0, row0], p.to(exact.dtype))
    p = tl.where(hit, 0.0, p)
    tl.store(partial + plane + row, tl.sum(p, 0), mask=here)
    if FULL:
        tl.store(partial + 2 * plane + row, tl.sum(p * tl.maximum(z, LOWEST), 0), mask=here)


@triton.jit
def _write_parts(
    acc,
    exact,
    ids,
    state,
    partial,
    column,
    place0,
    row0,
    rows,
    live,
    plane,
    scale,
    FULL: tl.constexpr,
):
    """`_write_part` of both halves of acc."""
    left, right = halves(acc)
    _write_part(left, exact, ids, state, partial, column, place0, row0, rows, live, plane, scale, FULL)
    row0 += acc.shape[1] // 2
    _write_part(right, exact, ids, state, partial, column, place0, row0, rows, live, plane, scale, FULL)


@triton.jit
def exact_kernel(
    # descriptors
    weight,  # [columns, H] in blocks [TILE, BK]: the weight's rows by place
    hidden,  # [rows, H] in blocks [BM, BK]
    exact,  # [columns, line] in blocks [TILE, BM / 4], out: p by place, rounded once
    # pointers
    columns,  # [V] int64, by place
    lists,  # [parts, tiles] int32: the tiles of each part
    counts,  # [parts + 1] int32: how many
    ids,  # [rows] int32
    state,  # [4, rows] fp32; row 3 becomes the exact z2 of the id
    partial,  # [3, tiles that are kept, rows] fp32, out: of a tile the largest z2, the sum of p without the
    # target's, that of p log2 p
    # sizes
    rows,
    live,
    V,
    H,
    part_rows,
    parts,
    tiles,
    kept_tiles,
    # options
    scale: tl.float64,  # of z in base 2
    # constants
    FULL: tl.constexpr,
    TILE: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Exact logits of the tiles that a token's part keeps."""
    scale = as_scalar(scale, tl.float32)
    plane = as_scalar(kept_tiles, tl.int64) * rows
    start = tl.program_id(0)
    for part in range(parts):
        row_tiles = tl.cdiv(tl.minimum(part_rows, live - part * part_rows), BM)
        work = tl.load(counts + part) * row_tiles
        for number in range(start, work, PROGRAMS):
            tile = tl.load(lists + part * tiles + number // row_tiles)
            place0 = tile * TILE
            row0 = part * part_rows + number % row_tiles * BM
            acc = tl.zeros((TILE, BM), tl.float32)
            for k in range(tl.cdiv(H, BK)):
                acc = tl.dot(weight.load([place0, k * BK]), hidden.load([row0, k * BK]).T, acc)
            place = place0 + tl.arange(0, TILE)
            column = tl.load(columns + place, mask=place < V, other=-1)
            # a quarter of the tokens at a time: the whole tile's numbers would spill
            at = partial + tile.to(tl.int64) * rows
            left, right = halves(acc)
            _write_parts(left, exact, ids, state, at, column, place0, row0, rows, live, plane, scale, FULL)
            row0 += BM // 2
            _write_parts(right, exact, ids, state, at, column, place0, row0, rows, live, plane, scale, FULL)
        start = (start + PROGRAMS - work % PROGRAMS) % PROGRAMS


@triton.jit
def merge_exact_kernel(
    # pointers
    rest,  # [slices, 3, live] fp32 of rest_kernel
    partial,  # [3, tiles that are kept, rows] fp32 of exact_kernel
    lists,  # [parts, tiles] int32
    counts,  # [parts + 1] int32
    ids,  # [rows] int32
    order,  # [N + 1] int32
    state,  # [4, rows] fp32
    stats,  # [7, N] fp32: those of the 8-bit logits, which become those of both
    dropped,  # [3, live] fp32, out: log2 S; sum of P over the columns that are not kept, and of P log P
    # sizes
    first,
    rows,
    live,
    N,
    part_rows,
    tiles,
    kept_tiles,
    slices,
    # constants
    FULL: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = row < live
    part = tl.program_id(0) * ROWS // part_rows
    plane = as_scalar(kept_tiles, tl.int64) * rows
    top = tl.full((TILES, ROWS), LOWEST, tl.float32)
    mass = tl.zeros((TILES, ROWS), tl.float64)
    weighted = tl.zeros((TILES, ROWS), tl.float64)
    count = tl.load(counts + part)
    for begin in range(0, count, TILES):
        slot = begin + tl.arange(0, TILES)
        tile = tl.load(lists + part * tiles + slot, mask=slot < count, other=0)
        at = partial + tile[:, None].to(tl.int64) * rows + row[None, :]
        mask = (slot < count)[:, None] & here[None, :]
        top = tl.maximum(top, tl.load(at, mask=mask, other=LOWEST))
        mass += tl.load(at + plane, mask=mask, other=0.0).to(tl.float64)
        if FULL:
            weighted += tl.load(at + 2 * plane, mask=mask, other=0.0).to(tl.float64)
    row_max = tl.max(top, 0)
    rest_mass = tl.zeros((ROWS,), tl.float64)
    rest_weighted = tl.zeros((ROWS,), tl.float64)
    for part_of_row in range(slices):
        at = rest + as_scalar(part_of_row, tl.int64) * 3 * live + row
        rest_mass += tl.load(at, mask=here, other=0.0).to(tl.float64)
        rest_weighted += tl.load(at + live, mask=here, other=0.0).to(tl.float64)
    token_id = tl.load(ids + row, mask=here, other=-1)
    z_id = tl.load(state + 3 * rows + row, mask=here, other=0.0)
    lse8 = tl.load(state + rows + row, mask=here, other=0.0).to(tl.float64)
    lse8 += tl.load(state + 2 * rows + row, mask=here, other=0.0).to(tl.float64)
    # relative to the largest logit, so that the target's term is 1 where it is the largest
    below = z_id - row_max
    e_id = tl.exp2(below).to(tl.float64)
    from_lse8 = (lse8 - row_max.to(tl.float64)) * LN2
    total = (tl.sum(mass, 0) + rest_mass) * tl.exp(from_lse8)
    logsum = tl.log(total + e_id)
    log_s = logsum - from_lse8
    token = tl.load(order + first + row, mask=here, other=0)
    out = stats + token
    largest = row_max * LN2
    counted = here & (token_id >= 0)
    tl.store(out, (below.to(tl.float64) * LN2 - logsum).to(tl.float32), mask=counted)
    lse = largest.to(tl.float64) + logsum
    if FULL:
        mean = tl.load(out + N, mask=counted, other=0.0).to(tl.float64)
        tl.store(out + N, (mean - log_s).to(tl.float32), mask=counted)
        # the sum of p log p, all relative to lse8
        log_p_id = below.to(tl.float64) * LN2 - from_lse8
        at_id = tl.where(e_id == 0, 0.0, tl.exp(log_p_id) * log_p_id)
        all_weighted = (tl.sum(weighted, 0) + rest_weighted) * LN2 + at_id
        tl.store(out + 2 * N, (log_s - all_weighted * tl.exp(-log_s)).to(tl.float32), mask=counted)
    tl.store(out + 3 * N, lse.to(tl.float32), mask=counted)
    tl.store(out + 4 * N, largest, mask=counted)
    tl.store(out + 5 * N, logsum.to(tl.float32), mask=counted)
    tl.store(out + 6 * N, (z_id == row_max).to(tl.float32), mask=counted)
    share = tl.exp(-log_s)
    tl.store(dropped + row, (log_s / LN2).to(tl.float32), mask=here)
    tl.store(dropped + live + row, (rest_mass * share).to(tl.float32), mask=here)
    of_logs = (rest_weighted * LN2 - rest_mass * log_s) * share
    tl.store(dropped + 2 * live + row, of_logs.to(tl.float32), mask=here)


@triton.jit
def finish_kernel(
    # pointers
    grad,  # [columns, live], grad_stride apart, by place: p of exact_kernel, which becomes dlogits
    dropped,  # [3, live] fp32 of merge_exact_kernel
    ids,  # [rows] int32
    stats,  # [7, N] fp32
    order,  # [N + 1] int32
    coefficients,  # [4, live], order of rows.Coefficient; with CROSS_ENTROPY [N], each token's loss scale
    columns,  # [V] int64, by place
    column_parts,  # [V] int32
    sums,  # [16, live] fp32, zeros: by part, sums of a token's dropped dlogits; then what smoothing adds
    # sizes
    first,
    live,
    N,
    V,
    part_rows,
    parts,
    # strides
    coefficient_stride,
    grad_stride,
    # options
    label_smoothing: tl.float64,
    z_loss: tl.float64,
    slope: tl.float64,  # dz/dx
    # constants
    CROSS_ENTROPY: tl.constexpr,
    PLOGP: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """dlogits of a tile of kept columns for ROWS tokens of one part, rounded once more."""
    tile = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    here = row < live
    part = tl.program_id(1) * ROWS // part_rows
    place = tile * TILE + tl.arange(0, TILE)
    column = tl.load(columns + place, mask=place < V, other=0)
    bits = tl.load(column_parts + tl.load(columns + tile * TILE))
    slope = as_scalar(slope, tl.float32)
    keeps = ((bits >> part) & 1) == 1
    if keeps | (tile == 0):
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
            0.0,
            CROSS_ENTROPY,
            False,
            PLOGP,
        )
        if tile == 0:
            rest = prob * tl.load(dropped + live + row, mask=here, other=0.0)
            if PLOGP:
                rest += plogp * tl.load(dropped + 2 * live + row, mask=here, other=0.0)
            tl.store(sums + as_scalar(part, tl.int64) * live + row, rest * slope, mask=here)
            tl.store(sums + as_scalar(parts, tl.int64) * live + row, uniform * slope, mask=here)
        if keeps:
            log_s = tl.load(dropped + row, mask=here, other=0.0)
            at = grad + place[:, None].to(tl.int64) * grad_stride + row[None, :]
            mask = (place < V)[:, None] & (row < grad_stride)[None, :]
            P = tl.load(at, mask=mask, other=0.0).to(tl.float32) * tl.exp2(-log_s)[None, :]
            over_p = tl.zeros_like(P) + (prob * slope)[None, :]
            if PLOGP:
                over_p += (plogp * slope)[None, :] * (tl.maximum(tl.log2(P), LOWEST) * LN2)
            dz = tl.where(column[:, None] == token_id[None, :], at_id[None, :], P * over_p)
            tl.store(at, dz.to(grad.dtype.element_ty), mask=mask)
