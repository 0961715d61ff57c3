"""Losses of pairs from log-probabilities, one operation a loss_type: what PAIR_LOSSES has is measured."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastalign
from fastalign_kernels.preference.formulas import DPO_LOSS_TYPES, PAIR_LOSSES
from fastalign_kernels.preference.reference import dpo_loss_ref

from ..core.operation import EAGER, OURS, Forward, Operation, Shape, here

LOGPS = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
LENGTHS = ("chosen_lengths", "rejected_lengths")


def pair_inputs(shape: Shape, dtype: torch.dtype, device: str, *, lengths: bool) -> dict[str, Tensor]:
    """Log-probabilities of N pairs of completions, and with `lengths` their numbers of tokens."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: (torch.randn(shape.N, generator=generator) - 60).to(device, dtype) for name in LOGPS}
    if lengths:
        for name in LENGTHS:
            tensors[name] = torch.randint(20, 200, (shape.N,), generator=generator).to(device)
    return tensors


def _forward(loss: Callable[..., fastalign.PreferenceLoss], options: dict[str, Any]) -> Forward:
    def forward(**tensors: Tensor) -> dict[str, Tensor]:
        logps = [tensors.pop(name) for name in LOGPS]
        return {"loss": loss(*logps, **tensors, **options).loss}

    return forward


def _operation(loss_type: str) -> Operation:
    row = PAIR_LOSSES[loss_type]
    smoothing = 0.1 if row.smoothing == "(0, 0.5)" else 0.0
    options = {"loss_type": loss_type, "label_smoothing": smoothing}
    methods = {
        OURS: here(_forward(fastalign.dpo_loss, options)),
        EAGER: here(_forward(dpo_loss_ref, options)),
    }
    return Operation(partial(pair_inputs, lengths=row.lengths == "needed"), methods, LOGPS + LENGTHS)


PAIRS = {f"dpo_loss, {loss_type}": _operation(loss_type) for loss_type in DPO_LOSS_TYPES}
