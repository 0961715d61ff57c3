"""A sample of a caller's tokens, for the reports on approximations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..keywords import refuse_unknown
from .inputs import HeadInputs, head_inputs
from .options import SOFTMAX_ARGUMENTS, HeadSettings, head_options


class HeadTensors(NamedTuple):
    """The tensors that a report is called with."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None


def sampled_inputs(
    report: Callable[..., Any],
    tensors: HeadTensors,
    head: Mapping[str, Any],
    options: HeadSettings,
    *,
    sample: int,
) -> HeadInputs:
    """The first `sample` tokens that are not ignored, of which hidden and weight need a gradient.

    head: the report's keywords of `SoftmaxArguments`; options: what else it computes with.
    """
    refuse_unknown(report, head, SOFTMAX_ARGUMENTS)
    checks.whole("sample", sample, 1, expected="a whole number >= 1")
    if checks.number("logit_scale", head.get("logit_scale", 1.0)) == 0:
        raise ValueError(
            "logit_scale: got 0, expected another number: it makes all gradients 0, so that no error is "
            "relative to them"
        )
    hidden, weight, targets, bias = tensors
    checks.tensor("hidden", hidden)
    if not checks.readable(hidden, check=True):
        raise ValueError(f"hidden: got a tensor without values, on {hidden.device}, expected one with values")
    checked = head_options(report, {**head, **options})._replace(check=True)
    inputs = head_inputs(hidden, weight, targets, bias, checked, ids_name="targets")
    if inputs.options.shards is not None:
        raise ValueError("weight: got a DTensor, expected a plain tensor: a report measures on one rank")
    tokens = (inputs.ids >= 0).nonzero()[:sample, 0]
    if not tokens.numel():
        raise ValueError("targets: got none that is not ignored, expected at least one")
    return inputs._replace(
        hidden=inputs.hidden[tokens].detach().requires_grad_(),
        weight=weight.detach().requires_grad_(),
        ids=inputs.ids[tokens],
        bias=None if inputs.bias is None else inputs.bias.detach(),
    )


def relative_error(approximate: Tensor, exact: Tensor) -> float:
    """Relative error in the L2 norm; 0 if both are 0."""
    difference, norm = (approximate.double() - exact.double()).norm(), exact.double().norm()
    return float(difference / norm.clamp(min=torch.finfo(norm.dtype).tiny))
