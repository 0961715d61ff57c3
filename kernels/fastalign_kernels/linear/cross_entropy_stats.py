"""`linear_cross_entropy` with the statistics of its tokens."""

from __future__ import annotations

from typing import NamedTuple, Unpack

from torch import Tensor

from ..logits import stats_of
from .cross_entropy import loss_and_stats
from .inputs import head_inputs
from .options import HeadArguments, head_keywords, head_options
from .token_losses import LossOptions


class CrossEntropyStats(NamedTuple):
    """loss (differentiable); per token and without gradient: logp, entropy, lse in nats, top1 bool."""

    loss: Tensor
    logp: Tensor
    entropy: Tensor
    lse: Tensor
    top1: Tensor


@head_keywords
def linear_cross_entropy_stats(
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
) -> CrossEntropyStats:
    """`linear_cross_entropy`, and the statistics of its tokens from the same pass.

    Args:
        label_smoothing, z_loss, reduction, token_weights, num_items: as in `linear_cross_entropy`.
        **head: `HeadArguments` documents these keywords.

    Returns:
        The loss, and [...] each without gradient: logp, entropy, lse, top1; 0 / False where ignored.
    """
    options = head_options(linear_cross_entropy_stats, head)
    loss_options = LossOptions(label_smoothing, z_loss, reduction, token_weights, num_items)
    loss_options = loss_options.checked(targets, options)
    inputs = head_inputs(hidden, weight, targets, bias, loss_options.of(options), ids_name="targets")
    loss, stats = loss_and_stats(inputs, loss_options, targets.shape)
    logp, entropy, lse, top1 = stats_of(stats, targets.shape, entropy=True)
    assert entropy is not None
    return CrossEntropyStats(loss, logp, entropy, lse, top1)
