"""PPO's policy loss from hidden states, without the logits in memory.

    hidden [N, H], weight [V, H], ids [N]  ->  logp, entropy of each token  ->  the loss of policy/losses.py

A token's contribution to the loss is known as soon as its logp and entropy are. Its gradient is therefore
computed while its logits exist: 3 GEMMs of 2 N H V flops with a trained weight, 2 with a frozen one, 1
without gradients, where `linear_token_stats` and `ppo_loss` take 4, 3 and 1. Saved for backward: dX and
dW. Tokens outside the mask enter no GEMM.
"""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from ..logits import stats_of
from ..policy.losses import PolicyLoss, policy_metrics, ppo_loss
from ..policy.on_tokens import TokenPolicy
from ..policy.ops import PolicyOptions, PolicySum
from . import engines
from .engine import empty_gradients
from .head_ops import register_head_loss
from .inputs import HeadInputs, NeedsGrad
from .kept_stats import kept_stats
from .policy_inputs import LinearPolicyArguments, TokenTensors, policy_call, policy_keywords
from .token_stats import head_stats


def _policy(
    inputs: HeadInputs,
    needs: NeedsGrad,
    old_logp: Tensor | None,
    advantages: Tensor,
    scale: Tensor,
    reference_logp: Tensor | None,
    policy_numbers: list[float],
) -> tuple[Tensor, ...]:
    """The loss, `PolicySum`s over the tokens [8], and gradients. ids are -1 outside the mask.

    policy_numbers: those of PolicyOptions.
    """
    policy, inside = PolicyOptions.of(policy_numbers), inputs.ids >= 0
    of_tokens = TokenPolicy(old_logp, advantages, inside, scale, reference_logp, policy, inputs.vocab_size)
    stats, grads = engines.statistics_and_gradients(inputs, of_tokens, needs)
    # Once more over all tokens, so that the loss does not depend on the chunks.
    whole = of_tokens.loss(stats, slice(None))
    return whole.loss, whole.means, *grads


def _fake_policy(inputs, needs, old_logp, advantages, scale, *_):
    return scale.new_empty(()), scale.new_empty(len(PolicySum)), *empty_gradients(inputs, needs)


_head_policy = register_head_loss("head_policy", _policy, _fake_policy, losses="linear_ppo_loss")


@policy_keywords
def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    *,
    kept: tuple[Tensor, Tensor] | None = None,
    **arguments: Unpack[LinearPolicyArguments],
) -> PolicyLoss:
    """`ppo_loss` from hidden states, with exact gradients and without the logits in memory.

    Args:
        hidden: [B, T, H], or packed [N, H]. hidden[t] predicts ids[t]: shift before.
        weight, bias: [V, H], [V].
        ids: [B, T] or [N], in [0, V) or ignore_index where the mask is set, anything elsewhere. An ignored
            token counts as outside the mask. Tokens outside enter no GEMM, and none of their values is used.
        old_logp, advantages, mask: as in `ppo_loss`, beside ids; old_logp under the same temperature, softcap
            and logit_scale. None: every ratio is 1.
        kept: as in `linear_logprobs`: the policy is the softmax over each token's kept ids, in its logp and
            in its entropy. old_logp and reference_logp are then under kept sets too.
        **arguments: `LinearPolicyArguments` documents these keywords.

    Returns:
        As `ppo_loss`; entropy is always there. fp32; fp64 for fp64 hidden states. fp16's small gradients need
        the loss scale that arrives with the upstream gradient, so fp16 goes through `linear_token_stats`,
        with one GEMM more.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range, or is no option's name.
    """
    tokens = TokenTensors(old_logp, advantages, mask, arguments.get("reference_logp"))
    call = policy_call(linear_ppo_loss, (hidden, weight, ids, bias), tokens, arguments)
    inputs, tokens, keywords, policy = call
    if kept is not None or inputs.mode("scalar") == "general":
        if kept is None:
            logp, entropy, *_ = stats_of(head_stats(inputs), ids.shape, entropy=True)
        else:
            logp, entropy = (x.view(ids.shape) for x in kept_stats(inputs, kept))
        return ppo_loss(logp, old_logp, tokens.advantages, tokens.mask, entropy=entropy, **keywords)
    old_logp, advantages, reference_logp = tokens.flat()
    of_tokens = (old_logp, advantages, call.scale(), reference_logp)
    loss, means, *_ = _head_policy(inputs, inputs.needs_grad(), *of_tokens, list(policy))
    return policy_metrics(loss, means, has_entropy=True, has_reference=reference_logp is not None)
