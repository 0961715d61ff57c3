"""The specifications of policy/losses.py and policy/advantages.py: the papers' formulas in plain PyTorch.

They are valid in fp64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import accumulator_of
from .advantages import Advantages
from .arguments import per_token
from .losses import PolicyLoss, ValueLoss
from .ops import LARGEST_EXPONENT


def _inside(mask: Tensor, *tensors: Tensor | None) -> list[Any]:
    """The tensors in fp32 or fp64, with 0 outside the mask; None stays None."""
    dtype = accumulator_of(*tensors)
    return [None if x is None else torch.where(mask, x.to(dtype), 0.0) for x in tensors]


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def _aggregated(
    losses: Tensor,
    mask: Tensor,
    aggregation: str,
    normalizer: float | Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    if aggregation != "sequence_mean":
        tokens = mask.sum().clamp(min=1) if aggregation == "token_mean" else 1
        return torch.where(mask, losses, 0.0).sum() / (tokens if normalizer is None else normalizer)
    if cu_seqlens is None:
        rows = list(zip(losses, mask))
    else:
        sizes = cu_seqlens.diff().tolist()
        rows = list(zip(losses.split(sizes), mask.split(sizes)))
    sequences = [_mean(row, inside) for row, inside in rows if inside.any()]
    total = torch.stack(sequences).sum() if sequences else losses.sum() * 0
    return total / (max(len(sequences), 1) if normalizer is None else normalizer)


def ppo_loss_ref(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float | None = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    entropy: Tensor | None = None,
    entropy_coefficient: float = 0.0,
    reference_logp: Tensor | None = None,
    kl_coefficient: float = 0.0,
    kl_estimator: str = "k3",
    aggregation: str = "token_mean",
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> PolicyLoss:
    """The specification of `ppo_loss`."""
    mask = mask != 0
    old = logp if old_logp is None else old_logp
    advantages = per_token(advantages, logp.shape)
    logp, old, a, h, reference = _inside(mask, logp, old, advantages, entropy, reference_logp)
    old, a = old.detach(), a.detach()
    high = clip if clip_high is None else clip_high
    ratio = (logp - old).clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT).exp()
    held = (
        ratio.clamp(None if clip is None else 1 - clip, None if high is None else 1 + high)
        if (clip, high) != (None, None)
        else ratio
    )
    policy = torch.maximum(-a * ratio, -a * held)
    clipped = -a * held > -a * ratio
    if dual_clip is not None:
        clipped = clipped | ((a < 0) & (policy > -a * dual_clip))
        policy = torch.where(a < 0, torch.minimum(policy, -a * dual_clip), policy)
    losses, kl = policy, None
    if h is not None and entropy_coefficient:  # with 0 it is a metric alone, whose inf and NaN are its own
        losses = losses - entropy_coefficient * h
    if reference is not None:
        d = logp - reference.detach()
        e = d.clamp(min=-LARGEST_EXPONENT)
        kl = {"k1": d, "k2": 0.5 * d**2, "k3": torch.expm1(-e) + e}[kl_estimator]
        if kl_coefficient:
            losses = losses + kl_coefficient * kl
    loss = _aggregated(losses, mask, aggregation, normalizer, cu_seqlens)
    clips = torch.where(policy.isnan(), policy, clipped)
    means = [
        None if x is None else _mean(x, mask).detach()
        for x in (policy, h, kl, ratio, clips, 0.5 * (logp - old) ** 2)
    ]
    return PolicyLoss(loss, *means)  # type: ignore[arg-type]


def value_loss_ref(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | None = 0.2,
    normalizer: float | Tensor | None = None,
) -> ValueLoss:
    """The specification of `value_loss`."""
    mask = mask != 0
    v, old, target = _inside(mask, values, old_values.detach(), returns.detach())
    squares = (v - target) ** 2
    held = squares if clip is None else (torch.clamp(v, old - clip, old + clip) - target) ** 2
    clipped = held > squares
    squares = torch.where(old.isnan(), old * v, torch.where(clipped, held, squares))
    clips = torch.where(squares.isnan(), squares, clipped).detach()
    loss = _aggregated(0.5 * squares, mask, "token_mean", normalizer, None)
    left, spread = (x[mask].detach().double().var(correction=0) for x in (target - v, target))
    return ValueLoss(
        loss, _mean(clips, mask), torch.where(spread > 0, 1 - left / spread, torch.nan).to(v.dtype)
    )


def gae_ref(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: Tensor | None = None,
) -> Advantages:
    """The specification of `gae`: the loop over time that PPO's trainers have."""
    mask = mask != 0
    r, v = _inside(mask, rewards, values)
    following = torch.zeros_like(v[:, 0]) if bootstrap is None else bootstrap.to(v.dtype)
    running, advantages = torch.zeros_like(following), torch.zeros_like(v)
    for t in reversed(range(v.shape[1])):
        delta = r[:, t] + gamma * following - v[:, t]
        running = torch.where(mask[:, t], delta + gamma * lam * running, running)
        following = torch.where(mask[:, t], v[:, t], following)
        advantages[:, t] = torch.where(mask[:, t], running, 0.0)
    return Advantages(advantages, advantages + v)


def masked_whiten_ref(x: Tensor, mask: Tensor, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """The specification of `masked_whiten` in one process."""
    mask = mask != 0
    (inside,) = _inside(mask, x)
    mean = inside.sum() / mask.sum()
    variance = torch.where(mask, (inside - mean) ** 2, 0.0).sum() / (mask.sum() - 1).clamp(min=1)
    white = (inside - mean) * torch.rsqrt(variance + eps)
    return torch.where(mask, white if shift_mean else white + mean, 0.0)
