"""The kernels of policy/ops.py in Triton: two launches give the loss, the metrics and the gradients.

A program of the first launch computes a block of tokens and its sums. A program of the second adds the
blocks' sums in a fixed order; the first one writes the loss and the metrics. What a mean divides by, such as
the number of tokens, is known only then, and each program multiplies a block of the gradients by its
reciprocal. A mean over sequences needs a third launch before these: torch sums the mask of each row. There
are no float atomics, so results have the same bits every time. Vectors are contiguous; the kernels compute in
fp32. Bytes: 3 to 5 N e and N read, N e or 2 N e written, and for a mean 2 or 4 N e more. At [64, 1024] tokens
these are 2 MB, so the launch is the cost.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_launch import launch
from ..triton_options import as_scalar
from .ops import (
    LARGEST_EXPONENT,
    PolicyInputs,
    PolicyOptions,
    PolicyOutputs,
    PolicySum,
    ValueInputs,
    ValueOutputs,
    ValueSum,
)
from .weights import TokenWeights, Weighting

BLOCK_SIZE = 1024
SCALE_BLOCK_SIZE = 4096  # gradients that a program of the second launch multiplies
SUMS_AT_ONCE = 128  # blocks whose sums are loaded together
NUM_WARPS = 4
EXPONENT = tl.constexpr(LARGEST_EXPONENT)
DIVISORS = {Weighting.TOKENS: "tokens", Weighting.DIVISOR: "given"}  # of finish_kernel, by kind
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
    """e^x - 1 - x; below 0.5, where the difference cancels, by its series (next term 2e-9 of it)."""
    p = 1.0 / 120 + x * (1.0 / 720 + x * (1.0 / 5040 + x * (1.0 / 40320 + x * (1.0 / 362880))))
    near = x * x * (0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * p)))
    return tl.where(tl.abs(x) < 0.5, near, tl.exp(x) - 1.0 - x)


@triton.jit
def _store_sum(sums, x, INDEX: tl.constexpr):
    """The sum of a block in fp64; in fp32 it would lose a digit."""
    tl.store(sums + INDEX, tl.sum(x.to(tl.float64), 0))


@triton.jit
def _load(pointer, i, token):
    """fp32 values of the tokens of the mask, 0 elsewhere."""
    return tl.load(pointer + i, mask=token, other=0.0).to(tl.float32)


@triton.jit
def _weights(weights, number, i, T, token, WEIGHTS: tl.constexpr):
    """What each token counts in the loss, before finish_kernel divides."""
    w = tl.where(token, as_scalar(number, tl.float32), 0.0)
    if WEIGHTS == "each":
        w = _load(weights, i, token)
    elif WEIGHTS == "one":
        w = tl.where(token, tl.load(weights), 0.0)
    elif WEIGHTS == "rows":
        w /= tl.maximum(tl.load(weights + i // T, mask=token, other=1), 1).to(tl.float32)
    return w


@triton.jit
def policy_kernel(
    logp,  # [N]
    old_logp,  # [N]
    advantages,  # [N]
    mask,  # [N] bool
    weights,  # [N] if WEIGHTS == "each", [1] if "one", [N / T] tokens of each row if "rows", else None
    entropy,  # [N]; read if HAS_ENTROPY
    reference_logp,  # [N]; read if HAS_REFERENCE
    sums,  # [programs, 8] fp64, order of PolicySum
    grads,  # [2, N], the second row written if ENTROPY_GRADS
    N,
    T,
    lower: tl.float64,
    upper: tl.float64,
    dual: tl.float64,
    entropy_coefficient: tl.float64,
    kl_coefficient: tl.float64,
    number: tl.float64,  # the weight of each token if WEIGHTS == "number", a factor of it if "rows"
    WEIGHTS: tl.constexpr,
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
    policy_logp = _load(logp, i, token)
    d = policy_logp - _load(old_logp, i, token)
    minus_a = -_load(advantages, i, token)
    w = _weights(weights, number, i, T, token, WEIGHTS)
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
        h = _load(entropy, i, token)
        # With 0 it is a metric alone, and 0 * inf would be NaN.
        loss -= tl.where(entropy_coefficient == 0, 0.0, entropy_coefficient * h)
    if HAS_REFERENCE:
        e = policy_logp - _load(reference_logp, i, token)
        if KL_ESTIMATOR == 0:
            kl = e
            kl_grad = tl.where(token, kl_coefficient, 0.0)
        elif KL_ESTIMATOR == 1:
            kl = 0.5 * e * e
            kl_grad = kl_coefficient * e
        else:
            x = tl.where(e < -EXPONENT, EXPONENT, -e)
            kl = _exp_minus_1_minus_x(x)
            kl_grad = tl.where(e < -EXPONENT, 0.0, -kl_coefficient * (kl + x))
        grad += tl.where(kl_coefficient == 0, 0.0, kl_grad)
        loss += tl.where(kl_coefficient == 0, 0.0, kl_coefficient * kl)
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
    weights,  # [N] if WEIGHTS == "each", [1] if "one", [N / T] tokens of each row if "rows", else None
    sums,  # [programs, 7] fp64, order of ValueSum
    grads,  # [N]
    N,
    T,
    clip: tl.float64,
    number: tl.float64,
    WEIGHTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    i = program * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    token = tl.load(mask + i, mask=i < N, other=0) != 0
    one = token.to(tl.float32)
    v = _load(values, i, token)
    old = _load(old_values, i, token)
    target = _load(returns, i, token)
    w = _weights(weights, number, i, T, token, WEIGHTS)
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


@triton.jit
def _place(sums, index):
    """One number of a vector of 8."""
    return tl.sum(tl.where(tl.arange(0, 8) == index, sums, 0.0), 0)


@triton.jit
def finish_kernel(
    parts,  # [P, COUNT] fp64, order of PolicySum or ValueSum
    loss,  # scalar
    metrics,  # [8] means over the tokens if POLICY_LOSS, else [2]: clip_fraction, explained_variance
    grads,  # [count]; read and written unless DIVISOR == "none"
    divisor,  # scalar if DIVISOR == "given", [B] tokens of each row if "rows", else None
    P,
    B,
    count,
    POLICY_LOSS: tl.constexpr,
    DIVISOR: tl.constexpr,  # what the loss and grads are divided by: "tokens", rows with tokens, "given"
    SUMS_AT_ONCE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    COUNT: tl.constexpr = POLICY_SUMS if POLICY_LOSS else VALUE_SUMS
    which = tl.arange(0, 8)
    sums = tl.zeros([8], tl.float64)
    for begin in range(0, P, SUMS_AT_ONCE):
        p = begin + tl.arange(0, SUMS_AT_ONCE)
        there = (p < P)[:, None] & (which < COUNT)[None, :]
        sums += tl.sum(tl.load(parts + p[:, None] * COUNT + which[None, :], mask=there, other=0.0), 0)
    tokens = tl.maximum(_place(sums, TOKENS if POLICY_LOSS else VALUE_TOKENS), 1.0)
    factor = tl.full((), 1.0, tl.float64)
    if DIVISOR == "tokens":
        factor /= tokens
    elif DIVISOR == "rows":
        rows = tl.zeros([SUMS_AT_ONCE], tl.float64)
        for begin in range(0, B, SUMS_AT_ONCE):
            row = begin + tl.arange(0, SUMS_AT_ONCE)
            rows += (tl.load(divisor + row, mask=row < B, other=0) > 0).to(tl.float64)
        factor /= tl.maximum(tl.sum(rows, 0), 1.0)
    elif DIVISOR == "given":
        given = tl.load(divisor).to(tl.float64)
        factor /= tl.where(given == 0, 1.0, given)  # 0: the whole batch has no token, and here is none
    program = tl.program_id(0).to(tl.int64)
    if program == 0:
        tl.store(loss, (_place(sums, LOSS if POLICY_LOSS else VALUE_LOSS) * factor).to(tl.float32))
        means = sums / tokens
        if POLICY_LOSS:
            tl.store(metrics + which, means.to(tl.float32))
        else:
            target = _place(means, VALUE_RETURN)
            target_square = _place(means, VALUE_RETURN_SQUARE)
            error = _place(means, VALUE_ERROR)
            spread = target_square - target * target
            left = _place(means, VALUE_ERROR_SQUARE) - error * error
            varies = spread > 1e-12 * target_square  # below, the difference is rounding
            explained = tl.where(varies, 1.0 - left / tl.where(varies, spread, 1.0), float("nan"))
            tl.store(metrics, _place(means, VALUE_CLIPPED).to(tl.float32))
            tl.store(metrics + 1, explained.to(tl.float32))
    if DIVISOR != "none":
        i = program * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        scaled = tl.load(grads + i, mask=i < count, other=0.0) * factor.to(tl.float32)
        tl.store(grads + i, scaled, mask=i < count)


class _Weights(NamedTuple):
    """`TokenWeights` as the two kernels take them: _weights' arguments, then finish_kernel's."""

    tensor: Tensor | None
    number: float
    how: str
    divisor: Tensor | None
    divisor_how: str

    @classmethod
    def of(cls, weights: TokenWeights, mask: Tensor) -> _Weights:
        kind, tensor, number = weights
        if kind == Weighting.GIVEN:
            assert tensor is not None
            return cls(tensor.contiguous(), 1.0, "one" if tensor.numel() == 1 else "each", None, "none")
        if kind == Weighting.SEQUENCES:
            counts = mask.sum(1)
            divisor = (None, "none") if number else (counts, "rows") if tensor is None else (tensor, "given")
            return cls(counts, 1 / (number or 1), "rows", *divisor)
        divisor_how = DIVISORS.get(kind, "none")
        return cls(None, number or 1.0, "number", tensor, divisor_how)


def _launch(
    kernel: triton.JITFunction,
    inputs: PolicyInputs | ValueInputs,
    out: PolicyOutputs | ValueOutputs,
    *numbers: float,
    **flags,
) -> None:
    is_policy = isinstance(inputs, PolicyInputs)
    mask = inputs.mask.contiguous()
    N, count = mask.numel(), out.grads.numel()
    programs = max(1, -(-N // BLOCK_SIZE))  # triton.cdiv takes the host 2 us
    parts = out.loss.new_empty(programs, len(PolicySum) if is_policy else len(ValueSum), dtype=torch.float64)
    weights = _Weights.of(inputs.weights, mask)
    first, second, third, *rest = (None if x is None else x.contiguous() for x in inputs.tensors)
    finishers = 1 if weights.divisor_how == "none" else max(1, -(-count // SCALE_BLOCK_SIZE))
    launch(
        kernel,
        programs,
        (first, second, third, mask, weights.tensor, *rest, parts, out.grads),
        (N, mask.shape[-1], *numbers, weights.number),
        **flags,
        WEIGHTS=weights.how,
        BLOCK_SIZE=BLOCK_SIZE,
        num_warps=NUM_WARPS,
    )
    launch(
        finish_kernel,
        finishers,
        (parts, *out, weights.divisor),
        (programs, mask.shape[0], count),
        POLICY_LOSS=is_policy,
        DIVISOR=weights.divisor_how,
        SUMS_AT_ONCE=SUMS_AT_ONCE,
        BLOCK_SIZE=SCALE_BLOCK_SIZE,
        num_warps=NUM_WARPS,
    )


def policy_tokens(inputs: PolicyInputs, options: PolicyOptions) -> PolicyOutputs:
    """The policy loss of tokens, launched for `ops.run_policy`."""
    out = PolicyOutputs.empty(inputs, options)
    *numbers, kl_estimator = options
    _launch(
        *(policy_kernel, inputs, out, *numbers),
        HAS_ENTROPY=inputs.entropy is not None,
        HAS_REFERENCE=inputs.reference_logp is not None,
        ENTROPY_GRADS=out.grads.shape[0] > 1,
        KL_ESTIMATOR=kl_estimator,
    )
    return out


def value_tokens(inputs: ValueInputs, clip: float) -> ValueOutputs:
    """The value loss of tokens, launched for `ops.value_op`."""
    out = ValueOutputs.empty(inputs)
    _launch(value_kernel, inputs, out, clip)
    return out
