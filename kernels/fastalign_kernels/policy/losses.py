"""Losses of policy optimisation over tokens: the clipped ratio of PPO and its kin, and the clipped error of a
value model.

For each token inside the mask, with d = logp - old_logp, r = e^d, A its advantage, H its entropy and w its
scale, 1 / tokens for a mean,

    policy = max(-A r, -A min(max(r, 1 - clip), 1 + clip_high)), and, with a dual clip c and A < 0, at most -A c
    loss   = sum w (policy - entropy_coefficient H + kl_coefficient KL),     KL an estimator of `KL_ESTIMATORS`
    value  = sum w max((v - R)^2, (min(max(v, v_old - clip), v_old + clip) - R)^2) / 2

in nats. One pass gives the loss, all metrics, and d loss / d logp and d loss / d entropy. The backward pass
scales them where they lie by what arrives from upstream (on a CPU 1 is left out), so a second derivative is
an error. Sums are taken over fixed blocks, added up in fp64, so they do not depend on the number of threads.
Bytes: 3 to 5 N e and N read, N e or 2 N e written.

Exponents d are held within +-20, as verl has it: beyond, r is e^20 or e^-20 and its gradient 0, so that no
ratio is infinite. What stands outside the mask, NaN too, reaches nothing, and its gradient is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..autograd import InputGrads, first_order, save_loss, saved_inputs, scale_saved_grads
from ..dispatch import Kernels
from ..softmax.rows import traced
from ..torch_func import transforming
from .arguments import accumulator_of, check_tokens, per_token, token_scale


class PolicyLoss(NamedTuple):
    """loss (differentiable); without gradient, means over the mask of `ppo_loss`'s metrics. All scalars;
    None: not asked for."""

    loss: Tensor
    policy_loss: Tensor
    entropy: Tensor | None
    kl: Tensor | None
    mean_ratio: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor


class ValueLoss(NamedTuple):
    """Scalars: loss (differentiable); without gradient, clip_fraction and explained_variance over the
    mask."""

    loss: Tensor
    clip_fraction: Tensor
    explained_variance: Tensor


KL_ESTIMATORS = ("k1", "k2", "k3")
LARGEST_EXPONENT = 20.0
ABOVE_ONE = 1 + 2**-23  # the next number after 1 in fp32


class PolicySum(IntEnum):
    """Sums over the mask that policy_tokens writes, [8] fp64; csrc/policy/losses.h and policy/losses_triton.py write the
    same order."""

    LOSS = 0  # times the scale
    POLICY = 1
    ENTROPY = 2
    KL = 3
    RATIO = 4
    CLIPPED = 5
    SQUARES = 6  # d^2 / 2
    TOKENS = 7


class ValueSum(IntEnum):
    """Sums over the mask that value_tokens writes, [7] fp64."""

    LOSS = 0  # times the scale
    CLIPPED = 1
    RETURN = 2
    RETURN_SQUARE = 3
    ERROR = 4  # v - R
    ERROR_SQUARE = 5
    TOKENS = 6


class PolicyOptions(NamedTuple):
    """The options in the form that the kernels take: bounds of the ratio, infinite where there is none, and
    the estimator's index."""

    lower: float
    upper: float
    dual: float
    entropy_coefficient: float
    kl_coefficient: float
    kl_estimator: int

    @classmethod
    def of(cls, numbers: list[float]) -> PolicyOptions:
        """From a list, as which ops take them: each argument of an op costs some microseconds a call."""
        lower, upper, dual, entropy_coefficient, kl_coefficient, kl_estimator = numbers
        return cls(lower, upper, dual, entropy_coefficient, kl_coefficient, int(kl_estimator))


# PyTorch in place of csrc/policy/losses.h where the native library is missing, and for fp64 on a GPU: same
# arguments, the last two are written.


