"""Advantages of tokens: generalised advantage estimation (1506.02438), and whitening over a mask and all
ranks.

Over the tokens of a row that are inside the mask, in their order, with what lies between them skipped and V
after the last one 0 or given,

    delta[t] = r[t] + gamma V[t+1] - V[t],     A[t] = delta[t] + gamma lam A[t+1],     R[t] = A[t] + V[t].

A[t] is an affine function of A[t+1], and such functions compose. So a GPU scans blocks of time in parallel
(policy/advantages_triton.py). A CPU loops over time, one row a thread (csrc/policy/gae.h). Bytes: 2 B T e +
B T read, 2 B T e written, once.

Whitening reads x once for its moments, and once more to write (x - mean) / sqrt(variance + eps). Moments are
fp64: each of fixed blocks has the squares of deviations from its own mean, and blocks, then ranks, are merged
as Chan, Golub and LeVeque do; so no square cancels, and the bits do not depend on the threads. Bytes: 2 (N e
+ N) read, N e written. Nothing here has a gradient.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..dispatch import Kernels, accumulator_of
from ..namespace import NAMESPACE
from ..torch_func import must_see_the_op
from .arguments import as_bool, check_tokens


class Advantages(NamedTuple):
    """advantages and returns = advantages + values, [B, T], 0 outside the mask; without gradient."""

    advantages: Tensor
    returns: Tensor


def _gae_rows(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
    advantages: Tensor,
    returns: Tensor,
) -> None:
    """PyTorch in place of csrc/policy/gae.h: same arguments, the last two are written."""
    following = torch.zeros_like(values[:, 0]) if bootstrap is None else bootstrap
    running = torch.zeros_like(following)
    for t in reversed(range(values.shape[1])):
        inside = mask[:, t]
        running = torch.where(
            inside, rewards[:, t] + gamma * following - values[:, t] + gamma * lam * running, running
        )
        following = torch.where(inside, values[:, t], following)
        advantages[:, t] = torch.where(inside, running, 0.0)
        returns[:, t] = torch.where(inside, running + following, 0.0)


def _token_moments(x: Tensor, mask: Tensor, moments: Tensor) -> None:
    """PyTorch in place of csrc/policy/whiten.h, as `_whiten_tokens`."""
    wide, count = torch.where(mask, x.double(), 0.0), mask.sum()
    mean = wide.sum() / count.clamp(min=1)
    torch.stack([count.double(), mean, torch.where(mask, (wide - mean) ** 2, 0.0).sum()], out=moments)


def _whiten_tokens(
    x: Tensor, mask: Tensor, moments: Tensor, shift_mean: bool, eps: float, out: Tensor
) -> None:
    count, mean, squares = moments
    white = (x.double() - mean) * torch.rsqrt(squares / (count - 1).clamp(min=1) + eps)
    out.copy_(torch.where(mask, white if shift_mean else white + mean, 0.0))


KERNELS = Kernels(
    SimpleNamespace(gae_rows=_gae_rows, token_moments=_token_moments, whiten_tokens=_whiten_tokens),
    triton=".policy.advantages_triton",
)


def _gae(
    rewards: Tensor, values: Tensor, mask: Tensor, bootstrap: Tensor | None, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns [B, T]: fp32, fp64 if an input is; mask is bool."""
    dtype = accumulator_of(rewards, values, bootstrap)
    r, v = (x.to(dtype).contiguous() for x in (rewards, values))
    after = None if bootstrap is None else bootstrap.to(dtype).contiguous()
    out = torch.empty_like(v), torch.empty_like(v)
    if v.numel():
        KERNELS.select(v).gae_rows(r, v, mask.contiguous(), after, gamma, lam, *out)
    return out


gae_op = torch.library.custom_op(f"{NAMESPACE}::gae", _gae, mutates_args=())


