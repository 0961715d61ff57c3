"""Top-K distillation from hidden states: hidden [N, H], weight [V, H], teacher_ids, teacher_logp [N, K]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import fastalign

from ..core.operation import COMPILED, EAGER, OURS, Operation, Shape, compiled, here
from .head import head_inputs

K = 64


def distillation_inputs(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Inputs of the head, and a teacher that gives K random ids 0.9 of its mass."""
    tensors = head_inputs(shape, dtype, device)
    del tensors["ids"]
    generator = torch.Generator(device).manual_seed(1)
    draws = torch.rand(shape.N, shape.V, generator=generator, device=device)
    ids = draws.topk(min(K, shape.V - 1), sorted=False).indices
    logits = torch.randn(ids.shape, generator=generator, device=device) * 2
    return {**tensors, "teacher_ids": ids, "teacher_logp": (0.9 * logits.softmax(-1)).log()}


def _ours(hidden: Tensor, weight: Tensor, teacher_ids: Tensor, teacher_logp: Tensor) -> dict[str, Tensor]:
    return {"loss": fastalign.linear_distillation_loss(hidden, weight, teacher_ids, teacher_logp)}


def _eager(hidden: Tensor, weight: Tensor, teacher_ids: Tensor, teacher_logp: Tensor) -> dict[str, Tensor]:
    """KL(teacher | student) with the tail as 1 - sum."""
    logp = F.log_softmax(F.linear(hidden, weight), -1).gather(-1, teacher_ids)
    q = teacher_logp.exp()
    tail, teacher_tail = ((1 - x.sum(-1)).clamp(min=1e-10) for x in (logp.exp(), q))
    losses = (q * (teacher_logp - logp)).sum(-1) + teacher_tail * (teacher_tail / tail).log()
    return {"loss": losses.mean()}


DISTILLATION = {
    "linear_distillation": Operation(
        distillation_inputs,
        {OURS: here(_ours), EAGER: here(_eager), COMPILED: compiled(_eager)},
        ("hidden", "teacher_ids", "teacher_logp"),
    )
}
