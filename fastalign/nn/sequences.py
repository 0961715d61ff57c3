"""The losses of pairs and of labelled completions as modules: DPO, ORPO, SimPO, CPO and KTO."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

import torch
from torch import Tensor

from fastalign_kernels import (
    LinearPreferenceLoss,
    LinearUnpairedLoss,
    PreferenceLoss,
    cpo_loss,
    linear_dpo_loss,
    linear_kto_loss,
    orpo_loss,
    simpo_loss,
)
from fastalign_kernels.keywords import refuse_unknown
from fastalign_kernels.linear.inputs import head_inputs
from fastalign_kernels.linear.low_rank import LowRank, as_low_rank
from fastalign_kernels.linear.options import HEAD_SETTINGS, HeadSettings, head_keywords, head_options
from fastalign_kernels.linear.sequences import SEQUENCE_TENSORS, Rows, SequenceTensors, sequence_keywords
from fastalign_kernels.preference.arguments import pair_options, unpaired_options

from .base import LossModule, with_defaults


class LinearDPOLoss(LossModule):
    """`fastalign.linear_dpo_loss` as a module; returns a LinearPreferenceLoss.

    The call takes hidden [2S, T, H] (chosen rows first) or packed [N, H] with cu_seqlens, weight [V, H],
    ids, and the reference's hidden states and weight, or its log-probabilities.

    The constructor takes that function's options; errors are raised as there.
    """

    @head_keywords
    def __init__(
        self,
        *,
        beta: float = 0.1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        **head: Unpack[HeadSettings],
    ) -> None:
        pair_options(loss_type, beta, label_smoothing)
        head_options(LinearDPOLoss, head, HEAD_SETTINGS)
        super().__init__(
            beta=beta, loss_type=loss_type, label_smoothing=label_smoothing, **with_defaults(head)
        )

    @sequence_keywords
    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        ids: Tensor,
        bias: Tensor | None = None,
        *,
        lora: LowRank | None = None,
        **tensors: Unpack[SequenceTensors],
    ) -> LinearPreferenceLoss:
        refuse_unknown(LinearDPOLoss.forward, tensors, SEQUENCE_TENSORS)
        return linear_dpo_loss(hidden, weight, ids, bias, lora=lora, **tensors, **self.options)


class _LinearPairLoss(LossModule):
    """A loss of pairs without a reference, on the head. A subclass names its function.

    It costs 1 GEMM for the log-probabilities and 2 or 3 for the gradients, as `linear_logprobs` does.
    """

    function: Callable[..., PreferenceLoss]
    takes_lengths = True  # of the chosen and the rejected completions

    def __init__(self, options: dict[str, Any], head: HeadSettings) -> None:
        checked = head_options(type(self), head, HEAD_SETTINGS)
        self._loss(torch.empty(2, 0), torch.empty(2, 0, dtype=torch.int64), options)  # checks the options
        super().__init__(**options, **with_defaults(head))
        self.head, self.loss_options = checked, options

    @classmethod
    def _loss(cls, logps: Tensor, lengths: Tensor, options: dict[str, Any]) -> PreferenceLoss:
        """The loss of log-probabilities and lengths [2, S], the chosen completions first."""
        named = dict(zip(("chosen_lengths", "rejected_lengths"), lengths)) if cls.takes_lengths else {}
        return cls.function(*logps, **named, **options)

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        ids: Tensor,
        bias: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        lora: LowRank | None = None,
    ) -> LinearPreferenceLoss:
        """hidden: [2S, T, H] (chosen rows first), or packed [N, H] with cu_seqlens [2S + 1].

        ids: [2S, T] or [N], ignore_index where a token is not scored. hidden[t] predicts ids[t].
        """
        rows = Rows.of(ids, cu_seqlens, group=2, check=self.head.check)
        inputs = head_inputs(hidden, weight, ids, bias, self.head._replace(lora=as_low_rank(lora)))
        logps = rows.logps(inputs).view(2, -1)
        out = self._loss(logps, rows.lengths(inputs.ids).view(2, -1), self.loss_options)
        return LinearPreferenceLoss(*out, *logps.detach())


class LinearORPOLoss(_LinearPairLoss):
    """`fastalign.orpo_loss` on the head as a module; returns a LinearPreferenceLoss.

    The call takes hidden [2S, T, H] (chosen rows first) or packed [N, H] with cu_seqlens, weight [V, H], and
    ids. Tokens are counted there. The constructor takes that function's options and the head's.
    """

    function = staticmethod(orpo_loss)

    @head_keywords
    def __init__(
        self, *, beta: float = 0.1, alpha: float = 1.0, reduction: str = "mean", **head: Unpack[HeadSettings]
    ) -> None:
        super().__init__({"beta": beta, "alpha": alpha, "reduction": reduction}, head)


class LinearSimPOLoss(_LinearPairLoss):
    """`fastalign.simpo_loss` on the head as a module; as LinearORPOLoss."""

    function = staticmethod(simpo_loss)

    @head_keywords
    def __init__(
        self,
        *,
        beta: float = 2.0,
        gamma: float = 1.0,
        alpha: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        **head: Unpack[HeadSettings],
    ) -> None:
        options = {"beta": beta, "gamma": gamma, "alpha": alpha}
        super().__init__({**options, "label_smoothing": label_smoothing, "reduction": reduction}, head)


class LinearCPOLoss(_LinearPairLoss):
    """`fastalign.cpo_loss` on the head as a module; as LinearORPOLoss.

    The chosen completion's NLL is the sum over its tokens, as in the paper.
    """

    function = staticmethod(cpo_loss)
    takes_lengths = False

    @head_keywords
    def __init__(
        self,
        *,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        **head: Unpack[HeadSettings],
    ) -> None:
        options = {"beta": beta, "alpha": alpha}
        super().__init__({**options, "label_smoothing": label_smoothing, "reduction": reduction}, head)


class LinearKTOLoss(LossModule):
    """`fastalign.linear_kto_loss` as a module; returns a LinearUnpairedLoss.

    The call takes hidden [S, T, H] or packed [N, H] with cu_seqlens, weight [V, H], ids, desirable [S]
    bool, kl, and the reference's hidden states and weight, or its log-probabilities.

    The constructor takes that function's options; errors are raised as there.
    """

    @head_keywords
    def __init__(
        self,
        *,
        beta: float = 0.1,
        loss_type: str = "kto",
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        **head: Unpack[HeadSettings],
    ) -> None:
        unpaired_options(loss_type, beta, desirable_weight, undesirable_weight)
        head_options(LinearKTOLoss, head, HEAD_SETTINGS)
        super().__init__(
            beta=beta,
            loss_type=loss_type,
            desirable_weight=desirable_weight,
            undesirable_weight=undesirable_weight,
            **with_defaults(head),
        )

    @sequence_keywords
    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        ids: Tensor,
        desirable: Tensor,
        kl: Tensor | None,
        bias: Tensor | None = None,
        *,
        lora: LowRank | None = None,
        **tensors: Unpack[SequenceTensors],
    ) -> LinearUnpairedLoss:
        refuse_unknown(LinearKTOLoss.forward, tensors, SEQUENCE_TENSORS)
        return linear_kto_loss(hidden, weight, ids, desirable, kl, bias, lora=lora, **tensors, **self.options)