def _policy_tokens(
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
    d = torch.where(mask, logp - old_logp, 0.0)
    a = torch.where(mask, advantages, 0.0)
    r = d.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT).exp()
    high, low, doubly = (a > 0) & (r > upper), (a < 0) & (r < lower), (a < 0) & (r > dual)
    policy = plain = -a * r
    for beyond, bound in ((high, upper), (low, lower), (doubly, dual)):
        policy = torch.where(beyond, -a * bound, policy)
    clipped = high | low | doubly
    slope = torch.where(clipped | (d.abs() > LARGEST_EXPONENT), 0.0, plain)
    loss = policy
    h = kl = torch.zeros_like(slopes[0])
    if entropy is not None:
        h = torch.where(mask, entropy, 0.0)
        loss = loss - entropy_coefficient * h
    if reference_logp is not None:
        kl, d_kl = _kl(torch.where(mask, logp - reference_logp, 0.0), kl_estimator)
        loss = loss + kl_coefficient * kl
        slope = slope + kl_coefficient * d_kl
    inside = torch.where(mask, scale, 0.0)
    torch.mul(inside, slope, out=slopes[0])
    if slopes.shape[0] > 1:
        torch.mul(inside, -entropy_coefficient, out=slopes[1])
    clips = torch.where(policy.isnan(), policy, clipped)  # of a NaN nobody knows
    rows = (inside * loss, policy, h, kl, torch.where(mask, r, 0.0), clips, 0.5 * d * d, mask)
    sums.copy_(torch.stack([row.sum(dtype=torch.float64) for row in rows]))


def _kl(d: Tensor, estimator: int) -> tuple[Tensor, Tensor]:
    """The estimator at d = logp - reference_logp, and its derivative."""
    if KL_ESTIMATORS[estimator] == "k1":
        return d, torch.ones_like(d)
    if KL_ESTIMATORS[estimator] == "k2":
        return 0.5 * d * d, d
    e = torch.expm1(-d.clamp(min=-LARGEST_EXPONENT))
    return e + d.clamp(min=-LARGEST_EXPONENT), torch.where(d < -LARGEST_EXPONENT, 0.0, -e)


def _value_tokens(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    scale: Tensor,
    clip: float,
    sums: Tensor,
    slopes: Tensor,
) -> None:
    v, old, target, inside = (torch.where(mask, x, 0.0) for x in (values, old_values, returns, scale))
    plain, held = v - target, torch.clamp(v, old - clip, old + clip) - target
    clipped = held * held > plain * plain
    # No comparison with a NaN is true, so one in old would be passed over.
    torch.mul(inside, torch.where(old.isnan(), old, torch.where(clipped, 0.0, plain)), out=slopes)
    worse = torch.where(old.isnan(), old, torch.where(clipped, held, plain))
    clips = torch.where(worse.isnan(), worse, clipped)
    rows = (
        0.5 * inside * worse * worse,
        clips,
        target,
        target.double() ** 2,
        plain,
        plain.double() ** 2,
        mask,
    )
    sums.copy_(torch.stack([row.sum(dtype=torch.float64) for row in rows]))


KERNELS = Kernels(
    SimpleNamespace(policy_tokens=_policy_tokens, value_tokens=_value_tokens),
    triton=".policy.losses_triton",
    triton_fp64=False,
)


def policy_sums(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    scale: Tensor,
    entropy: Tensor | None,
    reference_logp: Tensor | None,
    options: PolicyOptions,
) -> tuple[Tensor, Tensor]:
    """`PolicySum`s [8] fp64, and d loss / d logp [1, ..], or with d loss / d entropy [2, ..], in scale's
    dtype, fp32 or fp64.

    All of logp's shape. mask: bool. scale: [1], or one for each token of the mask. What stands outside the
    mask is not used.
    """
    first, others = (
        _dense(scale.dtype, logp, old_logp, advantages),
        _dense(scale.dtype, scale, entropy, reference_logp),
    )
    sums, slopes = _policy_outputs(logp, entropy, scale, options)
    KERNELS.select(slopes).policy_tokens(*first, mask.contiguous(), *others, *options, sums, slopes)
    return sums, slopes


