"""PPO's policy loss from hidden states, without the logits in memory.

    hidden [N, H], weight [V, H], ids [N]  ->  logp, entropy of each token  ->  the loss of policy/losses.py

What a token's logp and entropy contribute to the loss is known as soon as they are. Its gradient is therefore
computed while its logits exist: 3 GEMMs of 2 N H V flops with a trained weight, 2 with a frozen one, 1
without gradients, where `linear_token_stats` and `ppo_loss` take 4, 3 and 1. Saved for backward: dX and
dW. Tokens outside the mask enter no GEMM.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..autograd import register_loss_op
from ..logits import stats_of
from ..policy.arguments import as_bool, check_tokens, per_token, policy_options, token_scale
from ..policy.losses import PolicyLoss, policy_metrics, ppo_loss
from ..policy.ops import PolicyInputs, PolicyOptions, PolicyOutputs, PolicySum, run_policy, scale_tensor
from ..softmax.rows import Stat, accumulator_dtype, coefficients
from . import engines
from .engine import empty_gradients
from .inputs import HeadInputs, NeedsGrad, head_inputs, head_options
from .token_stats import head_stats


def _policy(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    old_logp: Tensor | None,
    advantages: Tensor,
    scale: Tensor,
    reference_logp: Tensor | None,
    options: list[float],
    policy_numbers: list[float],
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, `PolicySum`s over the tokens [8], and gradients. ids are -1 outside the mask."""
    inputs = HeadInputs.of(hidden, weight, ids, bias, options)
    mask, policy = ids >= 0, PolicyOptions.of(policy_numbers)

    def policy_loss(stats: Tensor, tokens: Tensor | slice) -> PolicyOutputs:
        """`run_policy` of some tokens."""
        token_inputs = PolicyInputs(
            logp=stats[Stat.LOGP],
            old_logp=stats[Stat.LOGP] if old_logp is None else old_logp[tokens],
            advantages=advantages[tokens],
            mask=mask[tokens],
            scale=scale if scale.numel() == 1 else scale[tokens],
            entropy=stats[Stat.ENTROPY],
            reference_logp=None if reference_logp is None else reference_logp[tokens],
        )
        return run_policy(token_inputs, policy)

    def of_tokens(stats: Tensor, tokens: Tensor | slice) -> Tensor:
        grads = policy_loss(stats, tokens).grads
        grad = torch.zeros_like(stats)
        grad[Stat.LOGP] = grads[0]
        if len(grads) > 1:
            grad[Stat.ENTROPY] = grads[1]
        return coefficients(grad, stats, inputs.vocab_size)

    stats, grads = engines.statistics_and_gradients(inputs, of_tokens, NeedsGrad(*needs))
    # Once more over all tokens, so that the loss does not depend on the chunks.
    whole = policy_loss(stats, slice(None))
    return whole.loss, whole.means, *grads


def _fake_policy(
    hidden,
    weight,
    ids,
    bias,
    old_logp,
    advantages,
    scale,
    reference_logp,
    options,
    policy_numbers,
    needs,
):
    inputs = HeadInputs.of(hidden, weight, ids, bias, options)
    return scale.new_empty(()), scale.new_empty(len(PolicySum)), *empty_gradients(inputs, NeedsGrad(*needs))


_head_policy = register_loss_op(
    "head_policy",
    _policy,
    _fake_policy,
    differentiable=("hidden", "weight", "bias"),
    losses="linear_ppo_loss",
)


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
    """`ppo_loss` from hidden states, with exact gradients and without the logits in memory.

    Args:
        hidden: [B, T, H], or packed [N, H]. hidden[t] predicts ids[t]: shift before. dtypes as in
            `linear_cross_entropy`.
        weight, bias: [V, H], [V].
        ids: [B, T] or [N], in [0, V) or ignore_index (None: -100) where the mask is set, anything elsewhere.
            An ignored token counts as outside the mask. Tokens outside enter no GEMM, and none of their
            values is used.
        old_logp, advantages, mask: as in `ppo_loss`, beside ids; old_logp under the same temperature, softcap
            and logit_scale. None: every ratio is 1.
        clip, clip_high, dual_clip, entropy_coefficient, reference_logp, kl_coefficient, kl_estimator,
            aggregation, normalizer, cu_seqlens: as in `ppo_loss`. The entropy is the head's, over the whole
            vocabulary.
        temperature, softcap, logit_scale, tail_eps, workspace_mib, check: as in `linear_cross_entropy`.

    Returns:
        As `ppo_loss`; entropy is always there. fp32; fp64 for fp64 hidden states. fp16's small gradients need
        the loss scale that arrives with the upstream gradient, so fp16 goes through `linear_token_stats`,
        with one GEMM more.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range, or is no option's name.
    """
    policy_numbers = policy_options(
        clip, clip_high, dual_clip, entropy_coefficient, kl_coefficient, kl_estimator
    )
    checks.tensors(hidden=hidden, ids=ids, advantages=advantages)
    checks.optional_tensors(old_logp=old_logp, reference_logp=reference_logp)
    if reference_logp is None and kl_coefficient:
        raise ValueError(
            f"reference_logp: got None with kl_coefficient={kl_coefficient}, "
            "expected a tensor of the shape of ids"
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
    options = head_options(
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        tail_eps=tail_eps,
        workspace_mib=workspace_mib,
    )
    inputs = head_inputs(
        hidden, weight, ids, bias, options, ignore_index=ignore_index, check=check, mask=inside
    )
    kept = inputs.ids.view(ids.shape)  # -1 outside the mask and where ignored
    inside = kept >= 0
    if inputs.mode("scalar") == "general":
        stats = stats_of(head_stats(inputs), ids.shape, entropy=True)
        return ppo_loss(
            stats.logp,
            old_logp,
            advantages,
            inside,
            clip=clip,
            clip_high=clip_high,
            dual_clip=dual_clip,
            entropy=stats.entropy,
            entropy_coefficient=entropy_coefficient,
            reference_logp=reference_logp,
            kl_coefficient=kl_coefficient,
            kl_estimator=kl_estimator,
            aggregation=aggregation,
            normalizer=normalizer,
            cu_seqlens=cu_seqlens,
        )
    dtype = accumulator_dtype(inputs.hidden.dtype)
    _, scale, token_weight = token_scale(inside, aggregation, normalizer, cu_seqlens, dtype)
    if scale is None:
        scale = scale_tensor(token_weight, inside, dtype)
    old, advantage, reference = (
        None if x is None else x.detach().reshape(-1) for x in (old_logp, advantages, reference_logp)
    )
    loss, means, *_ = _head_policy(
        *inputs.tensors,
        old,
        advantage,
        scale.reshape(-1),
        reference,
        options.numbers(),
        list(policy_numbers),
        list(inputs.needs_grad()),
    )
    return policy_metrics(loss, means, True, reference is not None)
