"""The head's kernels for linear/epilogue.py: a logits GEMM with the statistics in its epilogue, and what
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

from ..triton_options import as_scalar

LN2 = tl.constexpr(0.6931471805599453)
# In powers of 2. The reference is LIFT above the largest of the SAMPLE columns that `gather_kernel` looks at,
# and a tile may reach 2^WINDOW above the reference: 44 nats above the sample. Then e <= 2^40, and 2^(r - lse)
# >= 2^-58, which leaves 2^-68 for the upstream gradient times x before bf16 underflows.
LIFT = tl.constexpr(24.0)
WINDOW = tl.constexpr(40.0)
LOWEST = tl.constexpr(-1e30)  # finite, so that a masked tile stays free of inf - inf


@triton.jit
def compact_kernel(
    ids,  # [N] int64, negative: ignored
    order,  # [N] int32: the tokens that are not ignored first, in order; then the rest
    count,  # [1] int32: how many are not ignored
    N,
    BLOCK: tl.constexpr,
):
    """One program: N is a few thousand, and a sort would take four launches."""
    kept = tl.full((), 0, tl.int32)
    for begin in range(0, N, BLOCK):
        token = begin + tl.arange(0, BLOCK)
        inside = token < N
        keep = (tl.load(ids + token, mask=inside, other=-1) >= 0).to(tl.int32)
        rank = kept + tl.cumsum(keep, 0) - keep  # kept tokens before this one
        position = tl.where(keep > 0, rank, N - 1 - (token - rank))
        tl.store(order + position, token, mask=inside)
        kept += tl.sum(keep, 0)
    tl.store(count, kept)


@triton.jit
def _base2(acc, bias, cols, V, scale_in, scale_out, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """z2 of the GEMM's result: (acc + bias) scale_out, or tanh((acc + bias) scale_in ln 2 / 2) scale_out.

    tanh y = (1 - t) / (1 + t) with t = 2^(-2 y / ln 2) is off by 2^-23 of the cap, 4e-6 nats at 30, also where
    it cancels: a series for small y would cost registers, and then the kernel spills.
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
def gather_kernel(
    hidden,  # [N, H], any strides
    weight,  # [V, H], unit stride over H
    ids,  # [N] int64
    bias,  # [V]; read if HAS_BIAS
    order,  # [N] int32
    count,  # [1] int32
    gathered,  # [rows, H]: hidden states of tokens order[first : first + rows]
    gathered_ids,  # [rows] int64
    state,  # [4, rows] fp32: the reference, and NaN in row 3 for the z2 of the id
    first,
    rows,
    V,
    H,
    token_stride,
    hidden_stride,
    weight_stride,
    sample,
    scale_in: tl.float64,
    scale_out: tl.float64,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ONE_REFERENCE: tl.constexpr,
    NEW: tl.constexpr,  # false: the state is there already
    BM: tl.constexpr,
    SAMPLE: tl.constexpr,
    BK: tl.constexpr,
):
    """Bring a block's tokens together. Find each a reference from SAMPLE columns, from `sample` on.

    Nothing of an ignored token is read.
    """
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = row < rows
    token = tl.load(order + first + row, mask=inside, other=0).to(tl.int64)
    live = inside & (first + row < tl.load(count))
    token_id = tl.load(ids + token, mask=live, other=-1)
    read = live & (token_id >= 0)  # under graph capture no token is left out, but an ignored one is not read
    cols = sample + tl.arange(0, SAMPLE)
    acc = tl.zeros((BM, SAMPLE), tl.float32)
    source = hidden + token[:, None] * token_stride
    goal = gathered + row[:, None].to(tl.int64) * H
    for begin in range(0, H, BK):
        k = begin + tl.arange(0, BK)
        x = tl.load(source + k[None, :] * hidden_stride, mask=read[:, None] & (k < H)[None, :], other=0.0)
        tl.store(goal + k[None, :], x, mask=inside[:, None] & (k < H)[None, :])
        if ONE_REFERENCE and NEW:
            w = tl.load(
                weight + cols[:, None].to(tl.int64) * weight_stride + k[None, :],
                mask=(cols < V)[:, None] & (k < H)[None, :],
                other=0.0,
            )
            acc = tl.dot(x, tl.trans(w), acc)
    reference = tl.full((BM,), LOWEST, tl.float32)
    if ONE_REFERENCE and NEW:
        scale_in = as_scalar(scale_in, tl.float32)
        scale_out = as_scalar(scale_out, tl.float32)
        z = _base2(acc, bias, cols, V, scale_in, scale_out, HAS_BIAS, HAS_SOFTCAP)
        reference = tl.maximum(tl.max(tl.where((cols < V)[None, :], z, LOWEST), 1), LOWEST) + LIFT
    tl.store(gathered_ids + row, token_id, mask=inside)
    if NEW:
        tl.store(state + row, reference, mask=inside)
        tl.store(state + 3 * rows + row, float("nan"), mask=inside)


