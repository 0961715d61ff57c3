"""The losses of a token that weigh its ratio smoothly: SAPO and VESPO, as Liger and TRL define them.

All tensors are [B, T]. Values outside the mask `inside` are never used. A log-ratio is clamped to ±20.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

LARGEST_EXPONENT = 20.0
SMALLEST_WEIGHT = 1e-8


class SapoTemperatures(NamedTuple):
    """SAPO's temperatures > 0: for tokens with a positive advantage, and for the rest."""

    positive: float = 1.0
    negative: float = 1.05


class VespoShape(NamedTuple):
    """k and lambda of phi(w) = w^k e^(lambda (1 - w)), for advantages >= 0 and < 0."""

    k_positive: float = 2.0
    lambda_positive: float = 3.0
    k_negative: float = 3.0
    lambda_negative: float = 2.0


def sapo_losses(
    logp: Tensor, old: Tensor, advantages: Tensor, inside: Tensor, temperatures: SapoTemperatures
) -> Tensor:
    """-A (4 / tau) sigmoid(tau (ratio - 1)) of each token (2511.20347), 0 outside the mask."""
    ratio = _log_ratio(logp, old, inside).exp()
    advantages = advantages.where(inside, 0)
    positive, negative = (4 / tau * torch.sigmoid(tau * (ratio - 1)) for tau in temperatures)
    return -advantages * torch.where(advantages > 0, positive, negative)


def vespo_losses(
    logp: Tensor,
    old: Tensor,
    advantages: Tensor,
    inside: Tensor,
    rollout_ratio: Tensor | None,
    shape: VespoShape,
) -> Tensor:
    """-phi(w) A logp of each token, 0 outside the mask. phi has no gradient.

    w is the product of a completion's ratios, and of its rollout's if they are given.

    Args:
        advantages: [B].
        rollout_ratio: [B, T] or [B, 1], the old policy's probabilities over the rollout engine's.
    """
    lowest = math.log(SMALLEST_WEIGHT)
    with torch.no_grad():
        log_weight = _log_ratio(logp, old, inside).sum(-1, keepdim=True)
        if rollout_ratio is not None:
            logs = rollout_ratio.log().clamp(lowest, LARGEST_EXPONENT)
            if logs.shape == inside.shape:
                logs = logs.where(inside, 0)
            log_weight = log_weight + logs.sum(-1, keepdim=True)
        log_weight = log_weight.clamp(lowest, LARGEST_EXPONENT)
        gain = (advantages >= 0)[:, None]
        k = torch.full_like(log_weight, shape.k_negative).masked_fill(gain, shape.k_positive)
        decay = torch.full_like(log_weight, shape.lambda_negative).masked_fill(gain, shape.lambda_positive)
        decay = decay.clamp(min=1e-4)
        phi = (decay + k * log_weight - decay * log_weight.exp()).exp()
    return -(phi * advantages[:, None]) * logp.where(inside, 0)


def _log_ratio(logp: Tensor, old: Tensor, inside: Tensor) -> Tensor:
    return (logp - old).where(inside, 0).clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)
