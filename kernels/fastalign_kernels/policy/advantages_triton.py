"""GAE and whitening of policy/advantages.py in Triton.

GAE: one program a row, blocks of time from the last to the first, each a parallel scan. Two scans a block.
The next token's value is that of the nearest later token inside the mask: of two stretches of time, what the
later one has. The advantage is A[t] = b + a A[next], a = gamma lam, or A[next] itself outside the mask, and
such maps compose to another one. Time is loaded backwards, so that both are ordinary forward scans. Bytes: 2
B T e + B T read (values and mask once more from L1), 2 B T e written.

Whitening: the moments of blocks of tokens, in fp64; a program that merges them; the values by them. Bytes: 2
(N e + N) read, N e written.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..triton_launch import launch
from ..triton_options import as_scalar

BLOCK_SIZE = 1024
NUM_WARPS = 4
_CONSTANTS = {"BLOCK_SIZE": BLOCK_SIZE, "num_warps": NUM_WARPS}


@triton.jit
def _newer(has, value, has_next, value_next):
    """The second stretch's value if it has one, else the first's; and whether either has one."""
    return has | has_next, tl.where(has_next != 0, value_next, value)


@triton.jit
def _composed(a, b, a_next, b_next):
    """x -> a x + b, then x -> a_next x + b_next."""
    return a * a_next, b * a_next + b_next


@triton.jit
def gae_kernel(
    rewards,  # [B, T]
    values,  # [B, T]
    mask,  # [B, T] bool
    bootstrap,  # [B]; read if HAS_BOOTSTRAP
    advantages,  # [B, T]
    returns,  # [B, T]
    T,
    gamma: tl.float64,
    decay: tl.float64,  # gamma lam
    HAS_BOOTSTRAP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = row * T
    lane = tl.arange(0, BLOCK_SIZE)
    dtype = values.dtype.element_ty
    gamma = as_scalar(gamma, dtype)
    decay = as_scalar(decay, dtype)
    # The value of the nearest token behind the block
    following = tl.load(bootstrap + row) if HAS_BOOTSTRAP else tl.full((), 0.0, dtype)
    running = tl.full((), 0.0, dtype)  # its advantage
    for begin in range(0, T, BLOCK_SIZE):
        t = T - 1 - begin - lane
        inside = tl.load(mask + start + t, mask=t >= 0, other=0) != 0
        r = tl.load(rewards + start + t, mask=inside, other=0.0)
        v = tl.load(values + start + t, mask=inside, other=0.0)
        # Each lane takes what stands one step later; lane 0 nothing, for `following` is that already.
        later = (lane > 0) & (t >= -1)
        later_inside = tl.load(mask + start + t + 1, mask=later, other=0) != 0
        later_value = tl.load(values + start + t + 1, mask=later_inside, other=0.0)
        has, next_value = tl.associative_scan((later_inside.to(tl.int32), later_value), 0, _newer)
        next_value = tl.where(has != 0, next_value, following)
        a = tl.where(inside, decay, 1.0)
        b = tl.where(inside, r + gamma * next_value - v, 0.0)
        a, b = tl.associative_scan((a, b), 0, _composed)
        advantage = a * running + b
        tl.store(advantages + start + t, tl.where(inside, advantage, 0.0), mask=t >= 0)
        tl.store(returns + start + t, tl.where(inside, advantage + v, 0.0), mask=t >= 0)
        running = tl.sum(tl.where(lane == BLOCK_SIZE - 1, advantage, 0.0), 0)
        last_inside = tl.sum(tl.where((lane == BLOCK_SIZE - 1) & inside, 1, 0), 0) != 0
        last_value = tl.sum(tl.where(lane == BLOCK_SIZE - 1, v, 0.0), 0)
        last_next = tl.sum(tl.where(lane == BLOCK_SIZE - 1, next_value, 0.0), 0)
        following = tl.where(last_inside, last_value, last_next)


def gae_rows(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
    advantages: Tensor,
    returns: Tensor,
) -> None:
    """Fill advantages and returns [B, T]; see advantages.gae."""
    B, T = values.shape
    launch(
        gae_kernel,
        B,
        (rewards, values, mask, bootstrap, advantages, returns),
        (T, gamma, gamma * lam),
        HAS_BOOTSTRAP=bootstrap is not None,
        BLOCK_SIZE=min(BLOCK_SIZE, max(16, triton.next_power_of_2(T))),
        num_warps=NUM_WARPS,
    )


@triton.jit
def moments_kernel(
    x,  # [N]
    mask,  # [N] bool
    parts,  # [programs, 3] fp64: tokens, their mean, their squared deviations from it
    N,
    BLOCK_SIZE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    i = program * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    inside = tl.load(mask + i, mask=i < N, other=0) != 0
    x_i = tl.load(x + i, mask=inside, other=0.0).to(tl.float64)
    count = tl.sum(inside.to(tl.float64), 0)
    mean = tl.sum(x_i, 0) / tl.maximum(count, 1.0)
    deviation = tl.where(inside, x_i - mean, 0.0)
    tl.store(parts + program * 3, count)
    tl.store(parts + program * 3 + 1, mean)
    tl.store(parts + program * 3 + 2, tl.sum(deviation * deviation, 0))


@triton.jit
def merge_kernel(
    parts,  # [P, 3] fp64
    moments,  # [3] fp64
    P,
    BLOCK_SIZE: tl.constexpr,
):
    lane = tl.arange(0, BLOCK_SIZE)
    count = tl.zeros([BLOCK_SIZE], tl.float64)
    total = tl.zeros([BLOCK_SIZE], tl.float64)
    for begin in range(0, P, BLOCK_SIZE):
        p = begin + lane
        tokens = tl.load(parts + p * 3, mask=p < P, other=0.0)
        count += tokens
        total += tokens * tl.load(parts + p * 3 + 1, mask=p < P, other=0.0)
    tokens_of_all = tl.sum(count, 0)
    mean = tl.sum(total, 0) / tl.maximum(tokens_of_all, 1.0)
    squares = tl.zeros([BLOCK_SIZE], tl.float64)
    for begin in range(0, P, BLOCK_SIZE):
        p = begin + lane
        tokens = tl.load(parts + p * 3, mask=p < P, other=0.0)
        apart = tl.load(parts + p * 3 + 1, mask=p < P, other=0.0) - mean
        squares += tl.load(parts + p * 3 + 2, mask=p < P, other=0.0) + tokens * apart * apart
    tl.store(moments, tokens_of_all)
    tl.store(moments + 1, mean)
    tl.store(moments + 2, tl.sum(squares, 0))


@triton.jit
def whiten_kernel(
    x,  # [N]
    mask,  # [N] bool
    moments,  # [3] fp64
    out,  # [N]
    N,
    eps: tl.float64,
    SHIFT_MEAN: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    inside = tl.load(mask + i, mask=i < N, other=0) != 0
    x_i = tl.load(x + i, mask=inside, other=0.0).to(tl.float64)
    mean = tl.load(moments + 1)
    variance = tl.load(moments + 2) / tl.maximum(tl.load(moments) - 1.0, 1.0)
    white = (x_i - mean) * (1.0 / tl.sqrt(variance + eps))
    if not SHIFT_MEAN:
        white += mean
    tl.store(out + i, tl.where(inside, white, 0.0), mask=i < N)


def token_moments(x: Tensor, mask: Tensor, moments: Tensor) -> None:
    """Fill moments [3] of x [N] or [B, T]; see advantages.masked_whiten."""
    N = x.numel()
    parts = moments.new_empty(triton.cdiv(N, BLOCK_SIZE), 3)
    if N:
        launch(moments_kernel, len(parts), (x, mask, parts), (N,), **_CONSTANTS)
    launch(merge_kernel, 1, (parts, moments), (len(parts),), **_CONSTANTS)


def whiten_tokens(
    x: Tensor, mask: Tensor, moments: Tensor, shift_mean: bool, eps: float, out: Tensor
) -> None:
    """Fill out of x's shape; see advantages.masked_whiten."""
    N = x.numel()
    programs = triton.cdiv(N, BLOCK_SIZE)
    launch(whiten_kernel, programs, (x, mask, moments, out), (N, eps), SHIFT_MEAN=shift_mean, **_CONSTANTS)
