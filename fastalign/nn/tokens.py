"""Cross-entropy and distillation as modules."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor

from fastalign_kernels import checks, cross_entropy, linear_cross_entropy, linear_distillation_loss
from fastalign_kernels.linear.low_rank import LowRank
from fastalign_kernels.linear.options import (
    HEAD_SETTINGS,
    HeadSettings,
    check_no_screen,
    check_no_tail,
    check_tail_smoothing,
    head_keywords,
    head_options,
)
from fastalign_kernels.linear.outcomes import DIVERGENCES
from fastalign_kernels.logits import loss_options, make_transform

from .base import LossModule, with_defaults


class CrossEntropyLoss(LossModule):
    """`fastalign.cross_entropy` as a module: logits [..., V], targets [...] -> loss in nats.

    The constructor takes that function's options (V is the last dimension, where torch has it second); errors
    are raised as there.
    """

    def __init__(
        self,
        *,
        ignore_index: int | None = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        temperature: float = 1.0,
        reduction: str = "mean",
        inplace_backward: bool = False,
    ) -> None:
        loss_options(reduction, label_smoothing, z_loss)
        make_transform(1.0, softcap, temperature)
        checks.ignore_index(ignore_index)
        checks.flags(inplace_backward=inplace_backward)
        super().__init__(
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            temperature=temperature,
            reduction=reduction,
            inplace_backward=inplace_backward,
        )

    def forward(
        self,
        logits: Tensor,
        targets: Tensor,
        *,
        token_weights: Tensor | None = None,
        num_items: float | Tensor | None = None,
    ) -> Tensor:
        return cross_entropy(
            logits, targets, token_weights=token_weights, num_items=num_items, **self.options
        )


class LinearCrossEntropyLoss(LossModule):
    """`fastalign.linear_cross_entropy` as a module; returns the loss in nats.

    The call takes hidden [..., H], weight [V, H], targets [...] and bias [V] or None.

    The constructor takes that function's options; errors are raised as there.
    """

    @head_keywords
    def __init__(
        self,
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        reduction: str = "mean",
        **head: Unpack[HeadSettings],
    ) -> None:
        loss_options(reduction, label_smoothing, z_loss)
        check_tail_smoothing(head_options(LinearCrossEntropyLoss, head, HEAD_SETTINGS), label_smoothing)
        super().__init__(
            label_smoothing=label_smoothing, z_loss=z_loss, reduction=reduction, **with_defaults(head)
        )

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None = None,
        *,
        token_weights: Tensor | None = None,
        num_items: float | Tensor | None = None,
        lora: LowRank | None = None,
    ) -> Tensor:
        of_tokens: dict[str, Any] = {"token_weights": token_weights, "num_items": num_items}
        return linear_cross_entropy(hidden, weight, targets, bias, lora=lora, **of_tokens, **self.options)


class LinearDistillationLoss(LossModule):
    """`fastalign.linear_distillation_loss` as a module; returns the divergence in nats.

    The call takes the student's hidden [..., H] and weight [V, H], the teacher's ids and log-probabilities
    [..., K], and bias [V] or None.

    The constructor takes that function's options; errors are raised as there.
    """

    @head_keywords
    def __init__(
        self, *, divergence: str = "forward_kl", reduction: str = "mean", **head: Unpack[HeadSettings]
    ) -> None:
        options = head_options(LinearDistillationLoss, head, HEAD_SETTINGS)
        checks.choice("divergence", divergence, tuple(DIVERGENCES))
        checks.choice("reduction", reduction, ("mean", "sum", "none"))
        check_no_tail(options, "LinearDistillationLoss")
        check_no_screen(options, "LinearDistillationLoss")
        super().__init__(divergence=divergence, reduction=reduction, **with_defaults(head))

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        teacher_ids: Tensor,
        teacher_logp: Tensor,
        bias: Tensor | None = None,
        *,
        token_weights: Tensor | None = None,
        num_items: float | Tensor | None = None,
        lora: LowRank | None = None,
    ) -> Tensor:
        options = {**self.options, "token_weights": token_weights, "num_items": num_items, "lora": lora}
        return linear_distillation_loss(hidden, weight, teacher_ids, teacher_logp, bias, **options)
