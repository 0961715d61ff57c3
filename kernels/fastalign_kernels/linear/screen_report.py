"""What screened logits cost in accuracy, on a sample of a model's own tokens."""

from __future__ import annotations

from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from .cross_entropy import linear_cross_entropy
from .options import HeadSettings, SoftmaxArguments, head_keywords
from .report_inputs import HeadTensors, relative_error, sampled_inputs
from .screen import COUNTER
from .tail_columns import COUNTER as TAIL_COUNTER
from .token_stats import linear_token_stats


class ScreenReport(NamedTuple):
    """Numbers, not tensors. Errors of gradients are relative, in the L2 norm over all entries."""

    logp_error: float  # nats, root mean square over tokens
    largest_logp_error: float  # nats
    entropy_error: float  # nats, root mean square
    exact_columns: float  # logits that are made exact, mean over the tokens that are screened
    exact_tokens: float  # share of tokens that are computed exactly
    open_columns: float  # columns that no bound can rule out as larger than EXACT_EPS, mean over these tokens
    hidden_error: float  # of the gradient of the mean cross-entropy, with tail_eps as given
    weight_error: float


@head_keywords
def screen_report(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    tail_eps: float | None = None,
    sample: int = 2048,
    workspace_mib: float | None = None,
    **head: Unpack[SoftmaxArguments],
) -> ScreenReport:
    """The errors of `screen=True` against exact logits, on the first `sample` kept tokens.

    Costs about 8 GEMMs and two gradients of the weight.

    Args:
        hidden, weight, targets, bias: [..., H], [V, H], [...], [V]; these and the keywords as in
            `linear_cross_entropy`.
        sample: tokens that are not ignored, at most.
    Raises:
        ValueError: as `linear_cross_entropy` with screen=True; sample is below 1, no token is left to
            measure, or logit_scale is 0, which makes all gradients 0.
    """
    options: HeadSettings = {"tail_eps": tail_eps, "workspace_mib": workspace_mib, "screen": True}
    sampled = sampled_inputs(
        screen_report, HeadTensors(hidden, weight, targets, bias), head, options, sample=sample
    )
    tensors = (sampled.hidden, sampled.weight, sampled.ids, sampled.bias)
    with torch.no_grad(), COUNTER.restored():
        exact = linear_token_stats(*tensors, workspace_mib=workspace_mib, **head)
        COUNTER.take()
        screened = linear_token_stats(*tensors, screen=True, check=True, workspace_mib=workspace_mib, **head)
        counts = COUNTER.counts

    def gradients(tail: float | None, screen: bool | None) -> tuple[Tensor, ...]:
        loss = linear_cross_entropy(
            *tensors, tail_eps=tail, screen=screen, workspace_mib=workspace_mib, **head
        )
        return torch.autograd.grad(loss, (sampled.hidden, sampled.weight))

    with COUNTER.restored(), TAIL_COUNTER.restored():
        errors = [relative_error(a, e) for a, e in zip(gradients(tail_eps, True), gradients(None, None))]
    logp = (screened.logp - exact.logp).double()
    assert exact.entropy is not None and screened.entropy is not None
    entropy = (screened.entropy - exact.entropy).double()
    here = max(1, counts.tokens - counts.exact_tokens)
    return ScreenReport(
        float(logp.square().mean().sqrt()),
        float(logp.abs().amax()),
        float(entropy.square().mean().sqrt()),
        counts.exact_columns / here,
        counts.exact_tokens / counts.tokens,
        counts.open_columns / here,
        *errors,
    )
