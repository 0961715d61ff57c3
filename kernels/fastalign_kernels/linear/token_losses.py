"""Cross-entropy as a function of a token's statistics, in a form that a kernel can compute itself."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..softmax.rows import TokenLoss, loss_coefficients


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
        loss = TokenLoss(self.scale[tokens], self.label_smoothing, self.z_loss)
        return loss_coefficients(loss, stats, self.vocab_size)
