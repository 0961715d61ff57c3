"""The tail's GEMMs: dX and dW of the column tiles that a part of the tokens keeps, with the rank-1 parts of
the rest in the epilogue, and the thin products these need.

`grad` [columns, tokens] holds dlogits by the columns' place in an order (tail_triton.py: `rank_kernel`).
Only tiles that a token's part keeps are read. Left and right are summed in fp32.

Bytes: dX and dW are each written once, in their final dtype. `thin_kernel` reads its right factor once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .epilogue_triton import halves
from .tail_triton import MATRIX_ROWS


@triton.jit
def thin_kernel(
    left,  # [16, K] fp32
    right,  # [K, H], unit stride over H
    out,  # [splits, 16, H] fp32
    K,
    H,
    right_stride,
    chunk,  # of K a program sums
    BK: tl.constexpr,
    BH: tl.constexpr,
):
    """A part of left right. In 16 bits left is the sum of two factors, so that it keeps its digits."""
    h = tl.program_id(0) * BH + tl.arange(0, BH)
    split = tl.program_id(1)
    m = tl.arange(0, MATRIX_ROWS)
    acc = tl.zeros((MATRIX_ROWS, BH), tl.float32)
    for begin in range(split * chunk, tl.minimum((split + 1) * chunk, K), BK):
        k = begin + tl.arange(0, BK)
        here = k < tl.minimum((split + 1) * chunk, K)
        a = tl.load(left + m[:, None].to(tl.int64) * K + k[None, :], mask=here[None, :], other=0.0)
        at = right + k[:, None].to(tl.int64) * right_stride + h[None, :]
        b = tl.load(at, mask=here[:, None] & (h < H)[None, :], other=0.0)
        if right.dtype.element_ty == tl.bfloat16:
            high = a.to(tl.bfloat16)
            acc = tl.dot(high, b, acc)
            acc = tl.dot((a - high.to(tl.float32)).to(tl.bfloat16), b, acc)
        else:  # fp16 has too few exponents for a
            acc = tl.dot(a, b.to(tl.float32), acc, input_precision="tf32x3")
    tl.store(
        out + (split * MATRIX_ROWS + m[:, None]).to(tl.int64) * H + h[None, :], acc, mask=(h < H)[None, :]
    )


@triton.jit
def hidden_kernel(
    # descriptors
    grad,  # [columns, live] in blocks [BK, BM]
    weight,  # [columns, H] in blocks [BK, BH]: the weight's rows by place
    # pointers
    lists,  # [parts, tiles] int32
    counts,  # [parts + 1] int32
    dropped,  # [16, live] fp32
    towards,  # [16, H] fp32: q W / sum(q) of each part; last, the sum of W's rows
    order,  # [N + 1] int32
    out,  # [N, H]
    # sizes
    first,
    live,
    H,
    part_rows,
    parts,
    tiles,
    # constants
    TILE: tl.constexpr,
    BM: tl.constexpr,
    BH: tl.constexpr,
    BK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """dX = grad^T W over the tiles that a token's part keeps + dropped towards, rounded once."""
    h_tiles = tl.cdiv(H, BH)
    per_tile: tl.constexpr = TILE // BK
    for tile in range(tl.program_id(0), tl.cdiv(live, BM) * h_tiles, PROGRAMS):
        row0 = tile // h_tiles * BM
        h0 = tile % h_tiles * BH
        part = row0 // part_rows
        acc = tl.zeros((BM, BH), tl.float32)
        for step in range(tl.load(counts + part) * per_tile):
            col = tl.load(lists + part * tiles + step // per_tile) * TILE + step % per_tile * BK
            acc = tl.dot(grad.load([col, row0]).T, weight.load([col, h0]), acc)
        row = row0 + tl.arange(0, BM)
        h = h0 + tl.arange(0, BH)
        here = row < live
        rest = tl.load(dropped + part * live + row, mask=here, other=0.0)
        acc += rest[:, None] * tl.load(towards + part * H + h, mask=h < H, other=0.0)[None, :]
        rest = tl.load(dropped + parts * live + row, mask=here, other=0.0)
        acc += rest[:, None] * tl.load(towards + parts * H + h, mask=h < H, other=0.0)[None, :]
        token = tl.load(order + first + row, mask=here, other=0).to(tl.int64)
        at = out + token[:, None] * H + h[None, :]
        tl.store(at, acc.to(out.dtype.element_ty), mask=here[:, None] & (h < H)[None, :])


@triton.jit
def _store(acc, out, column, inside, h0, H, ADD: tl.constexpr):
    """Columns h0, h0 + 1, ... of weight_kernel's result."""
    h = h0 + tl.arange(0, acc.shape[1])
    goal = out + column[:, None] * H + h[None, :]
    mask = inside[:, None] & (h < H)[None, :]
    if ADD:
        acc += tl.load(goal, mask=mask, other=0.0)
    tl.store(goal, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def weight_kernel(
    # descriptors
    grad,  # [columns, live] in blocks [TILE, BK]
    hidden,  # [live, H] in blocks [BK, BH]
    # pointers
    columns,  # [V] int64, by place
    tile_parts,  # [tiles, 16] int32
    tile_counts,  # [tiles] int32
    shares,  # [V, 16] fp32, by place: q of each part, 0 where it keeps the column; then 1
    sums,  # [16, H] fp32: dropped X / sum(q); then dropped X
    out,  # [V, H]
    # sizes
    V,
    H,
    part_rows,
    # constants
    ADD: tl.constexpr,  # to what out holds
    TILE: tl.constexpr,
    BH: tl.constexpr,
    BK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """dW (+)= grad X over the parts that keep a tile + shares sums. Tiles that no part keeps have only
    the latter."""
    h_tiles = tl.cdiv(H, BH)
    per_part = part_rows // BK
    for tile in range(tl.program_id(0), tl.cdiv(V, TILE) * h_tiles, PROGRAMS):
        column_tile = tile // h_tiles
        h0 = tile % h_tiles * BH
        acc = tl.zeros((TILE, BH), tl.float32)
        for step in range(tl.load(tile_counts + column_tile) * per_part):
            part = tl.load(tile_parts + column_tile * 16 + step // per_part)
            row = part * part_rows + step % per_part * BK
            acc = tl.dot(grad.load([column_tile * TILE, row]), hidden.load([row, h0]), acc)
        at = column_tile * TILE + tl.arange(0, TILE)
        inside = at < V
        column = tl.load(columns + at, mask=inside, other=0)
        number = tl.arange(0, MATRIX_ROWS)
        h = h0 + tl.arange(0, BH)
        share = tl.load(
            shares + at[:, None].to(tl.int64) * MATRIX_ROWS + number[None, :], mask=inside[:, None], other=0.0
        )
        dropped = tl.load(sums + number[:, None] * H + h[None, :], mask=(h < H)[None, :], other=0.0)
        # as sums of two factors in bf16, whose exponents are fp32's
        high, dropped_high = share.to(tl.bfloat16), dropped.to(tl.bfloat16)
        acc = tl.dot(high, dropped_high, acc)
        acc = tl.dot((share - high.to(tl.float32)).to(tl.bfloat16), dropped_high, acc)
        acc = tl.dot(high, (dropped - dropped_high.to(tl.float32)).to(tl.bfloat16), acc)
        left, right = halves(acc)  # what out holds of a whole tile would spill
        _store(left, out, column, inside, h0, H, ADD)
        _store(right, out, column, inside, h0 + BH // 2, H, ADD)


@triton.jit
def bias_kernel(
    grad,  # [columns, live], grad_stride apart
    columns,  # [V] int64, by place
    tile_parts,  # [tiles, 16] int32
    tile_counts,  # [tiles] int32
    shares,  # [V, 16] fp32, by place
    sums,  # [16] fp32: sums over tokens of dropped / sum(q); then of dropped
    out,  # [V] fp32
    live,
    V,
    part_rows,
    grad_stride,
    ADD: tl.constexpr,
    TILE: tl.constexpr,
    BK: tl.constexpr,
):
    """The bias's gradient: sums over tokens of dlogits."""
    column_tile = tl.program_id(0)
    at = column_tile * TILE + tl.arange(0, TILE)
    inside = at < V
    acc = tl.zeros((TILE, BK), tl.float32)
    per_part = part_rows // BK
    for step in range(tl.load(tile_counts + column_tile) * per_part):
        part = tl.load(tile_parts + column_tile * 16 + step // per_part)
        row = part * part_rows + step % per_part * BK + tl.arange(0, BK)
        source = grad + at[:, None].to(tl.int64) * grad_stride + row[None, :]
        acc += tl.load(source, mask=inside[:, None] & (row < live)[None, :], other=0.0).to(tl.float32)
    number = tl.arange(0, MATRIX_ROWS)
    share = tl.load(
        shares + at[:, None].to(tl.int64) * MATRIX_ROWS + number[None, :], mask=inside[:, None], other=0.0
    )
    total = tl.sum(acc, 1) + tl.sum(share * tl.load(sums + number)[None, :], 1)
    column = tl.load(columns + at, mask=inside, other=0)
    if ADD:
        total += tl.load(out + column, mask=inside, other=0.0)
    tl.store(out + column, total, mask=inside)
