"""What a tail_eps costs in accuracy and saves in columns, on a sample of a model's own tokens."""

from __future__ import annotations

from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from ..ordered_sum import ordered_sum
from .chunks import ChunkRunner, Operands, new_stats, planned_chunks, run_chunks
from .cross_entropy import linear_cross_entropy
from .inputs import HeadInputs, NeedsGrad
from .options import HeadSettings, SoftmaxArguments, head_keywords
from .report_inputs import HeadTensors, relative_error, sampled_inputs
from .tail_columns import COUNTER, chunks_with_columns


class TailReport(NamedTuple):
    """Numbers, not tensors, of the gradients of the mean cross-entropy.

    Errors are relative, in the L2 norm over all entries.
    """

    kept_share: float  # of the columns, mean over chunks; 1 where a chunk ran dense
    dropped_mass: float  # of P, mean over tokens; with a softcap of P * (1 - tanh(u / softcap)^2), its slope
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
    options: HeadSettings = {"tail_eps": tail_eps, "workspace_mib": workspace_mib}
    sampled = sampled_inputs(
        tail_report, HeadTensors(hidden, weight, targets, bias), head, options, sample=sample
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
        mass = _dropped_mass(sampled)
        share = COUNTER.counts.share
        assert share is not None
        errors = [relative_error(a, e) for a, e in zip(gradients(tail_eps), gradients(None))]
    # The sums are of p dz/dx: a softcap's slope is counted in.
    logit_scale, _, temperature = sampled.options.transform
    return TailReport(share, mass / sampled.ids.numel() * temperature / logit_scale, *errors)


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
