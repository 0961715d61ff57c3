"""Cross-entropy: its options, and its gradient as a function of a token's statistics."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import launches
from ..logits import check_loss_tensors, loss_options, loss_scale, on_gpu, reduced
from ..logits_ops import token_loss
from ..softmax.rows import TokenLoss, accumulator_dtype, loss_coefficients
from .inputs import HeadInputs
from .options import HeadOptions, check_tail_smoothing
from .sharded_agreement import OfLoss


class LossOptions(NamedTuple):
    """The keywords of `linear_cross_entropy` beside the head's."""

    label_smoothing: float
    z_loss: float
    reduction: str
    token_weights: Tensor | None
    num_items: float | Tensor | None

    def checked(self, targets: Tensor, options: HeadOptions) -> LossOptions:
        """A copy with numbers as floats; ValueError for one of the wrong kind or range."""
        label_smoothing, z_loss = loss_options(self.reduction, self.label_smoothing, self.z_loss)
        check_tail_smoothing(options, label_smoothing)
        check_loss_tensors(targets, self.reduction, self.token_weights, self.num_items)
        return LossOptions(label_smoothing, z_loss, *self[2:])

    def of(self, options: HeadOptions) -> HeadOptions:
        """Options that know what ranks compare of the loss."""
        return options._replace(loss=OfLoss(self.reduction, self.label_smoothing, self.z_loss))

    def fills_scale_late(self, inputs: HeadInputs) -> bool:
        """Whether one launch can fill the scale after the logits' GEMM is queued.

        The device then starts that GEMM earlier: it does not wait for the scale.
        """
        plain = self.reduction == "mean" and self.token_weights is None and self.num_items is None
        return plain and inputs.hidden.dtype != torch.float64 and launches(inputs.ids)

    def scale(self, inputs: HeadInputs) -> Tensor:
        """What each token's loss is multiplied by, [N] of the accumulator's dtype."""
        dtype = accumulator_dtype(inputs.hidden.dtype)
        return loss_scale(inputs.ids >= 0, self.reduction, self.token_weights, self.num_items, dtype)

    def reduced(self, stats: Tensor, scale: Tensor, shape: torch.Size) -> Tensor:
        """The loss of a table [7, N]: a scalar, or of this shape with reduction="none"."""
        loss = token_loss(stats, self.label_smoothing, self.z_loss)
        return reduced(loss, scale, self.reduction, self.num_items, shape)


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
    fill: Callable[[], None] | None = None  # writes `scale` when it is first called

    @classmethod
    def of_mean(
        cls, scale: Tensor, ids: Tensor, label_smoothing: float, z_loss: float, vocab_size: int
    ) -> TokenCrossEntropy:
        """A loss averaged over non-negative ids; `filled_scale` writes `scale`, an uninitialised [N]."""
        fill = functools.cache(lambda: on_gpu().mean_scale(ids, scale))
        return cls(scale, label_smoothing, z_loss, vocab_size, fill)

    def filled_scale(self) -> Tensor:
        """`scale`, written if it was not."""
        if self.fill is not None:
            self.fill()
        return self.scale

    def __call__(self, stats: Tensor, tokens: Tensor | slice) -> Tensor:
        """Coefficients [4, C] from statistics [7, C] of these tokens."""
        loss = TokenLoss(self.filled_scale()[tokens], self.label_smoothing, self.z_loss)
        return loss_coefficients(loss, stats, self.vocab_size)
