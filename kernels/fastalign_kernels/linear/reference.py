"""The specifications of the head's losses and statistics: plain PyTorch with full logits, valid in fp64."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from ..logits import TokenStats, kept_ids, loss_scale, reduced, stats_of
from ..logits_ops import token_loss
from ..softmax.rows import row_stats_ref
from .inputs import SOFTMAX_ARGUMENTS, HeadOptions, SoftmaxArguments, head_keywords, head_options


def logits_ref(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Raw logits [1, N, V] in full."""
    logits = hidden @ weight.to(hidden.dtype).t()
    return (logits if bias is None else logits + bias.to(logits.dtype)).reshape(1, -1, weight.shape[0])


def _stats_ref(
    hidden: Tensor, weight: Tensor, ids: Tensor, bias: Tensor | None, options: HeadOptions
) -> Tensor:
    """The table [7, N] of softmax/rows.py."""
    kept = kept_ids(ids, options.ignore_index)
    return row_stats_ref(logits_ref(hidden, weight, bias), kept, None, options.transform)


@head_keywords
def linear_cross_entropy_ref(
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
    **head: Unpack[SoftmaxArguments],
) -> Tensor:
    """The specification of `linear_cross_entropy`."""
    options = head_options(linear_cross_entropy_ref, head, SOFTMAX_ARGUMENTS)
    stats = _stats_ref(hidden, weight, targets, bias, options)
    kept = kept_ids(targets, options.ignore_index) >= 0
    scale = loss_scale(kept, reduction, token_weights, num_items, stats.dtype)
    return reduced(token_loss(stats, label_smoothing, z_loss), scale, reduction, num_items, targets.shape)


@head_keywords
def linear_token_stats_ref(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None = None,
    *,
    entropy: bool = True,
    **head: Unpack[SoftmaxArguments],
) -> TokenStats:
    """The specification of `linear_token_stats`, and by its first field of `linear_logprobs`."""
    options = head_options(linear_token_stats_ref, head, SOFTMAX_ARGUMENTS)
    return stats_of(_stats_ref(hidden, weight, ids, bias, options), ids.shape, entropy)
