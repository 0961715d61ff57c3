"""Cross-entropy from hidden states, without the logits in memory.

    hidden [N, H], weight [V, H], targets [N]  ->  loss, and the statistics table [7, N] of softmax/rows.py

The upstream gradient of a reduced loss is a scalar. The gradients are therefore computed in forward, while
the logits exist, and backward scales them: 1 + dX + dW GEMMs of 2 N H V flops, where plain PyTorch takes 3
and holds several [N, V]. dX and dW are summed in fp32 from low-precision factors: rounding each chunk's share
of dW to bf16 would bias training. Without a reduction the loss is a function of `head_stats`.
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from ..logits import nan_without_tokens
from ..logits_ops import token_loss
from ..ordered_sum import ordered_sum
from . import engines
from .engine import empty_gradients, empty_stats
from .head_ops import register_head_loss
from .inputs import HeadInputs, NeedsGrad, head_inputs
from .options import HeadArguments, head_keywords, head_options
from .token_losses import LossOptions, TokenCrossEntropy
from .token_stats import head_stats


def _loss(
    inputs: HeadInputs,
    needs: NeedsGrad,
    scale: Tensor,
    fills_scale_late: bool,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, ...]:
    """The sum over tokens of scale [N] times cross-entropy, the table [7, N], and gradients.

    fills_scale_late: scale is uninitialised; one launch fills it with 1 / number of tokens after the logits
        GEMM is queued.
    """
    of_loss = (label_smoothing, z_loss, inputs.vocab_size)
    of_tokens = (
        TokenCrossEntropy.of_mean(scale, inputs.ids, *of_loss)
        if fills_scale_late
        else TokenCrossEntropy(scale, *of_loss)
    )
    stats, grads = engines.statistics_and_gradients(inputs, of_tokens, needs)
    d_scale = token_loss(stats, label_smoothing, z_loss)
    return ordered_sum(d_scale * of_tokens.filled_scale()), stats, *grads, d_scale


def _fake_loss(inputs, needs, scale, *_):
    stats = empty_stats(inputs)
    return stats.new_empty(()), stats, *empty_gradients(inputs, needs), torch.empty_like(scale)


_head_loss = register_head_loss(
    "head_loss", _loss, _fake_loss, differentiable=["scale"], losses="linear_cross_entropy"
)


def loss_and_stats(inputs: HeadInputs, options: LossOptions, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """The loss of targets of this shape, and the table [7, N] without gradient."""
    if options.reduction == "none" or inputs.mode("scalar") == "general":
        scale = options.scale(inputs)
        stats = head_stats(inputs)
        loss = options.reduced(stats, scale, shape)
    else:
        late = options.fills_scale_late(inputs)
        N = inputs.ids.shape
        scale = inputs.hidden.new_empty(N, dtype=torch.float32) if late else options.scale(inputs)
        of_loss = (scale, late, options.label_smoothing, options.z_loss)
        total, stats, *_ = _head_loss(inputs, inputs.needs_grad(), *of_loss)
        loss = nan_without_tokens(total, inputs.ids.numel(), options.reduction, options.num_items)
    return loss, stats.detach()


@head_keywords
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    token_weights: Tensor | None = None,
    num_items: float | Tensor | None = None,
    **head: Unpack[HeadArguments],
) -> Tensor:
    """Cross-entropy of targets under softmax(hidden @ weight.T + bias), in nats, without the logits.

    A token's loss is -(1 - e) log P[target] - e mean_v log P[v] + z_loss * lse^2, with e = label_smoothing.

    Args:
        hidden, weight, targets, bias: [..., H], [V, H], [...] and [V].
        reduction: "mean" over tokens that are not ignored (over their token_weights, or divided by
            num_items), "sum", or "none".
        token_weights: [...] float; multiplies each token's loss. Differentiable.
        num_items: divisor of "mean", for accumulation over micro-batches and ranks.
        **head: `HeadArguments` documents these keywords.

    Returns:
        A scalar, or [...] with reduction="none": fp32, fp64 for fp64. NaN where there is nothing to average,
        as in torch.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range, or is no option's name.
    """
    options = head_options(linear_cross_entropy, head)
    loss_options = LossOptions(label_smoothing, z_loss, reduction, token_weights, num_items)
    loss_options = loss_options.checked(targets, options)
    inputs = head_inputs(hidden, weight, targets, bias, loss_options.of(options), ids_name="targets")
    return loss_and_stats(inputs if label_smoothing else inputs.lean(), loss_options, targets.shape)[0]
