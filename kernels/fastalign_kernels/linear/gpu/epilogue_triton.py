"""The head's kernels for epilogue.py: a logits GEMM with the statistics in its epilogue, and what
stands around it.

All logits here are in base 2, z2 = z / ln 2, since the hardware's exponential is 2^x. A tile is BM tokens by
BN columns. With reference r (below), the forward kernel writes for each tile and token

    max   the largest z2,                       sum  the sum of e = 2^(z2 - r) without the target's,
    weighted  the sum of (z2 - max) e,          total  the sum of z2,

and with KEEP e itself, rounded once. The target's z2 comes exactly from the accumulator. The merge kernel
adds the tiles up in fp64. The target is left out of the sums and added there: a sure token's 1 + 8e-7 would
lose its last digits in an fp32 sum of the tile.

r is one number a token, near its largest logit, wherever the tile's maximum is at most 2^WINDOW above it,
else the tile's maximum. One number for the whole row means that P = e 2^(r - lse) needs no pass over e: the
factor moves into the rows of the GEMMs' other operand. bf16 has fp32's exponents, so e keeps its 8 digits.

Bytes beside the GEMMs' own: 16 N V / BN for the tiles' numbers. `dlogits_kernel` touches one element of a
row, unless the row needs a pass (read 2 V, write 2 V bytes); see there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_options import as_scalar

LN2 = tl.constexpr(0.6931471805599453)
# In powers of 2. The reference is LIFT above the largest of the SAMPLE columns that `gather_kernel` looks at,
# and a tile may reach 2^WINDOW above the reference: 44 nats above the sample. Then e <= 2^40, and 2^(r - lse)
# >= 2^-58, which leaves 2^-68 for the upstream gradient times x before bf16 underflows.
LIFT = tl.constexpr(24.0)
WINDOW = tl.constexpr(40.0)
LOWEST = tl.constexpr(-1e30)  # finite, so that a masked tile stays free of inf - inf


@triton.jit
def base2(acc, bias, cols, V, scale_in, scale_out, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """z2 of the GEMM's result: (acc + bias) scale_out, or tanh((acc + bias) scale_in ln 2 / 2) scale_out.

    tanh y = (1 - t) / (1 + t) with t = 2^(-2 y / ln 2) is off by 2^-23 of the cap (4e-6 nats at 30), even
    where it cancels. A series for small y would cost registers, and the kernel would spill.
    """
    if HAS_BIAS:
        acc += tl.load(bias + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
    if HAS_SOFTCAP:
        acc = acc * scale_in
        t = tl.exp2(-tl.abs(acc))
        h = (1.0 - t) / (1.0 + t)
        acc = tl.where(acc < 0, -h, h)
    return acc * scale_out


@triton.jit
def halves(z):
    """The left and the right half of a tile."""
    return tl.split(tl.permute(tl.reshape(z, (z.shape[0], 2, z.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _sums(z, e, base, ENTROPY: tl.constexpr, HAS_BIAS: tl.constexpr):
    """sum e and sum (z - base) e of each row."""
    total = tl.sum(e, 1)
    weighted = tl.zeros_like(total)
    if ENTROPY:
        below = z - base[:, None]
        if HAS_BIAS:
            # A bias of -inf masks a column: -inf * 0 is NaN, -1e30 * 0 is 0
            below = tl.maximum(below, LOWEST)
        weighted = tl.sum(below * e, 1)
    return total, weighted


@triton.jit
def _sums_without(z, e, base, at, ENTROPY: tl.constexpr, HAS_BIAS: tl.constexpr):
    """`_sums` without column `at` of each row, and its z or 0."""
    hit = tl.arange(0, z.shape[1])[None, :] == at[:, None]
    total, weighted = _sums(z, tl.where(hit, 0.0, e), base, ENTROPY, HAS_BIAS)
    return total, weighted, tl.sum(tl.where(hit, z, 0.0), 1)


@triton.jit
def _part(
    z,  # [BM, width] of a tile
    kept,
    r,  # [BM]
    base,  # [BM] the tile's maximum
    token_id,  # [BM]
    row0,
    col0,
    KEPT_SCALE: tl.constexpr,
    KEEP: tl.constexpr,
    ENTROPY: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BRANCH: tl.constexpr,
):
    """Keep e of a part of a tile. Returns sum e and sum (z - base) e without the target's, and its z or 0.

    Few parts hold a target (128 tokens among 600 tiles of 4 parts): with BRANCH the rest skip the search. The
    branch also keeps ptxas from mixing the parts, which would spill.
    """
    e = tl.exp2(z - r[:, None])
    if KEEP:
        kept.store([row0, col0], (e * KEPT_SCALE).to(kept.dtype))
    at = token_id - col0
    if BRANCH:
        if tl.max(((at >= 0) & (at < z.shape[1])).to(tl.int32), 0) > 0:
            total, weighted, z_id = _sums_without(z, e, base, at, ENTROPY, HAS_BIAS)
        else:
            total, weighted = _sums(z, e, base, ENTROPY, HAS_BIAS)
            z_id = tl.zeros_like(total)
    else:
        total, weighted, z_id = _sums_without(z, e, base, at, ENTROPY, HAS_BIAS)
    return total, weighted, z_id


@triton.jit
def _two_parts(
    z,
    kept,
    r,
    base,
    token_id,
    row0,
    col0,
    KEPT_SCALE: tl.constexpr,
    KEEP: tl.constexpr,
    ENTROPY: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BRANCH: tl.constexpr,
):
    """`_part` of both halves of z."""
    left, right = halves(z)
    width: tl.constexpr = z.shape[1] // 2
    total, weighted, z_id = _part(
        left, kept, r, base, token_id, row0, col0, KEPT_SCALE, KEEP, ENTROPY, HAS_BIAS, BRANCH
    )
    total1, weighted1, z_id1 = _part(
        right, kept, r, base, token_id, row0, col0 + width, KEPT_SCALE, KEEP, ENTROPY, HAS_BIAS, BRANCH
    )
    return total + total1, weighted + weighted1, z_id + z_id1


@triton.jit
def write_tile(
    acc,  # [BM, BN] products of a tile
    kept,
    ids,
    bias,
    state,
    row0,
    col_tile,
    live,
    rows,
    plane,
    V,
    scale_in,
    scale_out,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    MEAN: tl.constexpr,
    KEEP: tl.constexpr,
    KEPT_SCALE: tl.constexpr,
    PARTS: tl.constexpr,
    BRANCH: tl.constexpr,
):
    """The epilogue: a tile's numbers, and with KEEP its e. The arguments are those of `forward_kernel`."""
    BM: tl.constexpr = acc.shape[0]
    BN: tl.constexpr = acc.shape[1]
    col0 = col_tile * BN
    row = row0 + tl.arange(0, BM)
    inside = row < live
    token_id = tl.load(ids + row, mask=inside, other=-1)
    r = tl.load(state + row, mask=inside, other=0.0)
    # Both conditions say the same. The other form would spill 8 bytes.
    if BRANCH:
        found = (token_id >= 0) & (token_id // BN == col_tile)
    else:
        found = (token_id >= col0) & (token_id < col0 + BN)
    at = state + (4 + col_tile.to(tl.int64)) * rows + row
    cols = col0 + tl.arange(0, BN)
    z = base2(acc, bias, cols, V, scale_in, scale_out, HAS_BIAS, HAS_SOFTCAP)
    if MEAN:
        mean = tl.sum(z, 1)  # columns beyond V hold 0: a descriptor pads with zeros
    z = tl.where((cols < V)[None, :], z, LOWEST)  # also where V is a multiple of BN: without it ptxas spills
    top = tl.max(z, 1)
    base = tl.maximum(top, LOWEST)
    r = tl.where(top > r + WINDOW, top, r)
    if PARTS == 2:
        total, weighted, z_id = _two_parts(
            z, kept, r, base, token_id, row0, col0, KEPT_SCALE, KEEP, ENTROPY, HAS_BIAS, BRANCH
        )
    else:
        left, right = halves(z)
        total, weighted, z_id = _two_parts(
            left, kept, r, base, token_id, row0, col0, KEPT_SCALE, KEEP, ENTROPY, HAS_BIAS, BRANCH
        )
        total1, weighted1, z_id1 = _two_parts(
            right,
            kept,
            r,
            base,
            token_id,
            row0,
            col0 + BN // 2,
            KEPT_SCALE,
            KEEP,
            ENTROPY,
            HAS_BIAS,
            BRANCH,
        )
        total += total1
        weighted += weighted1
        z_id += z_id1
    tl.store(state + 3 * rows + row, z_id, mask=inside & found)
    tl.store(at, top, mask=inside)
    tl.store(at + plane, total, mask=inside)
    if ENTROPY:
        tl.store(at + 2 * plane, weighted, mask=inside)
    if MEAN:
        tl.store(at + (2 + ENTROPY) * plane, mean, mask=inside)


@triton.jit
def forward_kernel(
    hidden,  # [rows, H], a descriptor of blocks [BM, BK]
    weight,  # [V, H], a descriptor of blocks [BN, BK]
    kept,  # [rows, V], a descriptor of blocks [BM, BN / PARTS]; written with KEEP
    ids,  # [rows] int32
    bias,  # [V]; read if HAS_BIAS
    order,  # [N + 1] int32; the last is the number of tokens that are not ignored
    state,  # [4, rows] fp32: the reference (in), and in row 3 the z2 of the id (out)
    # then [2 + ENTROPY + MEAN, tiles of V, rows]: max, sum, weighted, total
    first,
    rows,
    N,
    V,
    H,
    scale_in: tl.float64,
    scale_out: tl.float64,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    MEAN: tl.constexpr,
    KEEP: tl.constexpr,
    KEPT_SCALE: tl.constexpr,  # fp16 has too few exponents for e: 2^15 e reaches down to 2^-39
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,  # row tiles that share their columns of the weight in L2
    PARTS: tl.constexpr,  # 2 or 4: the epilogue takes that part of a tile at a time
    PROGRAMS: tl.constexpr,
    FLATTEN: tl.constexpr,
    BRANCH: tl.constexpr,
):
    """z2 = hidden weight^T, persistent; tiles of one GROUP of rows go over all columns before the next."""
    scale_in = as_scalar(scale_in, tl.float32)
    scale_out = as_scalar(scale_out, tl.float32)
    live = tl.minimum(tl.load(order + N) - first, rows)
    row_tiles = tl.cdiv(tl.maximum(live, 0), BM)
    col_tiles = tl.cdiv(V, BN)
    group_tiles = GROUP * col_tiles
    plane = col_tiles.to(tl.int64) * rows
    for tile in tl.range(tl.program_id(0), row_tiles * col_tiles, PROGRAMS, flatten=FLATTEN):
        first_row_tile = tile // group_tiles * GROUP
        group = tl.minimum(row_tiles - first_row_tile, GROUP)
        row0 = (first_row_tile + (tile % group_tiles) % group) * BM
        col_tile = (tile % group_tiles) // group
        col0 = col_tile * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(tl.cdiv(H, BK)):
            acc = tl.dot(hidden.load([row0, k * BK]), weight.load([col0, k * BK]).T, acc)

        write_tile(
            acc,
            kept,
            ids,
            bias,
            state,
            row0,
            col_tile,
            live,
            rows,
            plane,
            V,
            scale_in,
            scale_out,
            HAS_BIAS,
            HAS_SOFTCAP,
            ENTROPY,
            MEAN,
            KEEP,
            KEPT_SCALE,
            PARTS,
            BRANCH,
        )


@triton.jit
def merge_kernel(
    ids,  # [rows] int32
    order,  # [N + 1] int32
    stats,  # [7, N], order of rows.Stat; those of ignored tokens are not written
    state,  # [4, rows] fp32: reference, largest z2 (out), log2 of the sum (out), the id's z2
    # then [2 + ENTROPY + MEAN, col_tiles, rows]: the tiles' max, sum, weighted, total
    first,
    rows,
    N,
    V,
    col_tiles,
    ENTROPY: tl.constexpr,
    MEAN: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows) & (first + row < tl.load(order + N))
    reference = tl.load(state + row, mask=inside, other=0.0)
    tiles = state + 4 * rows
    plane = as_scalar(col_tiles, tl.int64) * rows
    top = tl.full((TILES, ROWS), float("-inf"), tl.float32)
    for begin in range(0, col_tiles, TILES):
        tile = begin + tl.arange(0, TILES)
        at = tiles + tile[:, None].to(tl.int64) * rows + row[None, :]
        mask = (tile < col_tiles)[:, None] & inside[None, :]
        top = tl.maximum(top, tl.load(at, mask=mask, other=float("-inf")))
    row_max = tl.max(top, 0)
    total = tl.zeros((TILES, ROWS), tl.float64)
    weighted = tl.zeros((TILES, ROWS), tl.float64)
    mean = tl.zeros((TILES, ROWS), tl.float64)
    for begin in range(0, col_tiles, TILES):
        tile = begin + tl.arange(0, TILES)
        at = tiles + tile[:, None].to(tl.int64) * rows + row[None, :]
        mask = (tile < col_tiles)[:, None] & inside[None, :]
        tile_max = tl.load(at, mask=mask, other=LOWEST)
        r = tl.where(tile_max > reference[None, :] + WINDOW, tile_max, reference[None, :])
        scale = tl.exp2(r - row_max[None, :]).to(tl.float64)
        tile_sum = tl.load(at + plane, mask=mask, other=0.0).to(tl.float64) * scale
        total += tile_sum
        if ENTROPY:
            tile_weighted = tl.load(at + 2 * plane, mask=mask, other=0.0).to(tl.float64)
            below = (tl.maximum(tile_max, LOWEST) - row_max[None, :]).to(tl.float64)
            weighted += tile_weighted * scale + tl.where(tile_sum == 0, 0.0, below * tile_sum)
        if MEAN:
            mean += tl.load(at + (2 + ENTROPY) * plane, mask=mask, other=0.0).to(tl.float64)
    token_id = tl.load(ids + row, mask=inside, other=-1)
    counted = inside & (token_id >= 0)
    z_id = tl.load(state + 3 * rows + row, mask=counted, other=0.0)
    below = z_id - row_max
    e_id = tl.exp2(below).to(tl.float64)
    row_sum = tl.sum(total, 0) + e_id
    logsum = tl.log(row_sum)
    out = stats + tl.load(order + first + row, mask=inside, other=0)
    largest = row_max * LN2
    tl.store(out, (below.to(tl.float64) * LN2 - logsum).to(tl.float32), mask=counted)
    if MEAN:
        average = tl.sum(mean, 0) / V - row_max.to(tl.float64)
        tl.store(out + N, (average * LN2 - logsum).to(tl.float32), mask=counted)
    if ENTROPY:
        row_weighted = tl.sum(weighted, 0) + tl.where(e_id == 0, 0.0, below.to(tl.float64) * e_id)
        tl.store(out + 2 * N, (logsum - row_weighted / row_sum * LN2).to(tl.float32), mask=counted)
    tl.store(out + 3 * N, (largest.to(tl.float64) + logsum).to(tl.float32), mask=counted)
    tl.store(out + 4 * N, largest, mask=counted)
    tl.store(out + 5 * N, logsum.to(tl.float32), mask=counted)
    tl.store(out + 6 * N, (z_id == row_max).to(tl.float32), mask=counted)
    tl.store(state + rows + row, row_max, mask=inside)
    tl.store(state + 2 * rows + row, (logsum / LN2).to(tl.float32), mask=inside)
