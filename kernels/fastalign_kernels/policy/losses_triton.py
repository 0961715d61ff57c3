"""The kernels of policy/losses.py in Triton: a block of tokens a program, whose sums are added up afterwards in a
fixed order.

Vectors are contiguous fp32. No float atomics, so results are the same bits every time. Bytes: 3 to 5 N e and
N read, N e or 2 N e written; at [64, 1024] tokens 1.6 MB, so the launch is the cost.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_options import as_scalar

BLOCK = 1024
NUM_WARPS = 4
LARGEST_EXPONENT = tl.constexpr(20.0)


@triton.jit
def _exp_minus_1_minus_x(x):
    """By its series below 0.5, where the difference cancels (next term 2e-9 of it)."""
    p = 1.0 / 120 + x * (1.0 / 720 + x * (1.0 / 5040 + x * (1.0 / 40320 + x * (1.0 / 362880))))
    near = x * x * (0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * p)))
    return tl.where(tl.abs(x) < 0.5, near, tl.exp(x) - 1.0 - x)


@triton.jit
def _add_up(sums, x, k, program, COUNT: tl.constexpr):
    """In fp64: fp32 sums of a block would lose a digit."""
    tl.store(sums + program * COUNT + k, tl.sum(x.to(tl.float64), 0))


@triton.jit
def policy_kernel(
    logp,  # [N]
    old_logp,  # [N]
    advantages,  # [N]
    mask,  # [N] bool
    scale,  # [N] if SCALE_EACH, else [1]
    entropy,  # [N]; read if HAS_ENTROPY
    reference_logp,  # [N]; read if HAS_REFERENCE
    sums,  # [programs, 8] fp64, order of policy.PolicySum
    slopes,  # [2, N], the second row written if ENTROPY_SLOPES
    N,
    lower: tl.float64,
    upper: tl.float64,
    dual: tl.float64,
    entropy_coefficient: tl.float64,
    kl_coefficient: tl.float64,
    SCALE_EACH: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    ENTROPY_SLOPES: tl.constexpr,
    KL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    i = program * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(mask + i, mask=i < N, other=0) != 0
    one = token.to(tl.float32)
    lower = as_scalar(lower, tl.float32)
    upper = as_scalar(upper, tl.float32)
    dual = as_scalar(dual, tl.float32)
    entropy_coefficient = as_scalar(entropy_coefficient, tl.float32)
    kl_coefficient = as_scalar(kl_coefficient, tl.float32)
    own = tl.load(logp + i, mask=token, other=0.0)
    d = own - tl.load(old_logp + i, mask=token, other=0.0)
    minus_a = -tl.load(advantages + i, mask=token, other=0.0)
    if SCALE_EACH:
        w = tl.load(scale + i, mask=token, other=0.0)
    else:
        w = tl.where(token, tl.load(scale), 0.0)
    held = tl.where(
        d > LARGEST_EXPONENT, LARGEST_EXPONENT, tl.where(d < -LARGEST_EXPONENT, -LARGEST_EXPONENT, d)
    )  # NaN passes
    r = tl.exp(held)
    plain = minus_a * r
    high = (minus_a < 0) & (r > upper)
    low = (minus_a > 0) & (r < lower)
    doubly = (minus_a > 0) & (r > dual)
    policy = tl.where(
        high, minus_a * upper, tl.where(doubly, minus_a * dual, tl.where(low, minus_a * lower, plain))
    )
    clipped = high | low | doubly
    slope = tl.where(clipped | (d > LARGEST_EXPONENT) | (d < -LARGEST_EXPONENT), 0.0, plain)
    loss = policy
    h = tl.zeros([BLOCK], tl.float32)
    kl = h
    if HAS_ENTROPY:
        h = tl.load(entropy + i, mask=token, other=0.0)
        loss -= entropy_coefficient * h
    if HAS_REFERENCE:
        e = own - tl.load(reference_logp + i, mask=token, other=0.0)
        if KL == 0:
            kl = e
            slope += tl.where(token, kl_coefficient, 0.0)
        elif KL == 1:
            kl = 0.5 * e * e
            slope += kl_coefficient * e
        else:
            x = tl.where(e < -LARGEST_EXPONENT, LARGEST_EXPONENT, -e)
            kl = _exp_minus_1_minus_x(x)
            slope += tl.where(e < -LARGEST_EXPONENT, 0.0, -kl_coefficient * (kl + x))
        loss += kl_coefficient * kl
    _add_up(sums, w * loss, 0, program, 8)
    _add_up(sums, policy, 1, program, 8)
    _add_up(sums, h, 2, program, 8)
    _add_up(sums, kl, 3, program, 8)
    _add_up(sums, one * r, 4, program, 8)
    _add_up(
        sums, tl.where(policy != policy, policy, tl.where(clipped, one, 0.0)), 5, program, 8
    )  # of a NaN nobody knows
    _add_up(sums, 0.5 * d * d, 6, program, 8)
    _add_up(sums, one, 7, program, 8)
    tl.store(slopes + i, w * slope, mask=i < N)
    if ENTROPY_SLOPES:
        tl.store(slopes + N + i, -entropy_coefficient * w, mask=i < N)


@triton.jit
def value_kernel(
    values,  # [N]
    old_values,  # [N]
    returns,  # [N]
    mask,  # [N] bool
    scale,  # [N] if SCALE_EACH, else [1]
    sums,  # [programs, 7] fp64, order of policy.ValueSum
    slopes,  # [N]
    N,
    clip: tl.float64,
    SCALE_EACH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    i = program * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(mask + i, mask=i < N, other=0) != 0
    one = token.to(tl.float32)
    v = tl.load(values + i, mask=token, other=0.0)
    old = tl.load(old_values + i, mask=token, other=0.0)
    target = tl.load(returns + i, mask=token, other=0.0)
    if SCALE_EACH:
        w = tl.load(scale + i, mask=token, other=0.0)
    else:
        w = tl.where(token, tl.load(scale), 0.0)
    clip = as_scalar(clip, tl.float32)
    plain = v - target
    held = tl.where(v < old - clip, old - clip, tl.where(v > old + clip, old + clip, v)) - target
    clipped = held * held > plain * plain
    broken = old != old  # no comparison with a NaN is true, so it would be passed over
    worse = tl.where(broken, old, tl.where(clipped, held, plain))
    wide_target = target.to(tl.float64)
    wide_error = plain.to(tl.float64)
    _add_up(sums, 0.5 * w * worse * worse, 0, program, 7)
    _add_up(sums, tl.where(worse != worse, worse, tl.where(clipped, one, 0.0)), 1, program, 7)
    _add_up(sums, wide_target, 2, program, 7)
    _add_up(sums, wide_target * wide_target, 3, program, 7)
    _add_up(sums, wide_error, 4, program, 7)
    _add_up(sums, wide_error * wide_error, 5, program, 7)
    _add_up(sums, one, 6, program, 7)
    tl.store(slopes + i, tl.where(broken, old, tl.where(clipped, 0.0, w * plain)), mask=i < N)


def _launch(
    kernel: triton.JITFunction,
    tensors: list[Tensor | None],
    sums: Tensor,
    slopes: Tensor,
    *numbers: float,
    **flags,
) -> None:
    assert tensors[0] is not None
    N = tensors[0].numel()
    parts = sums.new_empty(triton.cdiv(N, BLOCK), len(sums))
    if N:
        with torch.cuda.device_of(slopes):  # Triton launches on the current device
            kernel[(len(parts),)](
                *tensors, parts, slopes, N, *numbers, **flags, BLOCK=BLOCK, num_warps=NUM_WARPS
            )
    torch.sum(parts, 0, out=sums)


def policy_tokens(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    scale: Tensor,
    entropy: Tensor | None,
    reference_logp: Tensor | None,
    lower: float,
    upper: float,
    dual: float,
    entropy_coefficient: float,
    kl_coefficient: float,
    kl_estimator: int,
    sums: Tensor,
    slopes: Tensor,
) -> None:
    """Fill sums [8] and slopes [1, ..] or [2, ..]; see policy.policy_sums."""
    tensors = [logp, old_logp, advantages, mask, scale, entropy, reference_logp]
    _launch(
        policy_kernel, tensors, sums, slopes, lower, upper, dual, entropy_coefficient, kl_coefficient, SCALE_EACH=scale.numel() > 1,
        HAS_ENTROPY=entropy is not None, HAS_REFERENCE=reference_logp is not None, ENTROPY_SLOPES=slopes.shape[0] > 1, KL=kl_estimator,
    )  # fmt: skip


def value_tokens(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    scale: Tensor,
    clip: float,
    sums: Tensor,
    slopes: Tensor,
) -> None:
    """Fill sums [7] and slopes; see policy.value_op."""
    _launch(
        value_kernel,
        [values, old_values, returns, mask, scale],
        sums,
        slopes,
        clip,
        SCALE_EACH=scale.numel() > 1,
    )
