"""PPO's loss as a function of the statistics of tokens alone: what a head needs of a loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..softmax.rows import Stat, coefficients
from .ops import PolicyInputs, PolicyOptions, PolicyOutputs, run_policy
from .weights import TokenWeights, Weighting


@dataclass(frozen=True)
class TokenPolicy:
    """The tensors of `ppo_loss`, [N] each, and its options. Called, it gives the gradient's coefficients."""

    old_logp: Tensor | None
    advantages: Tensor
    mask: Tensor  # bool
    scale: Tensor  # [1] or [N], of the accumulator's dtype
    reference_logp: Tensor | None
    options: PolicyOptions
    vocab_size: int

    def loss(self, stats: Tensor, tokens: Tensor | slice) -> PolicyOutputs:
        """`run_policy` of these tokens, from their statistics [7, C]."""
        inputs = PolicyInputs(
            logp=stats[Stat.LOGP],
            old_logp=stats[Stat.LOGP] if self.old_logp is None else self.old_logp[tokens],
            advantages=self.advantages[tokens],
            mask=self.mask[tokens],
            entropy=stats[Stat.ENTROPY],
            reference_logp=None if self.reference_logp is None else self.reference_logp[tokens],
            weights=TokenWeights(
                Weighting.GIVEN, self.scale if self.scale.numel() == 1 else self.scale[tokens]
            ),
        )
        return run_policy(inputs, self.options)

    def __call__(self, stats: Tensor, tokens: Tensor | slice) -> Tensor:
        """Coefficients [4, C] of the gradient kernel from statistics [7, C] of these tokens."""
        grads = self.loss(stats, tokens).grads
        grad = torch.zeros_like(stats)
        grad[Stat.LOGP] = grads[0]
        if len(grads) > 1:
            grad[Stat.ENTROPY] = grads[1]
        return coefficients(grad, stats, self.vocab_size)
