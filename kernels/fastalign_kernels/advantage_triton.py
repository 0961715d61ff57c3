"""GAE of advantage.py in Triton: one program a row, blocks of time from the last to the first, each a parallel scan.

Two scans a block. The next token's value is that of the nearest later token inside the mask: of two stretches of time, what the later one
has. The advantage is A[t] = b + a A[next], a = gamma lam, or A[next] itself outside the mask, and such maps compose to another one. Time is
loaded backwards, so that both are ordinary forward scans. Bytes: 2 B T e + B T read (values and mask once more from L1), 2 B T e written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
NUM_WARPS = 4


@triton.jit
def _newer(has, value, has_next, value_next):
    """Of two stretches the value of the second, where it has one."""
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
    gamma,
    decay,  # gamma lam
    HAS_BOOTSTRAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = row * T
    lane = tl.arange(0, BLOCK)
    following = tl.load(bootstrap + row) if HAS_BOOTSTRAP else 0.0  # value of the nearest token behind the block
    running = 0.0  # its advantage
    for begin in range(0, T, BLOCK):
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
        running = tl.sum(tl.where(lane == BLOCK - 1, advantage, 0.0), 0)
        last_inside = tl.sum(tl.where((lane == BLOCK - 1) & inside, 1, 0), 0) != 0
        last_value = tl.sum(tl.where(lane == BLOCK - 1, v, 0.0), 0)
        last_next = tl.sum(tl.where(lane == BLOCK - 1, next_value, 0.0), 0)
        following = tl.where(last_inside, last_value, last_next)


def gae_rows(
    rewards: Tensor, values: Tensor, mask: Tensor, bootstrap: Tensor | None, gamma: float, lam: float, advantages: Tensor, returns: Tensor
) -> None:
    """Fill advantages and returns [B, T]; see advantage.gae."""
    B, T = values.shape
    with torch.cuda.device_of(values):  # Triton launches on the current device
        gae_kernel[(B,)](
            rewards, values, mask, bootstrap, advantages, returns, T, gamma, gamma * lam, HAS_BOOTSTRAP=bootstrap is not None,
            BLOCK=min(BLOCK, max(16, triton.next_power_of_2(T))), num_warps=NUM_WARPS,
        )  # fmt: skip