@triton.jit
def _halves(z):
    """The left and the right half of a tile."""
    return tl.split(tl.permute(tl.reshape(z, (z.shape[0], 2, z.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _sums(z, e, base, ENTROPY: tl.constexpr):
    """sum e and sum (z - base) e of each row."""
    total = tl.sum(e, 1)
    weighted = tl.zeros_like(total)
    if ENTROPY:
        weighted = tl.sum(tl.maximum(z - base[:, None], LOWEST) * e, 1)  # -inf * 0 is NaN, -1e30 * 0 is 0
    return total, weighted


@triton.jit
def _sums_without(z, e, base, at, ENTROPY: tl.constexpr):
    """`_sums` without column `at` of each row, and its z or 0."""
    hit = tl.arange(0, z.shape[1])[None, :] == at[:, None]
    total, weighted = _sums(z, tl.where(hit, 0.0, e), base, ENTROPY)
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
    BRANCH: tl.constexpr,
):
    """Keep e of a part of a tile. Returns sum e and sum (z - base) e without the target's, and its z or 0."""
    e = tl.exp2(z - r[:, None])
    if KEEP:
        kept.store([row0, col0], (e * KEPT_SCALE).to(kept.dtype))
    at = token_id - col0
    if BRANCH:
        if tl.max(((at >= 0) & (at < z.shape[1])).to(tl.int32), 0) > 0:
            total, weighted, at_id = _sums_without(z, e, base, at, ENTROPY)
        else:
            total, weighted = _sums(z, e, base, ENTROPY)
            at_id = tl.zeros_like(total)
    else:
        total, weighted, at_id = _sums_without(z, e, base, at, ENTROPY)
    return total, weighted, at_id


@triton.jit
def _two_parts(
    z, kept, r, base, token_id, row0, col0,
    KEPT_SCALE: tl.constexpr, KEEP: tl.constexpr, ENTROPY: tl.constexpr, BRANCH: tl.constexpr,
):  # fmt: skip
    """`_part` of the halves, one after the other."""
    z0, z1 = _halves(z)
    width: tl.constexpr = z.shape[1] // 2
    total0, weighted0, at_id0 = _part(
        z0, kept, r, base, token_id, row0, col0, KEPT_SCALE, KEEP, ENTROPY, BRANCH
    )
    total1, weighted1, at_id1 = _part(
        z1, kept, r, base, token_id, row0, col0 + width, KEPT_SCALE, KEEP, ENTROPY, BRANCH
    )
    return total0 + total1, weighted0 + weighted1, at_id0 + at_id1


@triton.jit
def forward_kernel(
    hidden,  # [rows, H], a descriptor of blocks [BM, BK]
    weight,  # [V, H], a descriptor of blocks [BN, BK]
    kept,  # [rows, V], a descriptor of blocks [BM, BN / PARTS]; written with KEEP
    ids,  # [rows] int64
    bias,  # [V]; read if HAS_BIAS
    count,  # [1] int32
    state,  # [4, rows] fp32: the reference (in), and in row 3 the z2 of the id (out)
    tiles,  # [2 + ENTROPY + MEAN, tiles of V, rows] fp32: max, sum, weighted, total
    first,
    rows,
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
    PARTS: tl.constexpr,  # 2: the epilogue takes half a tile at a time, and the kept half needs half the memory
    PROGRAMS: tl.constexpr,
    FLATTEN: tl.constexpr,
    BRANCH: tl.constexpr,
):
    """z2 = hidden weight^T, persistent; tiles of one GROUP of rows go over all columns before the next."""
    scale_in = as_scalar(scale_in, tl.float32)
    scale_out = as_scalar(scale_out, tl.float32)
    live = tl.minimum(tl.load(count) - first, rows)
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

        row = row0 + tl.arange(0, BM)
        inside = row < live
        token_id = tl.load(ids + row, mask=inside, other=-1)
        r = tl.load(state + row, mask=inside, other=0.0)
        found = (token_id >= col0) & (token_id < col0 + BN)
        at = tiles + col_tile.to(tl.int64) * rows + row
        cols = col0 + tl.arange(0, BN)
        z = _base2(acc, bias, cols, V, scale_in, scale_out, HAS_BIAS, HAS_SOFTCAP)
        if MEAN:
            mean = tl.sum(tl.where((cols < V)[None, :], z, 0.0), 1)
        z = tl.where(
            (cols < V)[None, :], z, LOWEST
        )  # also where V is a multiple of BN: without it ptxas spills
        top = tl.max(z, 1)
        base = tl.maximum(top, LOWEST)
        r = tl.where(top > r + WINDOW, top, r)
        at_col = token_id.to(tl.int32)
        if PARTS == 1:
            total, weighted, at_id = _part(
                z, kept, r, base, at_col, row0, col0, KEPT_SCALE, KEEP, ENTROPY, BRANCH
            )
        elif PARTS == 2:
            total, weighted, at_id = _two_parts(
                z, kept, r, base, at_col, row0, col0, KEPT_SCALE, KEEP, ENTROPY, BRANCH
            )
        else:
            left, right = _halves(z)
            total, weighted, at_id = _two_parts(
                left, kept, r, base, at_col, row0, col0, KEPT_SCALE, KEEP, ENTROPY, BRANCH
            )
            total1, weighted1, at_id1 = _two_parts(
                right, kept, r, base, at_col, row0, col0 + BN // 2, KEPT_SCALE, KEEP, ENTROPY, BRANCH
            )
            total += total1
            weighted += weighted1
            at_id += at_id1
        tl.store(state + 3 * rows + row, at_id, mask=inside & found)
        tl.store(at, top, mask=inside)
        tl.store(at + plane, total, mask=inside)
        if ENTROPY:
            tl.store(at + 2 * plane, weighted, mask=inside)
        if MEAN:
            tl.store(at + (2 + ENTROPY) * plane, mean, mask=inside)


@triton.jit
def merge_kernel(
    tiles,  # [2 + ENTROPY + MEAN, col_tiles, rows] fp32 of forward_kernel
    ids,  # [rows] int64
    order,  # [N] int32
    count,  # [1] int32
    stats,  # [7, N], order of rows.Stat; those of ignored tokens are not written
    state,  # [4, rows] fp32: the reference, the row's largest z2 and log2 of its sum (out), the z2 of the id
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
    inside = (row < rows) & (first + row < tl.load(count))
    reference = tl.load(state + row, mask=inside, other=0.0)
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


@triton.jit
def dlogits_kernel(
    kept,  # [rows, V] e of forward_kernel, kept_stride apart; becomes dlogits / row_scale
    tiles,  # [.., col_tiles, rows] fp32 of forward_kernel
    state,  # [4, rows] fp32 of merge_kernel
    ids,  # [rows] int64
    logp,  # [N] fp32 of the ids
    order,  # [N] int32
    coefficients,  # [4, ..], order of rows.Coefficient, of the tokens in the order of the rows
    gathered,  # [rows, H] hidden states; become row_scale times them with SCALE_HIDDEN
    row_scale,  # [rows] fp32
    first,
    rows,
    V,
    H,
    kept_stride,
    coefficient_stride,
    slope: tl.float64,  # dz/dx without a softcap, nats
    softcap: tl.float64,  # of z in base 2, after the temperature
    HAS_SOFTCAP: tl.constexpr,
    ONE_REFERENCE: tl.constexpr,
    SCALE_HIDDEN: tl.constexpr,
    KEPT_SCALE: tl.constexpr,
    BN: tl.constexpr,
    TILES: tl.constexpr,  # tiles of a row that one step of a pass takes
    BLOCK: tl.constexpr,  # of hidden states
):
    """From e to dlogits for any coefficients, so that dX = row_scale (dlogits W), dW = dlogits^T (row_scale X).

    In most rows P = e 2^(reference - lse) for all columns. Then dlogits = prob P everywhere but at the target:
    prob and the power go into row_scale, and the target's element is written from fp32. A row needs a pass
    over all its columns if a tile has a reference of its own, if its coefficients have a plogp or uniform part,
    with a softcap (whose slope differs by column), and in fp16. There log2 e and z come from the rounded e:
    they are off by 2^-9 / ln 2, or 0.003 in base 2.
    """
    n = tl.program_id(0)
    slope = as_scalar(slope, tl.float32)
    softcap = as_scalar(softcap, tl.float32)
    token_id = tl.load(ids + n)
    token = tl.load(order + first + n)
    reference = tl.load(state + n)
    row_max = tl.load(state + rows + n)
    logsum = tl.load(state + 2 * rows + n)
    onehot = tl.load(coefficients + n)
    prob = tl.load(coefficients + coefficient_stride + n)
    plogp = tl.load(coefficients + 2 * coefficient_stride + n)
    uniform = tl.load(coefficients + 3 * coefficient_stride + n)
    if token_id < 0:  # only under graph capture; its e is finite, since its hidden state counted as zeros
        onehot = 0.0
        prob = 0.0
        plogp = 0.0
        uniform = 0.0
    log_p = tl.load(logp + token, mask=token_id >= 0, other=0.0)
    p_less_1 = tl.where(log_p > -0.02, log_p * (1 + log_p * (0.5 + log_p * (1.0 / 6))), tl.exp(log_p) - 1.0)
    finite = tl.maximum(log_p, LOWEST)
    at_id = prob * p_less_1 + (prob + onehot) + (1.0 + p_less_1) * plogp * finite + uniform
    at_id = tl.where(log_p == log_p, at_id, log_p)
    row = kept + n.to(tl.int64) * kept_stride
    valid = (token_id >= 0) & (token_id < V)

    scale = prob * slope * tl.exp2((reference - row_max) - logsum)
    # The target's element is onehot / prob / P at most: it and the scale stay far inside of bf16's range.
    in_range = (tl.abs(prob) * 1048576.0 >= tl.abs(onehot)) & ((tl.abs(scale) > 1e-30) | (prob == 0))
    simple = (plogp == 0) & (uniform == 0) & in_range & (row_max <= reference + WINDOW)
    if ONE_REFERENCE and simple:
        tl.store(row + token_id, at_id * slope / scale, mask=valid & (scale != 0))
    else:
        scale = tl.full((), 1.0, tl.float32)
        col = tl.arange(0, BN)
        slot = tl.arange(0, TILES)
        if HAS_SOFTCAP:
            tanh_id = ((log_p / LN2 + logsum) + row_max) / softcap
            at_id *= (1.0 - tanh_id) * (1.0 + tanh_id)
        for begin in range(0, tl.cdiv(V, BN), TILES):
            tile = begin + slot
            tile_max = tl.load(tiles + tile.to(tl.int64) * rows + n, mask=tile < tl.cdiv(V, BN), other=LOWEST)
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
                at = gathered + n.to(tl.int64) * H + k
                x = tl.load(at, mask=k < H, other=0.0).to(tl.float32)
                tl.store(at, x * scale, mask=k < H)


@triton.jit
def scatter_kernel(
    source,  # [rows, H] fp32, or hidden's dtype
    row_scale,  # [rows] fp32; read if SCALED
    order,  # [N] int32
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
