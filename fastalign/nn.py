"""The losses as modules, as in torch.nn: options in the constructor, tensors in the call.

No module owns parameters. The head's weight is the model's and comes with the call, so ties, adapters and
sharding stay with the model. Options are checked in the constructor, tensors in the call.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastalign_kernels import (
    LinearPreferenceLoss,
    LinearUnpairedLoss,
    PolicyLoss,
    checks,
    cross_entropy,
    linear_cross_entropy,
    linear_dpo_loss,
    linear_kto_loss,
    linear_ppo_loss,
)
from fastalign_kernels.linear.inputs import check_tail_smoothing, head_options
from fastalign_kernels.logits import loss_options, make_transform
from fastalign_kernels.policy.arguments import AGGREGATIONS, policy_options
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

    def __init__(
        self,
        *,
        ignore_index: int | None = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        temperature: float = 1.0,
        reduction: str = "mean",
        tail_eps: float | None = None,
        workspace_mib: float | None = None,
    ) -> None:
        loss_options(reduction, label_smoothing, z_loss)
        checks.ignore_index(ignore_index)
        head_options(
            softcap=softcap,
            logit_scale=logit_scale,
            temperature=temperature,
            tail_eps=tail_eps,
            workspace_mib=workspace_mib,
        )
        check_tail_smoothing(tail_eps, label_smoothing, softcap)
        super().__init__(
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            logit_scale=logit_scale,
            temperature=temperature,
            reduction=reduction,
            tail_eps=tail_eps,
            workspace_mib=workspace_mib,
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
    ) -> Tensor:
        return linear_cross_entropy(
            hidden, weight, targets, bias, token_weights=token_weights, num_items=num_items, **self.options
        )


class LinearDPOLoss(_Loss):
    """`fastalign.linear_dpo_loss` as a module; returns a LinearPreferenceLoss.

    The call takes hidden [2S, T, H] (chosen rows first) or packed [N, H] with cu_seqlens, weight [V, H],
    ids, and the reference's hidden states and weight, or its log-probabilities.

    The constructor takes that function's options; errors are raised as there.
    """

    def __init__(
        self,
        *,
        beta: float = 0.1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        ignore_index: int | None = -100,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        temperature: float = 1.0,
        tail_eps: float | None = None,
        workspace_mib: float | None = None,
    ) -> None:
        pair_options(loss_type, beta, label_smoothing)
        checks.ignore_index(ignore_index)
        head_options(
            softcap=softcap,
            logit_scale=logit_scale,
            temperature=temperature,
            tail_eps=tail_eps,
            workspace_mib=workspace_mib,
        )
        super().__init__(
            beta=beta,
            loss_type=loss_type,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            softcap=softcap,
            logit_scale=logit_scale,
            temperature=temperature,
            tail_eps=tail_eps,
            workspace_mib=workspace_mib,
        )

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        ids: Tensor,
        bias: Tensor | None = None,
        *,
        reference_hidden: Tensor | None = None,
        reference_weight: Tensor | None = None,
        reference_bias: Tensor | None = None,
        reference_logps: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> LinearPreferenceLoss:
        return linear_dpo_loss(
            hidden,
            weight,
            ids,
            bias,
            reference_hidden=reference_hidden,
            reference_weight=reference_weight,
            reference_bias=reference_bias,
            reference_logps=reference_logps,
            cu_seqlens=cu_seqlens,
            **self.options,
        )


class LinearKTOLoss(_Loss):
    """`fastalign.linear_kto_loss` as a module; returns a LinearUnpairedLoss.

    The call takes hidden [S, T, H] or packed [N, H] with cu_seqlens, weight [V, H], ids, desirable [S]
    bool, kl, and the reference's hidden states and weight, or its log-probabilities.

    The constructor takes that function's options; errors are raised as there.
    """

    def __init__(
        self,
        *,
        beta: float = 0.1,
        loss_type: str = "kto",
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        ignore_index: int | None = -100,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        temperature: float = 1.0,
        tail_eps: float | None = None,
        workspace_mib: float | None = None,
    ) -> None:
        unpaired_options(loss_type, beta, desirable_weight, undesirable_weight)
        checks.ignore_index(ignore_index)
        head_options(
            softcap=softcap,
            logit_scale=logit_scale,
            temperature=temperature,
            tail_eps=tail_eps,
            workspace_mib=workspace_mib,
        )
        super().__init__(
            beta=beta,
            loss_type=loss_type,
            desirable_weight=desirable_weight,
            undesirable_weight=undesirable_weight,
            ignore_index=ignore_index,
            softcap=softcap,
            logit_scale=logit_scale,
            temperature=temperature,
            tail_eps=tail_eps,
            workspace_mib=workspace_mib,
        )

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        ids: Tensor,
        desirable: Tensor,
        kl: Tensor | None,
        bias: Tensor | None = None,
        *,
        reference_hidden: Tensor | None = None,
        reference_weight: Tensor | None = None,
        reference_bias: Tensor | None = None,
        reference_logps: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> LinearUnpairedLoss:
        return linear_kto_loss(
            hidden,
            weight,
            ids,
            desirable,
            kl,
            bias,
            reference_hidden=reference_hidden,
            reference_weight=reference_weight,
            reference_bias=reference_bias,
            reference_logps=reference_logps,
            cu_seqlens=cu_seqlens,
            **self.options,
        )


class LinearPPOLoss(_Loss):
    """`fastalign.linear_ppo_loss` as a module; returns a PolicyLoss.

    The call takes hidden [B, T, H] or packed [N, H], weight [V, H], ids, old_logp, advantages and mask of
    one shape, bias [V] or None, and the reference's log-probabilities.

    The constructor takes that function's options; errors are raised as there.
    """

    def __init__(
        self,
        *,
        clip: float | None = 0.2,
        clip_high: float | None = None,
        dual_clip: float | None = None,
        entropy_coefficient: float = 0.0,
        kl_coefficient: float = 0.0,
        kl_estimator: str = "k3",
        aggregation: str = "token_mean",
        softcap: float | None = None,
        logit_scale: float = 1.0,
        temperature: float = 1.0,
        ignore_index: int | None = -100,
        tail_eps: float | None = None,
        workspace_mib: float | None = None,
    ) -> None:
        policy_options(clip, clip_high, dual_clip, entropy_coefficient, kl_coefficient, kl_estimator)
        checks.choice("aggregation", aggregation, AGGREGATIONS)
        checks.ignore_index(ignore_index)
        head_options(
            softcap=softcap,
            logit_scale=logit_scale,
            temperature=temperature,
            tail_eps=tail_eps,
            workspace_mib=workspace_mib,
        )
        super().__init__(
            clip=clip,
            clip_high=clip_high,
            dual_clip=dual_clip,
            entropy_coefficient=entropy_coefficient,
            kl_coefficient=kl_coefficient,
            kl_estimator=kl_estimator,
            aggregation=aggregation,
            softcap=softcap,
            logit_scale=logit_scale,
            temperature=temperature,
            ignore_index=ignore_index,
            tail_eps=tail_eps,
            workspace_mib=workspace_mib,
        )

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
        reference_logp: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> PolicyLoss:
        return linear_ppo_loss(
            hidden,
            weight,
            ids,
            old_logp,
            advantages,
            mask,
            bias,
            reference_logp=reference_logp,
            normalizer=normalizer,
            cu_seqlens=cu_seqlens,
            **self.options,
        )
