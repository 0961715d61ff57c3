"""What a tail_eps costs in accuracy and saves in columns, on a sample of a model's own tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..ordered_sum import ordered_sum
from ..softmax.rows import Transform
from .accumulate import GradientSums
from .cross_entropy import linear_cross_entropy, prepare
from .tail_columns import kept_share
from .token_tiles import Head, chunk_blocks, new_table, no_autocast, tail_blocks


class TailReport(NamedTuple):
    """Numbers, not tensors. Errors are relative, in the L2 norm over all entries, of the gradients of the
    mean cross-entropy."""

    kept_share: float  # of the columns, mean over blocks; 1 where a block ran dense
    dropped_mass: float  # of the softmax, mean over tokens
    hidden_error: float
    weight_error: float


def tail_report(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    tail_eps: float,
    sample: int = 2048,
    ignore_index: int | None = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    workspace_mib: float | None = None,
) -> TailReport:
    """Measure tail_eps on the first `sample` tokens that are not ignored: the tail's gradients against the
    exact ones.

    hidden [..., H], weight [V, H], targets [...], bias [V] and the options as in `linear_cross_entropy`.
    Costs about 6 GEMMs and two gradients of the weight; it waits for the device.

    Raises:
        ValueError: as `linear_cross_entropy`, and for tail_eps None, a sample below 1, no token to measure, or logit_scale 0, which
            makes all gradients 0.
    """
    if tail_eps is None:
        raise ValueError("tail_eps: None seen, a probability in (0, 1) wanted")
    checks.whole("sample", sample, 1, expected="a whole number >= 1")
    if checks.number("logit_scale", logit_scale) == 0:
        raise ValueError(
            "logit_scale: got 0, expected another number: it makes all gradients 0, so that no error is relative to them"
        )
    checks.tensor("hidden", hidden)
    if not checks.readable(hidden, check=True):
        raise ValueError(f"hidden: got a tensor without values, on {hidden.device}, expected one with values")
    arguments = prepare(
        hidden,
        weight,
        targets,
        "targets",
        bias,
        softcap,
        logit_scale,
        temperature,
        ignore_index,
        tail_eps,
        workspace_mib,
        True,
    )
    flat, _, ids, bias, *transform, workspace, eps = arguments
    own = (ids >= 0).nonzero()[:sample, 0]
    if not own.numel():
        raise ValueError("targets: none seen that is not ignored, at least one wanted")
    x, w, y = flat[own].detach().requires_grad_(), weight.detach().requires_grad_(), ids[own]
    b = None if bias is None else bias.detach()

    kept_share()
    head = Head(x.detach(), w.detach(), y, b, Transform(*transform), workspace, eps)
    dropped = 0.0
    with no_autocast(head):
        sums = GradientSums(*head[:2], b, head.transform, (False, False, False))
        for _, kept in tail_blocks(
            head, sums, chunk_blocks(head, sums, new_table(head), True, None, (True, True, False))
        ):
            dropped += 0.0 if kept is None else float(ordered_sum(kept.others))
    share = kept_share()
    assert share is not None
    mass = dropped / own.numel() * temperature / logit_scale  # of p dz/dx: a softcap's slope is counted in

    def gradients(tail: float | None) -> tuple[Tensor, ...]:
        loss = linear_cross_entropy(
            x,
            w,
            y,
            b,
            softcap=softcap,
            logit_scale=logit_scale,
            temperature=temperature,
            tail_eps=tail,
            workspace_mib=workspace_mib,
        )
        return torch.autograd.grad(loss, (x, w))

    errors = [relative_error(a, e) for a, e in zip(gradients(eps), gradients(None))]
    kept_share()
    return TailReport(share, mass, *errors)


def relative_error(approximate: Tensor, exact: Tensor) -> float:
    """In the L2 norm; 0 where both are 0."""
    difference, norm = (approximate.double() - exact.double()).norm(), exact.double().norm()
    return float(difference / norm.clamp(min=torch.finfo(norm.dtype).tiny))
