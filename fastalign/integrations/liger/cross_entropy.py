"""Liger's cross-entropy, from hidden states and from logits."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastalign_kernels as fk

from ..soft_targets import soft_cross_entropy, target_weights


@dataclass
class CrossEntropyOutput:
    """What Liger's cross-entropy returns if it is asked for more than the loss. None: not asked for.

    z_loss is the part of the loss that lse_square_scale adds. It is reduced as the loss is. token_accuracy is
    a mean for "sum" too, as in Liger.
    """

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


class _CrossEntropy(nn.Module):
    """The options of both losses, and how token losses are weighted and reduced."""

    def __init__(
        self,
        class_weights: Tensor | None,
        *,
        ignore_index: int,
        lse_square_scale: float,
        label_smoothing: float,
        reduction: str,
        softcap: float | None,
        return_z_loss: bool,
        return_token_accuracy: bool,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction: got {reduction!r}, expected 'mean', 'sum' or 'none'")
        if class_weights is not None and label_smoothing and softcap is not None:
            raise ValueError(
                f"softcap: got {softcap} with class weights and label_smoothing, expected None: a cap makes "
                "logits that are not linear in the head"
            )
        self.class_weights = class_weights
        self.ignore_index = ignore_index
        self.lse_square_scale = lse_square_scale
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.softcap = softcap
        self.return_z_loss = return_z_loss
        self.return_token_accuracy = return_token_accuracy

    def softmax_options(self) -> dict[str, Any]:
        return {"ignore_index": self.ignore_index, "softcap": self.softcap}

    def reduced(self, values: Tensor, divisor: Tensor) -> Tensor:
        """Token values as `reduction` says."""
        if self.reduction == "none":
            return values
        return values.sum() / divisor if self.reduction == "mean" else values.sum()

    def result(
        self,
        target: Tensor,
        *,
        loss: Callable[..., Tensor],
        loss_and_stats: Callable[..., tuple[Tensor, Any]],
        stats: Callable[..., fk.TokenStats],
        smooth: Callable[[Tensor, Tensor], Tensor],
        scaling: Tensor | None = None,
        predicted: Tensor | None = None,
    ) -> Tensor | CrossEntropyOutput:
        """The loss, and the statistics that were asked for.

        Args:
            loss, stats: functions of the options, such as `cross_entropy` and `token_stats`.
            loss_and_stats: both at once; the statistics without gradient.
            smooth: from lse [...] and weights [V] to sum_v weights_v (-log P[v]) of each token.
            scaling: [...], multiplies each token's loss.
        """
        count = (target != self.ignore_index).sum().clamp(min=1)  # Liger's mean of no token is 0
        weights, divisor = scaling, count
        if self.class_weights is not None:
            of_targets = target_weights(self.class_weights, target, self.ignore_index)
            weights = of_targets if scaling is None else of_targets * scaling
            total = of_targets.sum()
            divisor = total.where(total != 0, 1)
        scored: Any = None
        if self.class_weights is not None and (self.label_smoothing or self.lse_square_scale):
            scored = stats(entropy=False, **self.softmax_options())
            value = self._class_weighted(scored, target, smooth, scaling, count=count, divisor=divisor)
        else:
            options = {
                "label_smoothing": self.label_smoothing,
                "z_loss": self.lse_square_scale,
                "reduction": self.reduction,
                "token_weights": weights,
                "num_items": divisor if self.reduction == "mean" else None,
                **self.softmax_options(),
            }
            if self.return_z_loss or self.return_token_accuracy:
                value, scored = loss_and_stats(**options)
            else:
                value = loss(**options)
        if not (self.return_z_loss or self.return_token_accuracy or predicted is not None):
            return value
        output = CrossEntropyOutput(value, predicted_tokens=predicted)
        if self.return_z_loss:
            z_losses = self.lse_square_scale * scored.lse.detach() ** 2
            output.z_loss = self.reduced(z_losses if scaling is None else z_losses * scaling, count)
        if self.return_token_accuracy:
            correct = scored.top1.float()
            output.token_accuracy = correct if self.reduction == "none" else correct.sum() / count
        return output

    def _class_weighted(
        self,
        scored: fk.TokenStats,
        target: Tensor,
        smooth: Callable[[Tensor, Tensor], Tensor],
        scaling: Tensor | None,
        *,
        count: Tensor,
        divisor: Tensor,
    ) -> Tensor:
        """The loss with class weights and with label smoothing or a z-loss, which they do not weigh."""
        assert self.class_weights is not None
        of_targets = target_weights(self.class_weights, target, self.ignore_index)
        losses = -(1 - self.label_smoothing) * of_targets * scored.logp
        z_losses = self.lse_square_scale * scored.lse**2
        if self.label_smoothing:
            smoothed = smooth(scored.lse, self.class_weights / len(self.class_weights))
            losses = losses + self.label_smoothing * smoothed.where(target != self.ignore_index, 0)
        if scaling is not None:
            losses, z_losses = losses * scaling, z_losses * scaling
        return self.reduced(losses, divisor) + self.reduced(z_losses, count)


class LigerFusedLinearCrossEntropyLoss(_CrossEntropy):
    """`fastalign.linear_cross_entropy` with Liger's options.

    Args:
        ce_weight: [V], a weight for each class. The mean is divided by the sum of the targets' weights.
        ignore_index, label_smoothing, reduction, softcap: as in `fastalign.linear_cross_entropy`. The mean of
            no token is 0, as in Liger.
        lse_square_scale: `linear_cross_entropy`'s z_loss. Class weights do not weigh it.
        return_z_loss, return_token_accuracy: return a `CrossEntropyOutput`. A tie for the largest logit
            counts as a hit. In Liger only the lowest of the tied ids does.
        accum_dtype: None or torch.float32. Gradients are summed in fp32 in any case.
        use_token_scaling: multiply each token's loss by its probability, which gets no gradient. This costs
            one more GEMM.
        return_predicted_tokens: refused. No function of fastalign returns the likeliest token from hidden
            states.
    Raises:
        ValueError: an option that is not served.
    """

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        super().__init__(
            ce_weight,
            ignore_index=ignore_index,
            lse_square_scale=lse_square_scale,
            label_smoothing=label_smoothing,
            reduction=reduction,
            softcap=softcap,
            return_z_loss=return_z_loss,
            return_token_accuracy=return_token_accuracy,
        )
        if accum_dtype not in (None, torch.float32):
            raise ValueError(
                f"accum_dtype: got {accum_dtype}, expected None or torch.float32, the dtype of our sums"
            )
        if return_predicted_tokens:
            raise ValueError(
                "return_predicted_tokens: got True, expected False: no function of fastalign returns the "
                "likeliest token from hidden states"
            )
        self.use_token_scaling = use_token_scaling

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor | CrossEntropyOutput:
        """The loss of lin_weight [V, H], _input [N, H], target [N] and bias [V]. The weight comes first."""
        head = (_input, lin_weight, target, bias)
        scaling = None
        if self.use_token_scaling:
            with torch.no_grad():
                logp = fk.linear_logprobs(*head, **self.softmax_options())
                scaling = logp.exp().where(target != self.ignore_index, 0)

        def loss_and_stats(**options: Any) -> tuple[Tensor, Any]:
            scored = fk.linear_cross_entropy_stats(*head, **options)
            return scored.loss, scored

        return self.result(
            target,
            loss=partial(fk.linear_cross_entropy, *head),
            loss_and_stats=loss_and_stats,
            stats=partial(fk.linear_token_stats, *head),
            smooth=lambda lse, weights: soft_cross_entropy(lse, _input, lin_weight, bias, weights),
            scaling=scaling,
        )


class LigerCrossEntropyLoss(_CrossEntropy):
    """`fastalign.cross_entropy` with Liger's options. It does not write into the logits, as Liger does.

    Args:
        weight: [V], a weight for each class.
        ignore_index, lse_square_scale, label_smoothing, reduction, softcap, return_z_loss,
            return_token_accuracy: as in `LigerFusedLinearCrossEntropyLoss`.
        return_predicted_tokens: return a `CrossEntropyOutput` with the likeliest token, -1 where ignored.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        super().__init__(
            weight,
            ignore_index=ignore_index,
            lse_square_scale=lse_square_scale,
            label_smoothing=label_smoothing,
            reduction=reduction,
            softcap=softcap,
            return_z_loss=return_z_loss,
            return_token_accuracy=return_token_accuracy,
        )
        self.return_predicted_tokens = return_predicted_tokens

    def forward(self, _input: Tensor, target: Tensor) -> Tensor | CrossEntropyOutput:
        """The loss of logits [N, V] and target [N]."""
        predicted = None
        if self.return_predicted_tokens:
            predicted = _input.detach().argmax(-1).where(target != self.ignore_index, -1)

        def loss_and_stats(**options: Any) -> tuple[Tensor, Any]:
            with torch.no_grad():
                scored = fk.token_stats(_input, target, entropy=False, **self.softmax_options())
            return fk.cross_entropy(_input, target, **options), scored

        return self.result(
            target,
            loss=partial(fk.cross_entropy, _input, target),
            loss_and_stats=loss_and_stats,
            stats=partial(fk.token_stats, _input, target),
            smooth=lambda lse, weights: weights.sum() * lse - _input.to(lse.dtype) @ weights.to(lse.dtype),
            predicted=predicted,
        )