def _policy_outputs(
    logp: Tensor, entropy: Tensor | None, scale: Tensor, options: PolicyOptions
) -> tuple[Tensor, Tensor]:
    rows = 1 if entropy is None or options.entropy_coefficient == 0 else 2
    return scale.new_empty(len(PolicySum), dtype=torch.float64), scale.new_empty(rows, *logp.shape)


def _dense(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.to(dtype).contiguous() for x in tensors]


def _policy(
    logp: Tensor,
    entropy: Tensor | None,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    scale: Tensor,
    reference_logp: Tensor | None,
    options: list[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and `policy_sums`."""
    sums, slopes = policy_sums(
        logp, old_logp, advantages, mask, scale, entropy, reference_logp, PolicyOptions.of(options)
    )
    return sums[PolicySum.LOSS].to(scale.dtype, copy=True), sums, slopes


policy_op = torch.library.custom_op("fastalign::policy_loss", _policy, mutates_args=())


@policy_op.register_fake
def _(logp, entropy, old_logp, advantages, mask, scale, reference_logp, options):
    return scale.new_empty(()), *_policy_outputs(logp, entropy, scale, PolicyOptions.of(options))


def _policy_gradients(ctx, saved: Sequence[Tensor], grad: Tensor | None, *_: None) -> InputGrads:
    inputs = saved_inputs(ctx, saved)
    nothing = (None,) * len(inputs)
    if grad is None:
        return nothing
    (slopes,) = scale_saved_grads(ctx, grad, lambda: _policy(*inputs)[2:])
    gradients = [row.to(x.dtype) for row, x in zip(slopes, inputs)]
    return *gradients, *nothing[len(gradients) :]


_policy_backward = first_order("ppo_loss", _policy_gradients)
policy_op.register_autograd(_policy_backward, setup_context=save_loss)


class _EagerPolicy(torch.autograd.Function):
    """policy_op without the dispatcher, whose layers in Python take 30 us a call: as long as the kernel does
    for [64, 1024] tokens.

    Without setup_context too, for which torch inspects the signature of forward at every call, 12 us.
    """

    @staticmethod
    def forward(ctx, *inputs):
        output = _policy(*inputs)
        save_loss(ctx, inputs, output)
        return output

    backward = staticmethod(_policy_backward)


@torch.library.custom_op("fastalign::value_loss", mutates_args=())
def value_op(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, scale: Tensor, clip: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, `ValueSum`s [7] fp64 and d loss / d values; mask and scale as in `policy_sums`."""
    dense = _dense(scale.dtype, values, old_values, returns)
    sums, slopes = scale.new_empty(len(ValueSum), dtype=torch.float64), scale.new_empty(values.shape)
    KERNELS.select(slopes).value_tokens(*dense, mask.contiguous(), scale, clip, sums, slopes)
    return sums[ValueSum.LOSS].to(scale.dtype, copy=True), sums, slopes


@value_op.register_fake
def _(values, old_values, returns, mask, scale, clip):
    return (
        scale.new_empty(()),
        scale.new_empty(len(ValueSum), dtype=torch.float64),
        scale.new_empty(values.shape),
    )


def _save_value(ctx, inputs, output) -> None:
    _, sums, slopes = output
    ctx.mark_non_differentiable(sums, slopes)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], slopes)


def _value_backward(ctx, saved: Sequence[Tensor], grad: Tensor | None, *_: None) -> InputGrads:
    values, slopes = saved
    return (None if grad is None else (grad * slopes).to(values.dtype), *(None,) * 5)


value_op.register_autograd(first_order("value_loss", _value_backward), setup_context=_save_value)


