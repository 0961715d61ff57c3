"""Cross-entropy under LoRA on the head: hidden [N, H], weight [V, H] frozen, A [r, H], B [V, r], ids [N]."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import fastalign

from ..core.operation import COMPILED, EAGER, OURS, Operation, Shape, compiled, here
from .head import HEAD_ROWS, head_inputs

RANK, SCALE = 16, 2.0
FORMED = "W + s B A formed, then fastalign"


def lora_inputs(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Inputs of the head, and an adapter whose logits have a standard deviation of 1."""
    generator = torch.Generator(device).manual_seed(1)
    A = torch.randn(RANK, shape.H, generator=generator, device=device) / math.sqrt(shape.H)
    B = torch.randn(shape.V, RANK, generator=generator, device=device) / (SCALE * math.sqrt(RANK))
    return {**head_inputs(shape, dtype, device), "A": A.to(dtype), "B": B.to(dtype)}


def _ours(hidden: Tensor, weight: Tensor, ids: Tensor, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    return {"loss": fastalign.linear_cross_entropy(hidden, weight, ids, lora=(A, B, SCALE))}


def _formed(hidden: Tensor, weight: Tensor, ids: Tensor, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    return {"loss": fastalign.linear_cross_entropy(hidden, torch.addmm(weight, B, A, alpha=SCALE), ids)}


def _eager(hidden: Tensor, weight: Tensor, ids: Tensor, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """Cross-entropy of the logits of PEFT's forward."""
    logits = F.linear(hidden, weight) + F.linear(F.linear(hidden, A), B) * SCALE
    return {"loss": F.cross_entropy(logits, ids)}


LORA = {
    "linear_cross_entropy with LoRA": Operation(
        lora_inputs,
        {OURS: here(_ours), FORMED: here(_formed), EAGER: here(_eager), COMPILED: compiled(_eager)},
        HEAD_ROWS,
    )
}
