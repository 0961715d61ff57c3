"""The losses of policy optimisation over tokens: the clipped ratio of PPO and its kin, and the clipped error of a
value model.

For each token inside the mask, with d = logp - old_logp, r = e^d, A its advantage, H its entropy and w its
scale, 1 / tokens for a mean,

    policy = max(-A r, -A min(max(r, 1 - clip), 1 + clip_high)), and, with a dual clip c and A < 0, at most -A c
    loss   = sum w (policy - entropy_coefficient H + kl_coefficient KL),     KL an estimator of `KL_ESTIMATORS`
    value  = sum w max((v - R)^2, (min(max(v, v_old - clip), v_old + clip) - R)^2) / 2

in nats. policy/ops.py computes them. Exponents d are clamped to [-20, 20], as in verl: beyond, r is e^20 or e^-20 and
its gradient is 0, so no ratio is infinite. What stands outside the mask, NaN too, is not used, and its gradient is 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..softmax.rows import traced
from ..torch_func import transforming
from .arguments import accumulator_of, check_tokens, per_token, policy_options, token_scale
from .ops import EagerPolicy, PolicySum, ValueSum, policy_op, value_op


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
            f"entropy: got None with entropy_coefficient={entropy_coefficient}, expected logp's shape"
        )
    if reference_logp is None and kl_coefficient:
        raise ValueError(
            f"reference_logp: got None with kl_coefficient={kl_coefficient}, expected logp's shape"
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
    run = policy_op if traced(logp) or transforming() else EagerPolicy.apply
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


def policy_metrics(loss: Tensor, sums: Tensor, has_entropy: bool, has_reference: bool) -> PolicyLoss:
    means = (sums / sums[PolicySum.TOKENS].clamp(min=1)).to(loss.dtype)
    _, policy, entropy, kl, ratio, clipped, squares, _ = means.unbind()  # in PolicySum's order
    return PolicyLoss(
        loss, policy, entropy if has_entropy else None, kl if has_reference else None, ratio, clipped, squares
    )
