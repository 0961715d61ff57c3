"""The options of a fused model's head, which hold for all its losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastalign_kernels import checks
from fastalign_kernels.linear.gpu.device import no_screen

from .servable_heads import causal_lm_of

_OPTIONS = "_fastalign_options"


def checked_options(
    head: nn.Module,
    *,
    screen: bool | None,
    tail_eps: float | None = None,
    logits_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Keywords of the head functions.

    Raises ValueError for a tail_eps outside (0, 1), a dtype that logits cannot have, a screen beside it, and
    a screen where the head lies on a device or has a dtype without 8-bit products.
    """
    parameter = next(head.parameters())
    logits_dtype = checks.logits_dtype(logits_dtype)
    screened = checks.screen(screen, logits_dtype)
    # on a GPU an fp32 head may run under autocast; if it does not, the call says so
    dtype = torch.bfloat16 if parameter.is_cuda and parameter.dtype == torch.float32 else parameter.dtype
    if screened and (refused := no_screen(parameter.device, dtype)):
        raise ValueError(f"screen: got True, expected None: {refused}")
    return {
        "tail_eps": None if tail_eps is None else checks.tail_eps(tail_eps),
        "screen": screened or None,
        "logits_dtype": logits_dtype,
    }


def set_options(model: nn.Module, options: dict[str, Any]) -> None:
    model.__dict__[_OPTIONS] = options


def options_of(model: nn.Module) -> dict[str, Any]:
    """The keywords that `set_options` gave the model; none while `fuse_head` verifies it."""
    options: dict[str, Any] = model.__dict__.get(_OPTIONS, {})
    return options


def draws_screened(model: nn.Module) -> bool:
    """Whether rollouts of a causal LM, or of the one in a PeftModel, draw with the screen that it was fused
    with. On a GPU they draw from exact logits."""
    lm = causal_lm_of(model)
    return bool(options_of(lm).get("screen")) and next(lm.parameters()).device.type == "cpu"
