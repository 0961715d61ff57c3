"""PPO's policy loss from hidden states: the head and the loss in one pass over chunks of tokens, without
logits in memory.

    hidden [N, H], weight [V, H], ids [N]  ->  logp, entropy of each token  ->  sum of scale (policy - c_entropy H + c_kl KL), see policy/losses.py

What a token's logp and entropy are worth to the loss is known as soon as they are, so a chunk's gradient is
made while its logits exist: 3 GEMMs of N x H x V with a trained weight, 2 with a frozen one, 1 without
gradients, where `linear_token_stats` and `ppo_loss` take 4, 3 and 1. Kept for the backward pass: dX and dW.
Tokens outside the mask enter no GEMM.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..autograd import save_loss
from ..policy.arguments import as_bool, check_tokens, per_token, token_scale
from ..policy.losses import (
    PolicyLoss,
    PolicyOptions,
    PolicySum,
    policy_metrics,
    policy_options,
    policy_sums,
    ppo_loss,
)
from ..softmax.rows import Stat, Transform, accumulator_dtype, coefficients
from .accumulate import fake_gradients
from .cross_entropy import find_way, linear_token_stats, prepare, scalar_loss_backward
from .token_tiles import Head, sweep


@torch.library.custom_op("fastalign::head_policy", mutates_args=())
def _head_policy(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    temperature: float,
    workspace_mib: float | None,
    tail_eps: float | None,
    old_logp: Tensor | None,
    advantages: Tensor,
    scale: Tensor,
    reference_logp: Tensor | None,
    options: list[float],
    hidden_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, `PolicySum`s [8] fp64, and the gradients of hidden, weight and bias. ids are -1 outside the
    mask."""
    head = Head(
        hidden, weight, ids, bias, Transform(logit_scale, softcap, temperature), workspace_mib, tail_eps
    )
    mask, numbers = ids >= 0, PolicyOptions.of(options)

    def sums_and_slopes(stats: Tensor, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        own_scale = scale if scale.numel() == 1 else scale[index]
        reference = None if reference_logp is None else reference_logp[index]
        old = stats[Stat.LOGP] if old_logp is None else old_logp[index]
        fixed = (old, advantages[index], mask[index], own_scale)
        return policy_sums(stats[Stat.LOGP], *fixed, stats[Stat.ENTROPY], reference, numbers)

    def chunk_coefficients(stats: Tensor, index: Tensor | slice) -> Tensor:
        slopes = sums_and_slopes(stats, index)[1]
        grad = torch.zeros_like(stats)
        grad[Stat.LOGP] = slopes[0]
        if len(slopes) > 1:
            grad[Stat.ENTROPY] = slopes[1]
        return coefficients(grad, stats, weight.shape[0])

    wanted = (hidden_grad, weight_grad, bias_grad)
    table, gradients = sweep(head, None, chunk_coefficients if any(wanted) else None, wanted)
    sums, _ = sums_and_slopes(
        table, slice(None)
    )  # once more and at once, so that the loss does not depend on the chunks
    return sums[PolicySum.LOSS].to(scale.dtype, copy=True), sums, *gradients


@_head_policy.register_fake
def _(
    hidden,
    weight,
    ids,
    bias,
    logit_scale,
    softcap,
    temperature,
    workspace_mib,
    tail_eps,
    old_logp,
    advantages,
    scale,
    *options,
):
    sums = scale.new_empty(len(PolicySum), dtype=torch.float64)
    return scale.new_empty(()), sums, *fake_gradients(hidden, weight, bias, *options[-3:])


_head_policy.register_autograd(scalar_loss_backward("linear_ppo_loss", _head_policy), setup_context=save_loss)


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    *,
    clip: float | None = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    entropy_coefficient: float = 0.0,
    reference_logp: Tensor | None = None,
    kl_coefficient: float = 0.0,
    kl_estimator: str = "k3",
    aggregation: str = "token_mean",
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int | None = -100,
    tail_eps: float | None = None,
    workspace_mib: float | None = None,
    check: bool = False,
) -> PolicyLoss:
    """`ppo_loss` from hidden states, with gradients of hidden, weight and bias, exact, without logits in
    memory.

    Args:
        hidden: [B, T, H] or packed [N, H]; hidden[t] predicts ids[t]: shift before. weight: [V, H]. bias: [V]. dtypes as in
            `linear_cross_entropy`.
        ids: [B, T] or [N], in [0, V) or ignore_index (None: -100) where the mask is set, anything elsewhere. An ignored token counts as
            outside the mask. Tokens outside enter no GEMM, and none of their values is used.
        old_logp, advantages, mask: as in `ppo_loss`, beside ids; old_logp under the same temperature, softcap and logit_scale. None: every
            ratio is 1.
        clip, clip_high, dual_clip, entropy_coefficient, reference_logp, kl_coefficient, kl_estimator, aggregation, normalizer, cu_seqlens:
            as in `ppo_loss`. The entropy is the head's own, over the whole vocabulary.
        temperature, softcap, logit_scale, tail_eps, workspace_mib, check: as in `linear_cross_entropy`.

    Returns: As `ppo_loss`; entropy is always there. fp32; fp64 for fp64 hidden states. fp16's small gradients
        need the loss scale that comes with the upstream gradient, so fp16 goes through `linear_token_stats`,
        with a GEMM more.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device, range or name.
    """
    options = policy_options(clip, clip_high, dual_clip, entropy_coefficient, kl_coefficient, kl_estimator)
    checks.tensors(hidden=hidden, ids=ids, advantages=advantages)
    checks.optional_tensors(old_logp=old_logp, reference_logp=reference_logp)
    if reference_logp is None and kl_coefficient:
        raise ValueError(
            f"reference_logp: None seen with kl_coefficient={kl_coefficient}, the shape of ids wanted"
        )
    advantages = per_token(advantages, ids.shape)
    for name, tensor in (("old_logp", old_logp), ("advantages", advantages)):
        if tensor is not None:
            checks.shape(name, tensor, tuple(ids.shape), "the shape of ids")
    check_tokens({"advantages": advantages, "old_logp": old_logp, "reference_logp": reference_logp}, mask)
    checks.device("ids", ids, "hidden", hidden)
    checks.device("mask", mask, "ids", ids)
    checks.dtype("ids", ids, checks.INTEGERS)
    inside = as_bool(mask)
    arguments = prepare(
        hidden,
        weight,
        ids,
        "ids",
        bias,
        softcap,
        logit_scale,
        temperature,
        ignore_index,
        tail_eps,
        workspace_mib,
        check,
        mask=inside,
    )
    kept = arguments[2].view(ids.shape)  # -1 outside the mask and where ignored
    inside = kept >= 0
    way, *wanted = find_way(arguments[0], weight, bias, "scalar")
    if way == "general":
        stats = linear_token_stats(
            hidden, weight, kept, bias, ignore_index=-1, softcap=softcap, logit_scale=logit_scale, temperature=temperature,
            tail_eps=tail_eps, workspace_mib=workspace_mib,
        )  # fmt: skip
        return ppo_loss(
            stats.logp, old_logp, advantages, inside, clip=clip, clip_high=clip_high, dual_clip=dual_clip, entropy=stats.entropy,
            entropy_coefficient=entropy_coefficient, reference_logp=reference_logp, kl_coefficient=kl_coefficient,
            kl_estimator=kl_estimator, aggregation=aggregation, normalizer=normalizer, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    _, scale = token_scale(inside, aggregation, normalizer, cu_seqlens, accumulator_dtype(arguments[0].dtype))
    old, worth, reference = (
        None if x is None else x.detach().reshape(-1) for x in (old_logp, advantages, reference_logp)
    )
    loss, sums, *_ = _head_policy(
        *arguments, old, worth, scale.reshape(-1), reference, list(options), *wanted
    )
    return policy_metrics(loss, sums, True, reference is not None)