def ppo_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float | None = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    entropy: Tensor | None = None,
    entropy_coefficient: float = 0.0,
    reference_logp: Tensor | None = None,
    kl_coefficient: float = 0.0,
    kl_estimator: str = "k3",
    aggregation: str = "token_mean",
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> PolicyLoss:
    """PPO's clipped loss (1707.06347, eq. 7) over the tokens of a mask, with the options of its kin; formula
    at the top of this file.

    Args:
        logp: [B, T] or packed [N] fp32, bf16, fp16 or fp64, log-probabilities of the tokens in nats. Differentiable.
        old_logp: of logp's shape: of the policy that drew the tokens. None: that is this one, so every ratio is 1. Never given a gradient.
        advantages: of logp's shape: what each token is worth; or [B] or [B, 1] beside [B, T], one number a row. Never given a gradient.
        mask: of logp's shape, bool or integers, nonzero where a token counts, or floats, of which each is 0 or 1. What stands elsewhere is
            not used. On a GPU other floats are a device-side assertion, as ids out of range are in torch; FASTALIGN_CHECK=1 makes it a
            ValueError.
        clip, clip_high: the ratio is held within [1 - clip, 1 + clip_high], >= 0; clip_high None: as clip (DAPO, 2503.14476, has its own);
            clip None: no bound below, nor above without clip_high.
        dual_clip: with a negative advantage the loss is at most -A dual_clip, > 1 (1912.09729, which takes 3). None: no such bound.
        entropy: of logp's shape, nats, subtracted entropy_coefficient times. Differentiable. Given without a coefficient it is a metric.
        reference_logp: of logp's shape; its KL from the policy is added kl_coefficient times. Never given a gradient.
        kl_estimator: with d = logp - reference_logp, k1: d; k2: d^2 / 2; k3: e^-d - 1 + d (d below -20 counts as -20, without gradient).
            The gradient of k1 has a mean of 0 over the policy's own draws, so as a loss take k2 or k3.
        aggregation: "token_mean" over the mask; "sequence_mean", over sequences with a token, of their means over tokens; "sum".
        normalizer: takes the place of the tokens ("token_mean"), of the sequences ("sequence_mean") or of 1 ("sum") as divisor: give the
            whole batch's, and losses of micro-batches and ranks add up to the batch's. A number > 0 or a scalar tensor, no gradient.
        cu_seqlens: [S + 1], where packed sequences begin and end, for "sequence_mean" of [N].

    Returns: The loss, and means over the tokens of the mask, whatever the aggregation: policy_loss; entropy
        and kl, None without entropy and reference_logp; mean_ratio; clip_fraction, the share of tokens that a
        clip, the dual one included, leaves without a gradient; approx_kl, (logp - old_logp)^2 / 2, TRL's
        policy/approxkl_avg. fp32; fp64 if an input is. Scalars; the host waits for nothing. Everything is 0
        where the mask is empty: a micro-batch or a rank without tokens adds nothing.

    Differences from TRL's PPO trainer: padding enters no average, and log-ratios are held within +-20.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device, range or name.
    """
    options = policy_options(clip, clip_high, dual_clip, entropy_coefficient, kl_coefficient, kl_estimator)
    checks.tensors(logp=logp, advantages=advantages)
    checks.optional_tensors(old_logp=old_logp, entropy=entropy, reference_logp=reference_logp)
    if entropy is None and entropy_coefficient:
        raise ValueError(
            f"entropy: None seen with entropy_coefficient={entropy_coefficient}, logp's shape wanted"
        )
    if reference_logp is None and kl_coefficient:
        raise ValueError(
            f"reference_logp: None seen with kl_coefficient={kl_coefficient}, logp's shape wanted"
        )
    old = logp if old_logp is None else old_logp
    advantages = per_token(advantages, logp.shape)
    tensors = {
        "logp": logp,
        "old_logp": old,
        "advantages": advantages,
        "entropy": entropy,
        "reference_logp": reference_logp,
    }
    check_tokens(tensors, mask)
    inside, scale = token_scale(mask, aggregation, normalizer, cu_seqlens, accumulator_of(*tensors.values()))
    run = policy_op if traced(logp) or transforming() else _EagerPolicy.apply
    reference = None if reference_logp is None else reference_logp.detach()
    loss, sums, _ = run(
        logp, entropy, old.detach(), advantages.detach(), inside, scale, reference, list(options)
    )
    return policy_metrics(loss, sums, entropy is not None, reference_logp is not None)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | None = 0.2,
    normalizer: float | Tensor | None = None,
) -> ValueLoss:
    """PPO's loss of a value model over the tokens of a mask: mean of max((v - R)^2, (v held within v_old +-
    clip - R)^2) / 2.

    Args:
        values: [B, T] or [N] fp32, bf16, fp16 or fp64. Differentiable.
        old_values, returns: of values' shape: the values at the time of the rollout, and `gae`'s returns R. Never given a gradient. NaN
            in either, inside the mask, makes the loss NaN, without a clip too.
        mask: of values' shape, as in `ppo_loss`. What stands outside is not used.
        clip: > 0, in units of the values; None: no clip.
        normalizer: divisor in place of the mask's tokens, as in `ppo_loss`.

    Returns: The loss; clip_fraction, the share of tokens whose held value is the worse one, which have no
        gradient; explained_variance, 1 - Var(R - v) / Var(R), NaN where the returns do not vary. fp32; fp64
        if an input is. The loss is 0 where the mask is empty.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range.
    """
    bound = torch.inf if clip is None else checks.above_zero("clip", clip)
    checks.tensors(values=values, old_values=old_values, returns=returns)
    tensors = {"values": values, "old_values": old_values, "returns": returns}
    check_tokens(tensors, mask)
    tokens = token_scale(mask, "token_mean", normalizer, None, accumulator_of(*tensors.values()))
    loss, sums, _ = value_op(values, old_values.detach(), returns.detach(), *tokens, bound)
    means = sums / sums[ValueSum.TOKENS].clamp(min=1)
    squares = means[ValueSum.RETURN_SQUARE]
    left, spread = (
        means[ValueSum.ERROR_SQUARE] - means[ValueSum.ERROR] ** 2,
        squares - means[ValueSum.RETURN] ** 2,
    )
    explained = torch.where(
        spread > 1e-12 * squares, 1 - left / spread, torch.nan
    )  # below, the difference is rounding
    return ValueLoss(loss, means[ValueSum.CLIPPED].to(loss.dtype), explained.to(loss.dtype))


