"""The 8-bit product of screen.py, and the codes of its factors.

A row x is coded as y ~ scale * code with y = R x, as gemm_int8.py says: R turns signs and is a Hadamard
matrix in blocks of BLOCK, and products along a basis B of 16 directions are exact. These come from the tensor
cores too: a number is the sum of two in bf16, high and low, and a row holds them as

    left    high  high  low  low         right   high  low  high  low

so that one product of 64 numbers has all four terms.

Bytes: `code_kernel` reads a factor up to three times, from memory once, and writes H + 140 bytes a row;
`screened_kernel` reads the codes as a GEMM does and writes what `forward_kernel` writes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_options import as_scalar
from .epilogue_triton import write_tile

LOW = tl.constexpr(16)  # rows of the basis
SMALLEST = tl.constexpr(1e-30)  # a row whose largest number is below it is coded as zeros


@triton.jit
def _rotated(x, signs, hadamard, row, inside, k, H, row_stride, BLOCK: tl.constexpr):
    """y of a block of columns, fp32."""
    at = x + row[:, None].to(tl.int64) * row_stride + k[None, :]
    value = tl.load(at, mask=inside[:, None] & (k < H)[None, :], other=0.0)
    turned = value.to(tl.float32) * tl.load(signs + k).to(tl.float32)[None, :]
    i = tl.arange(0, BLOCK)
    matrix = tl.load(hadamard + i[:, None] * BLOCK + i[None, :]).to(value.dtype)
    return tl.dot(turned.to(value.dtype), matrix, input_precision="ieee") * (BLOCK**-0.5)


@triton.jit
def _along(y, basis, k, width, DIRECTIONS: tl.constexpr):
    """y B^T over a block of columns, [ROWS, 16]."""
    b = tl.load(basis + tl.arange(0, DIRECTIONS)[None, :] * width + k[:, None])
    return tl.dot(y, b, input_precision="tf32x3")


@triton.jit
def _inside(along, basis, k, width, DIRECTIONS: tl.constexpr):
    """The part of a block of columns that lies along the basis, [ROWS, BLOCK]."""
    b = tl.load(basis + tl.arange(0, DIRECTIONS)[:, None] * width + k[None, :])
    return tl.dot(along, b, input_precision="tf32x3")


@triton.jit
def code_kernel(
    # pointers
    x,  # [count, H], unit stride over H
    signs,  # [width] int8: 1 or -1
    hadamard,  # [BLOCK, BLOCK] bf16: 1 or -1
    basis,  # [16, width] fp32
    codes,  # [count, width] int8
    low,  # [count, 64] bf16: see the top of this file
    numbers,  # [3, count] fp32: scale; length of y - scale code; length of scale code (LEFT), or of y without
    # its part along the basis
    # sizes
    count,
    H,
    width,
    # strides
    row_stride,
    # constants
    LEFT: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Code ROWS rows. A row with NaN or an infinity gets a scale of NaN.

    The left factor is coded without its part along the basis. What its codes leave along the basis is added
    to its exact part.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < count
    block = tl.arange(0, BLOCK)
    direction = tl.arange(0, LOW)
    along = tl.zeros((ROWS, LOW), tl.float32)
    largest = tl.zeros((ROWS,), tl.float32)
    finite = tl.full((ROWS,), 1, tl.int32)
    for begin in range(0, width, BLOCK):
        y = _rotated(x, signs, hadamard, row, inside, begin + block, H, row_stride, BLOCK)
        along += _along(y, basis, begin + block, width, LOW)
        largest = tl.maximum(largest, tl.max(tl.abs(y), 1))
        finite &= tl.min((tl.abs(y) < float("inf")).to(tl.int32), 1)
    if LEFT:
        largest = tl.zeros((ROWS,), tl.float32)
        for begin in range(0, width, BLOCK):
            k = begin + block
            y = _rotated(x, signs, hadamard, row, inside, k, H, row_stride, BLOCK)
            y -= tl.dot(
                along, tl.load(basis + direction[:, None] * width + k[None, :]), input_precision="tf32x3"
            )
            largest = tl.maximum(largest, tl.max(tl.abs(y), 1))
    coded = (finite == 1) & (largest >= SMALLEST)
    scale = tl.where(coded, largest / 127.0, 0.0)
    inverse = tl.where(coded, 127.0 / largest, 0.0)
    residual = tl.zeros((ROWS,), tl.float32)
    length = tl.zeros((ROWS,), tl.float32)
    rest = tl.zeros((ROWS, LOW), tl.float32)
    for begin in range(0, width, BLOCK):
        k = begin + block
        y = _rotated(x, signs, hadamard, row, inside, k, H, row_stride, BLOCK)
        outside = y - _inside(along, basis, k, width, LOW)
        if LEFT:
            y = outside
        code = tl.where(coded[:, None], tl.floor(y * inverse[:, None] + 0.5), 0.0)
        goal = codes + row[:, None].to(tl.int64) * width + k[None, :]
        tl.store(goal, code.to(tl.int8), mask=inside[:, None])
        kept = code * scale[:, None]
        left = y - kept
        residual += tl.sum(left * left, 1)
        if LEFT:
            length += tl.sum(kept * kept, 1)
            rest += _along(left, basis, k, width, LOW)
        else:
            length += tl.sum(outside * outside, 1)
    along += rest
    high = along.to(tl.bfloat16)
    small = (along - high.to(tl.float32)).to(tl.bfloat16)
    goal = low + row[:, None].to(tl.int64) * (4 * LOW) + direction[None, :]
    tl.store(goal, high, mask=inside[:, None])
    tl.store(goal + LOW, high if LEFT else small, mask=inside[:, None])
    tl.store(goal + 2 * LOW, small if LEFT else high, mask=inside[:, None])
    tl.store(goal + 3 * LOW, small, mask=inside[:, None])
    tl.store(numbers + row, tl.where(finite == 1, scale, float("nan")), mask=inside)
    tl.store(numbers + count + row, tl.sqrt(residual), mask=inside)
    tl.store(numbers + 2 * count + row, tl.sqrt(length), mask=inside)


@triton.jit
def screened_kernel(
    # descriptors
    hidden,  # [rows, width] int8 codes in blocks [BM, BK]
    weight,  # [V, width] int8 codes in blocks [BN, BK]
    hidden_low,  # [rows, 64] bf16 in blocks [BM, 64]
    weight_low,  # [V, 64] bf16 in blocks [BN, 64]
    kept,  # [rows, V] in blocks [BM, BN / PARTS]
    # pointers
    hidden_scales,  # [rows] fp32
    weight_scales,  # [V] fp32
    ids,  # [rows] int32
    order,  # [N + 1] int32
    state,  # [4, rows] fp32, then the tiles' numbers, as forward_kernel's
    # sizes
    first,
    rows,
    N,
    V,
    width,
    # options
    scale: tl.float64,  # of z in base 2
    # constants
    KEPT_SCALE: tl.constexpr,
    ENTROPY: tl.constexpr,
    MEAN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BRANCH: tl.constexpr,
):
    """`forward_kernel` of logits from 8-bit codes: the dequantisation is part of its epilogue, e is kept."""
    scale = as_scalar(scale, tl.float32)
    live = tl.minimum(tl.load(order + N) - first, rows)
    row_tiles = tl.cdiv(tl.maximum(live, 0), BM)
    col_tiles = tl.cdiv(V, BN)
    group_tiles = GROUP * col_tiles
    plane = col_tiles.to(tl.int64) * rows
    for tile in tl.range(tl.program_id(0), row_tiles * col_tiles, PROGRAMS):
        first_row_tile = tile // group_tiles * GROUP
        group = tl.minimum(row_tiles - first_row_tile, GROUP)
        row0 = (first_row_tile + (tile % group_tiles) % group) * BM
        col_tile = (tile % group_tiles) // group
        col0 = col_tile * BN
        products = tl.zeros((BM, BN), tl.int32)
        for k in range(tl.cdiv(width, BK)):
            products = tl.dot(
                hidden.load([row0, k * BK]), weight.load([col0, k * BK]).T, products, out_dtype=tl.int32
            )
        row = row0 + tl.arange(0, BM)
        col = col0 + tl.arange(0, BN)
        row_scale = tl.load(hidden_scales + row, mask=row < live, other=0.0)
        col_scale = tl.load(weight_scales + col, mask=col < V, other=0.0)
        acc = products.to(tl.float32) * row_scale[:, None] * col_scale[None, :]
        acc = tl.dot(hidden_low.load([row0, 0]), weight_low.load([col0, 0]).T, acc)
        write_tile(
            acc,
            kept,
            ids,
            None,
            state,
            row0,
            col_tile,
            live,
            rows,
            plane,
            V,
            0.0,
            scale,
            False,
            False,
            ENTROPY,
            MEAN,
            True,
            KEPT_SCALE,
            PARTS,
            BRANCH,
        )
