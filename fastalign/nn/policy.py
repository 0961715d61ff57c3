"""The losses of policies as modules: PPO and GRPO."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from fastalign_kernels import PolicyLoss, checks, linear_ppo_loss
from fastalign_kernels.keywords import flat_signature, refuse_unknown
from fastalign_kernels.linear.low_rank import LowRank
from fastalign_kernels.linear.options import HEAD_DEFAULTS, head_options
from fastalign_kernels.linear.policy_inputs import (
    LINEAR_POLICY_SETTINGS,
    POLICY_DEFAULTS,
    POLICY_NUMBERS,
    POLICY_TENSORS,
    LinearPolicySettings,
    policy_keywords,
)
from fastalign_kernels.policy.arguments import AGGREGATIONS, PolicySettings, PolicyTensors, policy_options

from .base import LossModule, with_defaults


class LinearPPOLoss(LossModule):
    """`fastalign.linear_ppo_loss` as a module; returns a PolicyLoss.

    The call takes hidden [B, T, H] or packed [N, H], weight [V, H], ids, old_logp, advantages and mask of
    one shape, bias [V] or None, and the reference's log-probabilities.

    The constructor takes that function's options; errors are raised as there.
    """

    @policy_keywords
    def __init__(self, **options: Unpack[LinearPolicySettings]) -> None:
        head_options(LinearPPOLoss, options, LINEAR_POLICY_SETTINGS)
        policy = with_defaults(options, PolicySettings, POLICY_DEFAULTS)
        policy_options(*[policy[name] for name in POLICY_NUMBERS])
        checks.choice("aggregation", policy["aggregation"], AGGREGATIONS)
        super().__init__(**policy, **with_defaults(options))

    @policy_keywords
    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        ids: Tensor,
        old_logp: Tensor | None,
        advantages: Tensor,
        mask: Tensor,
        bias: Tensor | None = None,
        *,
        lora: LowRank | None = None,
        **tensors: Unpack[PolicyTensors],
    ) -> PolicyLoss:
        refuse_unknown(LinearPPOLoss.forward, tensors, POLICY_TENSORS)
        given = (hidden, weight, ids, old_logp, advantages, mask, bias)
        return linear_ppo_loss(*given, lora=lora, **tensors, **self.options)


grpo_keywords = flat_signature({**HEAD_DEFAULTS, **POLICY_DEFAULTS, "aggregation": "sequence_mean"})


class LinearGRPOLoss(LinearPPOLoss):
    """LinearPPOLoss with GRPO's mean: over each sequence's tokens, then over the sequences (2402.03300).

    advantages [B], one for each sequence: its reward minus its group's mean, over the group's standard
    deviation. docs/policy_losses.md has Dr. GRPO's, DAPO's and the other normalisers.
    """

    @grpo_keywords
    def __init__(self, **options: Unpack[LinearPolicySettings]) -> None:
        options.setdefault("aggregation", "sequence_mean")
        super().__init__(**options)
