"""The specifications of preference/losses.py: the papers' formulas in plain PyTorch.

Autograd differentiates them, and they are valid in fp64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import accumulator_of
from .formulas import DPO_LOSS_TYPES
from .ops import reduce_losses
from .results import PreferenceLoss, RewardLoss, UnpairedLoss


def _widened(*tensors: Tensor) -> list[Tensor]:
    return [x.to(accumulator_of(*tensors)) for x in tensors]


def _mean_over_tokens(logps: Tensor, lengths: Tensor | None) -> Tensor:
    return logps if lengths is None else logps / lengths.clamp(min=1)


def _smoothed(x: Tensor, label_smoothing: float) -> Tensor:
    flipped = label_smoothing * F.logsigmoid(-x) if label_smoothing else 0.0  # 0 * -inf is NaN
    return -(1 - label_smoothing) * F.logsigmoid(x) - flipped


# The losses of a pair as in their papers. They are functions of the log-ratios c and r of the chosen and the
# rejected completion, of beta, and of the label smoothing e.


def _exo_pair(c: Tensor, r: Tensor, beta: float, e: float) -> Tensor:
    x = beta * (c - r)
    log_q, log_p = F.logsigmoid(x), F.logsigmoid(-x)
    right, flipped = torch.tensor([1 - e, e], dtype=x.dtype, device=x.device).log()
    return log_q.exp() * (log_q - right) + log_p.exp() * (log_p - flipped)


def _robust(c: Tensor, r: Tensor, beta: float, e: float) -> Tensor:
    x = beta * (c - r)
    flipped = e * F.logsigmoid(-x) if e else 0.0
    return (-(1 - e) * F.logsigmoid(x) + flipped) / (1 - 2 * e)


def _nca_pair(c: Tensor, r: Tensor, beta: float, e: float) -> Tensor:
    return -F.logsigmoid(beta * c) - 0.5 * F.logsigmoid(-beta * c) - 0.5 * F.logsigmoid(-beta * r)


def _discopop(c: Tensor, r: Tensor, beta: float, e: float) -> Tensor:
    x = beta * (c - r)
    modulation = torch.sigmoid(x / 0.05)
    return -F.logsigmoid(x) * (1 - modulation) + torch.exp(-x + F.logsigmoid(x / 0.05))


PAIR_REFERENCES: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "sigmoid": lambda c, r, beta, e: _smoothed(beta * (c - r), e),
    "hinge": lambda c, r, beta, e: torch.relu(1 - beta * (c - r)),
    "ipo": lambda c, r, beta, e: (c - r - 1 / (2 * beta)) ** 2,
    "robust": _robust,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "bco_pair": lambda c, r, beta, e: -F.logsigmoid(beta * c) - F.logsigmoid(-beta * r),
    "sppo_hard": lambda c, r, beta, e: (c - 0.5 / beta) ** 2 + (r + 0.5 / beta) ** 2,
    "apo_zero": lambda c, r, beta, e: 1 - torch.sigmoid(beta * c) + torch.sigmoid(beta * r),
    "apo_down": lambda c, r, beta, e: torch.sigmoid(beta * c) + 1 - torch.sigmoid(beta * (c - r)),
    "discopop": _discopop,
    "sigmoid_norm": lambda c, r, beta, e: _smoothed(beta * (c - r), e),
}


def dpo_loss_ref(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    reduction: str = "mean",
) -> PreferenceLoss:
    """The specification of `dpo_loss`."""
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = _widened(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps.detach(),
        reference_rejected_logps.detach(),
    )
    chosen, rejected = policy_chosen - reference_chosen, policy_rejected - reference_rejected
    rewards = (beta * chosen).detach(), (beta * rejected).detach()
    chosen, rejected = (
        _mean_over_tokens(chosen, chosen_lengths),
        _mean_over_tokens(rejected, rejected_lengths),
    )
    if loss_type not in DPO_LOSS_TYPES:
        raise ValueError(f"loss_type: got {loss_type!r}, expected one of {', '.join(DPO_LOSS_TYPES)}")
    loss = PAIR_REFERENCES[loss_type](chosen, rejected, beta, label_smoothing)
    return PreferenceLoss(reduce_losses(loss, reduction), *rewards)


def simpo_loss_ref(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    *,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float = 2.0,
    gamma: float = 1.0,
    alpha: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> PreferenceLoss:
    """The specification of `simpo_loss`."""
    chosen, rejected = _widened(policy_chosen_logps, policy_rejected_logps)
    chosen, rejected = (
        _mean_over_tokens(chosen, chosen_lengths),
        _mean_over_tokens(rejected, rejected_lengths),
    )
    loss = _smoothed(beta * (chosen - rejected) - gamma, label_smoothing) - alpha * chosen
    return PreferenceLoss(
        reduce_losses(loss, reduction), (beta * chosen).detach(), (beta * rejected).detach()
    )


def orpo_loss_ref(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    *,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float = 0.1,
    alpha: float = 1.0,
    reduction: str = "mean",
) -> PreferenceLoss:
    """The specification of `orpo_loss`."""

    def log_odds(logp: Tensor) -> Tensor:
        # A plain sum would turn -inf into NaN
        logp = torch.where(logp > -1e-6, logp + (-1e-6 - logp).detach(), logp)
        return logp - torch.log(-torch.expm1(logp))

    chosen, rejected = _widened(policy_chosen_logps, policy_rejected_logps)
    chosen, rejected = (
        _mean_over_tokens(chosen, chosen_lengths),
        _mean_over_tokens(rejected, rejected_lengths),
    )
    loss = -beta * F.logsigmoid(log_odds(chosen) - log_odds(rejected)) - alpha * chosen
    return PreferenceLoss(
        reduce_losses(loss, reduction), (beta * chosen).detach(), (beta * rejected).detach()
    )


def cpo_loss_ref(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    reduction: str = "mean",
) -> PreferenceLoss:
    """The specification of `cpo_loss`."""
    chosen, rejected = _widened(policy_chosen_logps, policy_rejected_logps)
    loss = _smoothed(beta * (chosen - rejected), label_smoothing) - alpha * _mean_over_tokens(
        chosen, chosen_lengths
    )
    return PreferenceLoss(
        reduce_losses(loss, reduction), (beta * chosen).detach(), (beta * rejected).detach()
    )


def kto_loss_ref(
    policy_logps: Tensor,
    reference_logps: Tensor,
    desirable: Tensor,
    kl: Tensor | None,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    loss_type: str = "kto",
    reduction: str = "mean",
) -> UnpairedLoss:
    """The specification of `kto_loss`."""
    policy, reference = _widened(policy_logps, reference_logps.detach())
    ratio = policy - reference
    z = torch.zeros_like(ratio) if kl is None or loss_type == "apo_zero_unpaired" else kl.detach().to(ratio)
    good = desirable_weight * (1 - torch.sigmoid(beta * (ratio - z)))
    bad = undesirable_weight * (1 - torch.sigmoid(beta * (z - ratio)))
    loss = torch.where(desirable, good, bad)
    return UnpairedLoss(reduce_losses(loss, reduction), (beta * ratio).detach())


def reward_loss_ref(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    margin: Tensor | None = None,
    *,
    center_coefficient: float = 0.0,
) -> RewardLoss:
    """The specification of `reward_loss`."""
    asked = torch.zeros_like(chosen_scores) if margin is None else margin.detach()
    chosen, rejected, asked = _widened(chosen_scores, rejected_scores, asked)
    loss = -F.logsigmoid(chosen - rejected - asked)
    if center_coefficient:  # 0 * inf is NaN
        loss = loss + center_coefficient * (chosen + rejected) ** 2
    margins = (chosen - rejected).detach()
    return RewardLoss(loss.mean(), torch.where(margins.isnan(), margins, margins > 0).mean(), margins.mean())
