"""What a tail_eps costs in accuracy and saves in columns, on a sample of a model's own tokens."""

from __future__ import annotations

from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from .. import checks
from ..ordered_sum import ordered_sum
from .chunks import ChunkRunner, Operands, new_stats, planned_chunks, run_chunks
from .cross_entropy import linear_cross_entropy
from .inputs import (
    SOFTMAX_ARGUMENTS,
    HeadInputs,
    NeedsGrad,
    SoftmaxArguments,
    head_inputs,
    head_keywords,
    head_options,
)
from .tail_columns import COUNTER, chunks_with_columns


class TailReport(NamedTuple):
    """Numbers, not tensors, of the gradients of the mean cross-entropy.

    Errors are relative, in the L2 norm over all entries.
    """

    kept_share: float  # of the columns, mean over chunks; 1 where a chunk ran dense
    dropped_mass: float  # of the softmax, mean over tokens
    hidden_error: float
    weight_error: float


@head_keywords
def tail_report(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    tail_eps: float,
    sample: int = 2048,
    workspace_mib: float | None = None,
    **head: Unpack[SoftmaxArguments],
) -> TailReport:
    """The errors of the tail's gradients against the exact ones, on the first `sample` kept tokens.

    Costs about 6 GEMMs and two gradients of the weight, and waits for the device.

    Args:
        hidden, weight, targets, bias: [..., H], [V, H], [...], [V]; these and the keywords as in
            `linear_cross_entropy`.
        sample: tokens that are not ignored, at most.
    Raises:
        ValueError: as `linear_cross_entropy`; tail_eps is None, sample is below 1, no token is left to
            measure, or logit_scale is 0, which makes all gradients 0.
    """
    if tail_eps is None:
        raise ValueError("tail_eps: got None, expected a probability in (0, 1)")
    checks.whole("sample", sample, 1, expected="a whole number >= 1")
    if checks.number("logit_scale", head.get("logit_scale", 1.0)) == 0:
        raise ValueError(
            "logit_scale: got 0, expected another number: it makes all gradients 0, so that no error is "
            "relative to them"
        )
    checks.tensor("hidden", hidden)
    if not checks.readable(hidden, check=True):
        raise ValueError(f"hidden: got a tensor without values, on {hidden.device}, expected one with values")
    given = {**head, "tail_eps": tail_eps, "workspace_mib": workspace_mib}
    options = head_options(tail_report, given, SOFTMAX_ARGUMENTS | {"tail_eps", "workspace_mib"})
    options = options._replace(check=True)
    inputs = head_inputs(hidden, weight, targets, bias, options, ids_name="targets")
    tokens = (inputs.ids >= 0).nonzero()[:sample, 0]
    if not tokens.numel():
        raise ValueError("targets: got none that is not ignored, expected at least one")
    sampled = HeadInputs(
        inputs.hidden[tokens].detach().requires_grad_(),
        weight.detach().requires_grad_(),
        inputs.ids[tokens],
        None if inputs.bias is None else inputs.bias.detach(),
        options,
    )

    def gradients(tail: float | None) -> tuple[Tensor, ...]:
        loss = linear_cross_entropy(
            sampled.hidden,
            sampled.weight,
            sampled.ids,
            sampled.bias,
            tail_eps=tail,
            workspace_mib=workspace_mib,
            **head,
        )
        return torch.autograd.grad(loss, (sampled.hidden, sampled.weight))

    with COUNTER.restored():
        COUNTER.reset()
        mass = _dropped_mass(sampled)
        share = COUNTER.share
        assert share is not None
        errors = [relative_error(a, e) for a, e in zip(gradients(tail_eps), gradients(None))]
    # The sums are of p dz/dx: a softcap's slope is counted in.
    return TailReport(share, mass / tokens.numel() * options.temperature / options.logit_scale, *errors)


@torch.no_grad()
def _dropped_mass(inputs: HeadInputs) -> float:
    """The sum over tokens and dropped columns of p dz/dx."""
    with torch.autocast(inputs.hidden.device.type, enabled=False):
        runner = ChunkRunner(inputs, Operands.of(inputs), new_stats(inputs))
        chunks = run_chunks(
            runner, planned_chunks(inputs, NeedsGrad(hidden=True, weight=True)), fill_stats=True
        )
        parts = chunks_with_columns(inputs, runner.operands, chunks)
        return sum(0.0 if kept is None else float(ordered_sum(kept.dropped_sums)) for _, _, kept in parts)


def relative_error(approximate: Tensor, exact: Tensor) -> float:
    """In the L2 norm; 0 where both are 0."""
    difference, norm = (approximate.double() - exact.double()).norm(), exact.double().norm()
    return float(difference / norm.clamp(min=torch.finfo(norm.dtype).tiny))
