"""Cross-entropy as a function of a token's statistics, in a form that a kernel can compute itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..softmax.rows import Stat, coefficients


@dataclass(frozen=True)
class TokenCrossEntropy:
    """scale times -(1 - e) logp - e mean_logp + z_loss lse^2 with e = label_smoothing; called, it gives the
    gradient's coefficients.

    It is a `TokenCoefficients` like any function. A GPU engine that sees this type makes statistics and
    gradient in one launch.
    """

    scale: Tensor  # [N] of the accumulator's dtype
    label_smoothing: float
    z_loss: float
    vocab_size: int

    def __call__(self, stats: Tensor, tokens: Tensor | slice) -> Tensor:
        """Coefficients [4, C] from statistics [7, C] of these tokens."""
        s = self.scale[tokens]
        grad = torch.zeros_like(stats)
        grad[Stat.LOGP] = (self.label_smoothing - 1) * s
        grad[Stat.MEAN_LOGP] = -self.label_smoothing * s
        grad[Stat.LSE] = 2 * self.z_loss * stats[Stat.LSE] * s
        return coefficients(grad, stats, self.vocab_size)
