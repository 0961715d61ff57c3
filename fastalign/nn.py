"""The losses as modules, as in torch.nn: options in the constructor, tensors in the call.

No module owns parameters. The head's weight is the model's and comes with the call, so ties, adapters and
sharding stay with the model. A LoRA adapter on the head comes with the call too, as `lora`. Options are
checked in the constructor, tensors in the call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from fastalign_kernels import (
    LinearPreferenceLoss,
    LinearUnpairedLoss,
    PolicyLoss,
    PreferenceLoss,
    checks,
    cpo_loss,
    cross_entropy,
    linear_cross_entropy,
    linear_dpo_loss,
    linear_kto_loss,
    linear_ppo_loss,
    orpo_loss,
    simpo_loss,
)
from fastalign_kernels.keywords import flat_signature, refuse_unknown
from fastalign_kernels.linear.inputs import (
    HEAD_DEFAULTS,
    HEAD_SETTINGS,
    HeadSettings,
    check_tail_smoothing,
    head_inputs,
    head_keywords,
    head_options,
)
from fastalign_kernels.linear.low_rank import LowRank, as_low_rank
from fastalign_kernels.linear.policy_inputs import (
    LINEAR_POLICY_SETTINGS,
    POLICY_DEFAULTS,
    POLICY_NUMBERS,
    POLICY_TENSORS,
    LinearPolicySettings,
    policy_keywords,
)
from fastalign_kernels.linear.sequences import SEQUENCE_TENSORS, Rows, SequenceTensors, sequence_keywords
from fastalign_kernels.logits import loss_options, make_transform
from fastalign_kernels.policy.arguments import AGGREGATIONS, PolicySettings, PolicyTensors, policy_options
from fastalign_kernels.preference.arguments import pair_options, unpaired_options


class _Loss(nn.Module):
    """Keeps the options.

    Each constructor checks its options as its function does, so that a bad one fails there.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _with_defaults(
    given: Mapping[str, Any], names: type = HeadSettings, defaults: Mapping[str, Any] = HEAD_DEFAULTS
) -> dict[str, Any]:
    """The items of a TypedDict, those that were not given by default."""
    return {name: given.get(name, defaults[name]) for name in names.__annotations__}


class CrossEntropyLoss(_Loss):
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


class LinearCrossEntropyLoss(_Loss):
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
            label_smoothing=label_smoothing, z_loss=z_loss, reduction=reduction, **_with_defaults(head)
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


class LinearDPOLoss(_Loss):
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
            beta=beta, loss_type=loss_type, label_smoothing=label_smoothing, **_with_defaults(head)
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


class _LinearPairLoss(_Loss):
    """A loss of pairs without a reference, on the head. A subclass names its function.

    It costs 1 GEMM for the log-probabilities and 2 or 3 for the gradients, as `linear_logprobs` does.
    """

    function: Callable[..., PreferenceLoss]
    takes_lengths = True  # of the chosen and the rejected completions

    def __init__(self, options: dict[str, Any], head: HeadSettings) -> None:
        checked = head_options(type(self), head, HEAD_SETTINGS)
        self._loss(torch.empty(2, 0), torch.empty(2, 0, dtype=torch.int64), options)  # checks the options
        super().__init__(**options, **_with_defaults(head))
        self.head, self.loss_options = checked, options

    @classmethod
    def _loss(cls, logps: Tensor, lengths: Tensor, options: dict[str, Any]) -> PreferenceLoss:
        """From log-probabilities and numbers of tokens [2, S], those of the chosen completions first."""
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


class LinearKTOLoss(_Loss):
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
            **_with_defaults(head),
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


class LinearPPOLoss(_Loss):
    """`fastalign.linear_ppo_loss` as a module; returns a PolicyLoss.

    The call takes hidden [B, T, H] or packed [N, H], weight [V, H], ids, old_logp, advantages and mask of
    one shape, bias [V] or None, and the reference's log-probabilities.

    The constructor takes that function's options; errors are raised as there.
    """

    @policy_keywords
    def __init__(self, **options: Unpack[LinearPolicySettings]) -> None:
        head_options(LinearPPOLoss, options, LINEAR_POLICY_SETTINGS)
        policy = _with_defaults(options, PolicySettings, POLICY_DEFAULTS)
        policy_options(*[policy[name] for name in POLICY_NUMBERS])
        checks.choice("aggregation", policy["aggregation"], AGGREGATIONS)
        super().__init__(**policy, **_with_defaults(options))

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