def policy_options(
    clip: float | None,
    clip_high: float | None,
    dual_clip: float | None,
    entropy_coefficient: float,
    kl_coefficient: float,
    kl_estimator: str,
) -> PolicyOptions:
    checks.choice("kl_estimator", kl_estimator, KL_ESTIMATORS)
    for name, value in (("clip", clip), ("clip_high", clip_high)):
        if value is not None:
            checks.number(name, value, 0, expected="None or a number >= 0")
    if dual_clip is not None:
        checks.number("dual_clip", dual_clip, ABOVE_ONE, expected="None or a number above 1")
    high = clip if clip_high is None else clip_high
    return PolicyOptions(
        -torch.inf if clip is None else 1.0 - clip,
        torch.inf if high is None else 1.0 + high,
        torch.inf if dual_clip is None else float(dual_clip),
        checks.number("entropy_coefficient", entropy_coefficient),
        checks.number("kl_coefficient", kl_coefficient),
        KL_ESTIMATORS.index(kl_estimator),
    )


def policy_metrics(loss: Tensor, sums: Tensor, has_entropy: bool, has_reference: bool) -> PolicyLoss:
    means = (sums / sums[PolicySum.TOKENS].clamp(min=1)).to(loss.dtype)
    _, policy, entropy, kl, ratio, clipped, squares, _ = means.unbind()  # in PolicySum's order
    return PolicyLoss(
        loss, policy, entropy if has_entropy else None, kl if has_reference else None, ratio, clipped, squares
    )