@gae_op.register_fake
def _(rewards, values, mask, bootstrap, gamma, lam):
    out = values.new_empty(values.shape, dtype=accumulator_of(rewards, values, bootstrap))
    return out, torch.empty_like(out)


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: Tensor | None = None,
) -> Advantages:
    """Generalised advantage estimation (1506.02438, eq. 16) over the tokens of a mask.

    The formula is at the top of this file.

    Args:
        rewards: [B, T], fp32, bf16, fp16 or fp64. The reward of each token, one sequence a row.
        values: [B, T], of any of these dtypes. The value of the state in which the token was drawn.
        mask: [B, T], as in `ppo_loss`, set where a token was drawn. A token's next value and advantage are
            those of the next token inside the mask. So prompts before, padding after, and gaps between (a
            tool's output) are skipped, and their values are not used.
        gamma, lam: in [0, 1]. lam 1: the discounted rewards to come minus the value. lam 0: delta alone.
        bootstrap: [B], the value after a row's last token, for rows that were cut off. None: 0, the episode
            ended.

    Returns:
        Advantages and returns (advantages + values), [B, T], 0 outside the mask, without gradient. fp32
        (fp64 if an input is).

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range.
    """
    gamma, lam = checks.unit_interval("gamma", gamma), checks.unit_interval("lam", lam)
    checks.tensors(rewards=rewards, values=values)
    if rewards.dim() != 2:
        raise ValueError(f"rewards: got shape {list(rewards.shape)}, expected [B, T]")
    check_tokens({"rewards": rewards, "values": values}, mask)
    if bootstrap is not None:
        checks.tensor("bootstrap", bootstrap)
        checks.dtype("bootstrap", bootstrap, checks.FLOATS)
        checks.shape("bootstrap", bootstrap, (rewards.shape[0],), "[B]")
        checks.device("bootstrap", bootstrap, "rewards", rewards)
    # Without tracing the op skips the dispatcher, because its Python layers take longer than the kernel.
    run = gae_op if must_see_the_op(rewards) else _gae
    return Advantages(*run(rewards, values, as_bool(mask), bootstrap, gamma, lam))


def _moments(x: Tensor, mask: Tensor) -> Tensor:
    """The number of tokens inside the mask, their mean, and the sum of squared deviations from it, [3] fp64.

    x is fp32 or fp64 and mask bool, both dense.
    """
    out = torch.empty(3, dtype=torch.float64, device=x.device)
    KERNELS.select(x).token_moments(x, mask, out)
    return out


def _whiten(x: Tensor, mask: Tensor, moments: Tensor, shift_mean: bool, eps: float) -> Tensor:
    """x by these moments, 0 outside the mask."""
    out = torch.empty_like(x)
    if x.numel():
        KERNELS.select(x).whiten_tokens(x, mask, moments, shift_mean, eps, out)
    return out


moments_op = torch.library.custom_op(f"{NAMESPACE}::moments", _moments, mutates_args=())
whiten_op = torch.library.custom_op(f"{NAMESPACE}::whiten", _whiten, mutates_args=())


@moments_op.register_fake
def _(x, mask):
    return x.new_empty(3, dtype=torch.float64)


@whiten_op.register_fake
def _(x, mask, moments, shift_mean, eps):
    return torch.empty_like(x)


@torch.no_grad()
def masked_whiten(
    x: Tensor,
    mask: Tensor,
    *,
    shift_mean: bool = True,
    eps: float = 1e-8,
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """(x - mean) / sqrt(variance + eps), with the moments of the tokens inside the mask.

    Args:
        x: [B, T] or [N], fp32, bf16, fp16 or fp64.
        mask: of x's shape, as in `ppo_loss`. Values outside the mask are not used.
        shift_mean: False keeps the mean of x, as TRL's whiten_rewards does.
        eps: >= 0, added to the variance.
        group: the moments are over the tokens of all its ranks. A rank may have none, but every rank must
            call. None: this process's tokens.

    Returns:
        Whitened x, 0 outside the mask, without gradient. fp32 (fp64 for fp64). The variance is divided by
        tokens - 1, as in TRL. A single token becomes 0. The host does not wait for the device.

    Differences from TRL: the moments are those of all ranks, so a token is worth the same on every rank.
    TRL uses each rank's. Values outside the mask are 0 here. TRL's function whitens the padding too, and
    its trainer sets it to 0 in the next line.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, or eps < 0.
    """
    eps = checks.at_least_zero("eps", eps)
    checks.flags(shift_mean=shift_mean)
    checks.process_group(group)
    checks.tensor("x", x)
    check_tokens({"x": x}, mask)
    dense, inside = x.to(accumulator_of(x)).contiguous(), as_bool(mask).contiguous()
    # As in gae.
    moments_of, whiten = (moments_op, whiten_op) if must_see_the_op(x) else (_moments, _whiten)
    moments = moments_of(dense, inside)
    if group is not None:
        parts = [torch.empty_like(moments) for _ in range(torch.distributed.get_world_size(group))]
        torch.distributed.all_gather(parts, moments, group=group)
        counts, means, squares = torch.stack(parts, 1).unbind()
        count = counts.sum()
        mean = (counts * means).sum() / count.clamp(min=1)
        moments = torch.stack([count, mean, squares.sum() + (counts * (means - mean) ** 2).sum()])
    return whiten(dense, inside, moments, shift_mean, eps)
