"""The kernels of policy/ops.py in Triton. A program computes a block of tokens and its sums.

The programs' sums are added in a fixed order. Vectors are contiguous fp32. There are no float atomics, so
results have the same bits every time. Bytes: 3 to 5 N e and N read, N e or 2 N e written. At [64, 1024]
tokens these are 1.6 MB, so the launch is the cost.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_options import as_scalar
from .ops import (
    LARGEST_EXPONENT,
    PolicyInputs,
    PolicyOptions,
    PolicyOutputs,
    PolicySum,
    ValueInputs,
    ValueSum,
)

BLOCK_SIZE = 1024
NUM_WARPS = 4
EXPONENT = tl.constexpr(LARGEST_EXPONENT)
# The sums' places by name, as constants of Triton.
POLICY_SUMS, VALUE_SUMS = tl.constexpr(len(PolicySum)), tl.constexpr(len(ValueSum))
LOSS, POLICY, ENTROPY, KL, RATIO, CLIPPED, SQUARES, TOKENS = (tl.constexpr(int(k)) for k in PolicySum)
(
    VALUE_LOSS,
    VALUE_CLIPPED,
    VALUE_RETURN,
    VALUE_RETURN_SQUARE,
    VALUE_ERROR,
    VALUE_ERROR_SQUARE,
    VALUE_TOKENS,
) = (tl.constexpr(int(k)) for k in ValueSum)


@triton.jit
def _exp_minus_1_minus_x(x):
    """By its series below 0.5, where the difference cancels (next term 2e-9 of it)."""
    p = 1.0 / 120 + x * (1.0 / 720 + x * (1.0 / 5040 + x * (1.0 / 40320 + x * (1.0 / 362880))))
    near = x * x * (0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * p)))
    return tl.where(tl.abs(x) < 0.5, near, tl.exp(x) - 1.0 - x)


@triton.jit
def _store_sum(sums, x, INDEX: tl.constexpr):
    """The sum of a block in fp64; in fp32 it would lose a digit."""
    tl.store(sums + INDEX, tl.sum(x.to(tl.float64), 0))


@triton.jit
def policy_kernel(
    logp,  # [N]
    old_logp,  # [N]
    advantages,  # [N]
    mask,  # [N] bool
    scale,  # [N] if SCALE_EACH, else [1]
    entropy,  # [N]; read if HAS_ENTROPY
    reference_logp,  # [N]; read if HAS_REFERENCE
    sums,  # [programs, 8] fp64, order of PolicySum
    grads,  # [2, N], the second row written if ENTROPY_GRADS
    N,
    lower: tl.float64,
    upper: tl.float64,
    dual: tl.float64,
    entropy_coefficient: tl.float64,
    kl_coefficient: tl.float64,
    SCALE_EACH: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    ENTROPY_GRADS: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    i = program * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    token = tl.load(mask + i, mask=i < N, other=0) != 0
    one = token.to(tl.float32)
    lower = as_scalar(lower, tl.float32)
    upper = as_scalar(upper, tl.float32)
    dual = as_scalar(dual, tl.float32)
    entropy_coefficient = as_scalar(entropy_coefficient, tl.float32)
    kl_coefficient = as_scalar(kl_coefficient, tl.float32)
    policy_logp = tl.load(logp + i, mask=token, other=0.0)
    d = policy_logp - tl.load(old_logp + i, mask=token, other=0.0)
    minus_a = -tl.load(advantages + i, mask=token, other=0.0)
    if SCALE_EACH:
        w = tl.load(scale + i, mask=token, other=0.0)
    else:
        w = tl.where(token, tl.load(scale), 0.0)
    held = tl.where(d > EXPONENT, EXPONENT, tl.where(d < -EXPONENT, -EXPONENT, d))  # NaN passes
    r = tl.exp(held)
    plain = minus_a * r
    high = (minus_a < 0) & (r > upper)
    low = (minus_a > 0) & (r < lower)
    beyond_dual = (minus_a > 0) & (r > dual)
    policy = tl.where(
        high, minus_a * upper, tl.where(beyond_dual, minus_a * dual, tl.where(low, minus_a * lower, plain))
    )
    clipped = high | low | beyond_dual
    grad = tl.where(clipped | (d > EXPONENT) | (d < -EXPONENT), 0.0, plain)
    loss = policy
    h = tl.zeros([BLOCK_SIZE], tl.float32)
    kl = h
    if HAS_ENTROPY:
        h = tl.load(entropy + i, mask=token, other=0.0)
        loss -= entropy_coefficient * h
    if HAS_REFERENCE:
        e = policy_logp - tl.load(reference_logp + i, mask=token, other=0.0)
        if KL_ESTIMATOR == 0:
            kl = e
            grad += tl.where(token, kl_coefficient, 0.0)
        elif KL_ESTIMATOR == 1:
            kl = 0.5 * e * e
            grad += kl_coefficient * e
        else:
            x = tl.where(e < -EXPONENT, EXPONENT, -e)
            kl = _exp_minus_1_minus_x(x)
            grad += tl.where(e < -EXPONENT, 0.0, -kl_coefficient * (kl + x))
        loss += kl_coefficient * kl
    sums += program * POLICY_SUMS
    _store_sum(sums, w * loss, LOSS)
    _store_sum(sums, policy, POLICY)
    _store_sum(sums, h, ENTROPY)
    _store_sum(sums, kl, KL)
    _store_sum(sums, one * r, RATIO)
    # Whether a NaN is clipped is unknown.
    _store_sum(sums, tl.where(policy != policy, policy, tl.where(clipped, one, 0.0)), CLIPPED)
    _store_sum(sums, 0.5 * d * d, SQUARES)
    _store_sum(sums, one, TOKENS)
    tl.store(grads + i, w * grad, mask=i < N)
    if ENTROPY_GRADS:
        tl.store(grads + N + i, -entropy_coefficient * w, mask=i < N)


@triton.jit
def value_kernel(
    values,  # [N]
    old_values,  # [N]
    returns,  # [N]
    mask,  # [N] bool
    scale,  # [N] if SCALE_EACH, else [1]
    sums,  # [programs, 7] fp64, order of ValueSum
    grads,  # [N]
    N,
    clip: tl.float64,
    SCALE_EACH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    i = program * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
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
    old_is_nan = old != old  # no comparison with a NaN is true, so it would be passed over
    worse = tl.where(old_is_nan, old, tl.where(clipped, held, plain))
    wide_target = target.to(tl.float64)
    wide_error = plain.to(tl.float64)
    sums += program * VALUE_SUMS
    _store_sum(sums, 0.5 * w * worse * worse, VALUE_LOSS)
    _store_sum(sums, tl.where(worse != worse, worse, tl.where(clipped, one, 0.0)), VALUE_CLIPPED)
    _store_sum(sums, wide_target, VALUE_RETURN)
    _store_sum(sums, wide_target * wide_target, VALUE_RETURN_SQUARE)
    _store_sum(sums, wide_error, VALUE_ERROR)
    _store_sum(sums, wide_error * wide_error, VALUE_ERROR_SQUARE)
    _store_sum(sums, one, VALUE_TOKENS)
    tl.store(grads + i, tl.where(old_is_nan, old, tl.where(clipped, 0.0, w * plain)), mask=i < N)


def _launch(
    kernel: triton.JITFunction,
    inputs: Sequence[Tensor | None],
    sums: Tensor,
    grads: Tensor,
    *numbers: float,
    **flags,
) -> None:
    assert inputs[0] is not None
    N = inputs[0].numel()
    parts = sums.new_empty(triton.cdiv(N, BLOCK_SIZE), len(sums))
    if N:
        with torch.cuda.device_of(grads):  # Triton launches on the current device
            kernel[(len(parts),)](
                *inputs, parts, grads, N, *numbers, **flags, BLOCK_SIZE=BLOCK_SIZE, num_warps=NUM_WARPS
            )
    torch.sum(parts, 0, out=sums)


def policy_tokens(inputs: PolicyInputs, options: PolicyOptions, out: PolicyOutputs) -> None:
    """Write sums [8] and grads [1, ..] or [2, ..]; see ops.policy_sums."""
    _launch(
        policy_kernel,
        inputs,
        *out,
        *options[:-1],
        SCALE_EACH=inputs.scale.numel() > 1,
        HAS_ENTROPY=inputs.entropy is not None,
        HAS_REFERENCE=inputs.reference_logp is not None,
        ENTROPY_GRADS=out.grads.shape[0] > 1,
        KL_ESTIMATOR=options.kl_estimator,
    )


def value_tokens(inputs: ValueInputs, clip: float, sums: Tensor, grads: Tensor) -> None:
    """Write sums [7] and grads; see ops.value_op."""
    _launch(value_kernel, inputs, sums, grads, clip, SCALE_EACH=inputs.scale.numel() > 1)
