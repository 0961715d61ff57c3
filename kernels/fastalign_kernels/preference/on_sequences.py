"""Losses of whole sequences as functions of their log-probabilities: what a head needs to know of a loss.

Each object is built from a loss's tensors and options and has one method: losses, and the gradient of their
mean with respect to the log-probabilities.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .losses import pairs_op, unpaired_op


class PairLoss(NamedTuple):
    """`dpo_loss` of S pairs: the S chosen rows first, then the rejected ones."""

    reference_logps: Tensor  # [2S]
    lengths: Tensor | None  # [2S] int64, for losses of means over tokens
    loss_type: str
    beta: float
    label_smoothing: float

    def losses_and_grads(self, logps: Tensor) -> tuple[Tensor, Tensor]:
        """losses [S], and d mean loss / d logps [2S]."""
        S = len(logps) // 2
        reference, lengths = self.reference_logps, self.lengths
        losses, _, grads = pairs_op(
            logps[:S],
            logps[S:],
            reference[:S],
            reference[S:],
            None if lengths is None else lengths[:S],
            None if lengths is None else lengths[S:],
            self.loss_type,
            self.beta,
            self.label_smoothing,
            0.0,
            0.0,
        )
        return losses, grads.flatten() / S


class UnpairedLoss(NamedTuple):
    """`kto_loss` of S labelled completions."""

    reference_logps: Tensor  # [S]
    desirable: Tensor  # [S] bool
    kl: Tensor | None  # scalar
    beta: float
    desirable_weight: float
    undesirable_weight: float

    def losses_and_grads(self, logps: Tensor) -> tuple[Tensor, Tensor]:
        """losses [S], and d mean loss / d logps [S]."""
        losses, _, grads = unpaired_op(
            logps,
            self.reference_logps,
            self.desirable,
            self.kl,
            self.beta,
            self.desirable_weight,
            self.undesirable_weight,
        )
        return losses, grads.flatten() / len(logps)
