"""The token losses of policy optimisation: PPO's clipped ratio with its variants, and a value model's clipped
error.

For each token inside the mask, with d = logp - old_logp, r = e^d, A its advantage, H its entropy and w its
scale, 1 / tokens for a mean,

    policy = max(-A r, -A min(max(r, 1 - clip), 1 + clip_high))
    loss   = sum w (policy - entropy_coefficient H + kl_coefficient KL)
    value  = sum w max((v - R)^2, (min(max(v, v_old - clip), v_old + clip) - R)^2) / 2

in nats. With a dual clip c, policy is at most -A c where A < 0. KL is one of the `KL_ESTIMATORS`.
policy/ops.py computes them. The exponent d is clamped to [-20, 20], as in verl, so no ratio is infinite.
Beyond these bounds r is e^20 or e^-20 and its gradient is 0. Values outside the mask are not used, even if
they are NaN, and their gradient is 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..dispatch import accumulator_of
from .arguments import check_tokens, constant, per_token, policy_options, token_weights
from .ops import policy_op, value_op


class PolicyLoss(NamedTuple):
    """The loss (differentiable), and the metrics of `ppo_loss` (without gradient).

    All are scalars. The metrics are means over the mask. None: not asked for.
    """

    loss: Tensor
    policy_loss: Tensor
    entropy: Tensor | None
    kl: Tensor | None
    mean_ratio: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor


class ValueLoss(NamedTuple):
    """The loss (differentiable), and clip_fraction and explained_variance over the mask (without gradient).

    All are scalars.
    """

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
    """PPO's clipped loss (1707.06347, eq. 7) over the tokens of a mask, with the options of its variants.

    The formula is at the top of this file.

    Args:
        logp: [B, T] or packed [N], fp32, bf16, fp16 or fp64. The tokens' log-probabilities in nats.
            Differentiable.
        old_logp: of logp's shape. Log-probabilities under the policy that drew the tokens. None: the present
            policy drew them, so every ratio is 1. Gets no gradient.
        advantages: of logp's shape, one number a token. With logp [B, T] also [B] or [B, 1], one number a
            row. Gets no gradient.
        mask: of logp's shape. Bools or integers: a token counts where it is nonzero. Floats: each must be 0
            or 1. Values outside the mask are not used. On a GPU any other float is a device-side assertion,
            as ids out of range are in torch. FASTALIGN_CHECK=1 makes it a ValueError.
        clip, clip_high: the ratio is clipped to [1 - clip, 1 + clip_high], both >= 0. clip_high None: clip
            (DAPO, 2503.14476, sets it apart). clip None: no lower bound, and no upper one without clip_high.
        dual_clip: > 1 (3 in 1912.09729). A token with a negative advantage loses at most -A dual_clip.
            None: no such bound.
        entropy: of logp's shape, nats. The loss subtracts entropy_coefficient times it. Differentiable.
            Without a coefficient it is only a metric.
        reference_logp: of logp's shape. The loss adds kl_coefficient times the policy's KL from it. Gets no
            gradient.
        kl_estimator: with d = logp - reference_logp, k1: d; k2: d^2 / 2; k3: e^-d - 1 + d. In k3 a d below
            -20 counts as -20 and has no gradient. Use k2 or k3 in a loss: over the policy's own draws the
            gradient of k1 has a mean of 0.
        aggregation: "token_mean": the mean over the mask. "sequence_mean": each sequence's mean over its
            tokens, then the mean over the sequences that have tokens. "sum": the sum over the mask.
        normalizer: a number > 0 or a scalar tensor, without gradient. It replaces the divisor: the number of
            tokens ("token_mean"), of sequences ("sequence_mean"), or 1 ("sum"). Pass the whole batch's, and
            the losses of micro-batches and ranks add up to the batch's.
        cu_seqlens: [S + 1], the boundaries of packed sequences. For "sequence_mean" of [N].

    Returns:
        The loss, and metrics, which are means over the mask's tokens for every aggregation. All are scalars,
        fp32 (fp64 if an input is). The host does not wait for the device. The metrics:
            policy_loss, entropy (None without entropy), kl (None without reference_logp), mean_ratio;
            clip_fraction, the share of tokens that a clip, the dual one included, leaves without a gradient;
            approx_kl, (logp - old_logp)^2 / 2, which is TRL's policy/approxkl_avg.
        With an empty mask everything is 0, so a micro-batch or a rank without tokens adds nothing.

    Differences from TRL's PPO trainer: padding enters no average, and log-ratios are clamped to +-20.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device, range or name.
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
    inside, (kind, weights, number) = token_weights(
        mask, aggregation, normalizer, cu_seqlens, accumulator_of(*tensors.values())
    )
    reference = None if reference_logp is None else constant(reference_logp)
    loss, means, _ = policy_op(
        *(logp, entropy, constant(old), constant(advantages), inside, weights, reference),
        [*options, kind, number],
    )
    return policy_metrics(
        loss, means, has_entropy=entropy is not None, has_reference=reference_logp is not None
    )


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | None = 0.2,
    normalizer: float | Tensor | None = None,
) -> ValueLoss:
    """PPO's loss of a value model over the tokens of a mask.

    The mean of max((v - R)^2, (v clipped to v_old +- clip - R)^2) / 2.

    Args:
        values: [B, T] or [N], fp32, bf16, fp16 or fp64. Differentiable.
        old_values: of values' shape. The values at the time of the rollout. Gets no gradient.
        returns: of values' shape. The returns R of `gae`. Gets no gradient. A NaN inside the mask, here or in
            old_values, makes the loss NaN, even without a clip.
        mask: of values' shape, as in `ppo_loss`. Values outside the mask are not used.
        clip: > 0, in units of the values. None: no clip.
        normalizer: replaces the number of the mask's tokens as divisor, as in `ppo_loss`.

    Returns:
        Scalars, fp32 (fp64 if an input is). The loss, 0 with an empty mask;
        clip_fraction, the share of tokens whose clipped error is the larger one, which get no gradient;
        explained_variance, 1 - Var(R - v) / Var(R), NaN if the returns do not vary.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range.
    """
    bound = torch.inf if clip is None else checks.above_zero("clip", clip)
    checks.tensors(values=values, old_values=old_values, returns=returns)
    tensors = {"values": values, "old_values": old_values, "returns": returns}
    check_tokens(tensors, mask)
    inside, (kind, weights, number) = token_weights(
        mask, "token_mean", normalizer, None, accumulator_of(*tensors.values())
    )
    fixed = (constant(old_values), constant(returns), inside, weights)
    loss, metrics, _ = value_op(values, *fixed, [bound, kind, number])
    return ValueLoss(loss, *metrics.unbind())


def policy_metrics(loss: Tensor, means: Tensor, *, has_entropy: bool, has_reference: bool) -> PolicyLoss:
    """The loss beside `PolicySum`s over the tokens of the mask, [8]."""
    _, policy, entropy, kl, ratio, clipped, squares, _ = means.unbind()  # in PolicySum's order
    return PolicyLoss(
        loss, policy, entropy if has_entropy else None, kl if has_reference else None, ratio, clipped, squares
    )
