"""Preference losses as functions of the log-probabilities of sequences alone: what a head needs of a loss.

Each object is built from a loss's tensors and options. Its method `losses_and_grads` takes the rows'
log-probabilities and returns the losses and the gradients of their mean. `mean_loss` is differentiable.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .losses import dpo_loss
from .ops import PairInputs, PairOptions, UnpairedInputs, UnpairedOptions, run_pairs, run_unpaired


class PairLoss(NamedTuple):
    """`dpo_loss` of S pairs: the S chosen rows first, then the rejected ones."""

    reference_logps: Tensor  # [2S]
    lengths: Tensor | None  # [2S] int64, for losses of means over tokens
    loss_type: str
    beta: float
    label_smoothing: float

    def losses_and_grads(self, logps: Tensor) -> tuple[Tensor, Tensor]:
        """Losses [S], and d mean loss / d logps [2S]."""
        S = len(logps) // 2
        reference, lengths = self.reference_logps, self.lengths
        inputs = PairInputs(
            policy_chosen=logps[:S],
            policy_rejected=logps[S:],
            reference_chosen=reference[:S],
            reference_rejected=reference[S:],
            chosen_lengths=None if lengths is None else lengths[:S],
            rejected_lengths=None if lengths is None else lengths[S:],
        )
        out = run_pairs(
            inputs,
            self.loss_type,
            PairOptions(self.beta, self.label_smoothing),
        )
        return out.loss, out.grads.flatten() / S

    def mean_loss(self, logps: Tensor) -> Tensor:
        """The mean loss."""
        S, reference, lengths = len(logps) // 2, self.reference_logps, self.lengths
        return dpo_loss(
            logps[:S],
            logps[S:],
            reference[:S],
            reference[S:],
            beta=self.beta,
            loss_type=self.loss_type,
            label_smoothing=self.label_smoothing,
            chosen_lengths=None if lengths is None else lengths[:S],
            rejected_lengths=None if lengths is None else lengths[S:],
        ).loss


class UnpairedLoss(NamedTuple):
    """`kto_loss` of S labelled completions."""

    reference_logps: Tensor  # [S]
    desirable: Tensor  # [S] bool
    kl: Tensor | None  # scalar; None for APO-zero's loss
    beta: float
    desirable_weight: float
    undesirable_weight: float

    def losses_and_grads(self, logps: Tensor) -> tuple[Tensor, Tensor]:
        """Losses [S], and d mean loss / d logps [S]."""
        out = run_unpaired(
            UnpairedInputs(logps, self.reference_logps, self.desirable, self.kl),
            UnpairedOptions(self.beta, self.desirable_weight, self.undesirable_weight),
        )
        return out.loss, out.grads.flatten() / len(logps)
