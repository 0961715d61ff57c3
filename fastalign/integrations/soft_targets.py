"""Cross-entropy of a head with targets that are distributions over classes, as torch and Liger define it."""

import torch
from torch import Tensor

from fastalign_kernels import checks


def soft_cross_entropy(
    lse: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor
) -> Tensor:
    """sum_v target_v (lse - z_v) of each token, where z are the logits, which are not formed.

    The expected logit needs no logits: sum_v target_v z_v = hidden . (target @ weight) + target @ bias.

    Args:
        lse: [...], logsumexp of the logits from `linear_token_stats`. Differentiable, as hidden, weight and
            bias are.
        hidden, weight, bias: [..., H], [C, H], [C].
        target: [..., C], or [C] for all tokens. It may be scaled by class weights.
    Raises:
        ValueError: a weight that is a DTensor.
    """
    checks.tensor("weight", weight)
    target = target.to(lse.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        expected = (hidden.to(lse.dtype) * (target @ weight.to(lse.dtype))).sum(-1)
        if bias is not None:
            expected = expected + target @ bias.to(lse.dtype)
    return target.sum(-1) * lse - expected


def target_weights(class_weights: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """The weight of each token's class, [...]; 0 for ignored tokens."""
    kept = targets != ignore_index
    weights = class_weights[targets.where(kept, 0).long()]
    return weights.where(kept, 0)
