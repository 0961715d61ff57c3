"""The ops of `linear_distillation_loss`: a reduced loss with its gradients, and the divergences of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..autograd import NamedGrads
from ..ordered_sum import ordered_sum
from ..softmax.rows import accumulator_dtype
from .engine import empty_gradients
from .head_ops import OpCall, head_grads, register_head_loss, register_head_op, save_call, saved_call
from .inputs import HeadInputs, NeedsGrad
from .outcome_chunks import Distillation, divergences_and_gradients


def _reduced(
    inputs: HeadInputs,
    needs: NeedsGrad,
    teacher_ids: Tensor,
    teacher_logp: Tensor,
    scale: Tensor,
    divergence: str,
) -> tuple[Tensor, ...]:
    """The sum over tokens of scale [N] times the divergence, the divergences [N], and gradients."""
    loss = Distillation(teacher_ids, teacher_logp, divergence, scale)
    losses, grads = divergences_and_gradients(inputs, loss, needs)
    return ordered_sum(losses * scale), losses, *grads, losses.clone()


def _fake_reduced(inputs, needs, teacher_ids, teacher_logp, scale, divergence):
    grads = empty_gradients(inputs, needs)
    return scale.new_empty(()), torch.empty_like(scale), *grads, torch.empty_like(scale)


head_distillation = register_head_loss(
    "head_distillation",
    _reduced,
    _fake_reduced,
    differentiable=["scale"],
    losses="linear_distillation_loss",
)


def _tokens(
    inputs: HeadInputs, needs: NeedsGrad, teacher_ids: Tensor, teacher_logp: Tensor, divergence: str
) -> Tensor:
    """The divergences [N]; needs are those of the backward pass."""
    loss = Distillation(teacher_ids, teacher_logp, divergence)
    return divergences_and_gradients(inputs, loss, NeedsGrad())[0]


def _fake_tokens(inputs, *_):
    hidden = inputs.hidden
    return hidden.new_empty(hidden.shape[0], dtype=accumulator_dtype(hidden.dtype))


def _save(ctx, call: OpCall, output: Tensor) -> None:
    save_call(ctx, call)


def _backward(ctx, saved: Sequence[Tensor], grad: Tensor) -> NamedGrads:
    (inputs, needs, (*teacher, divergence)), _ = saved_call(ctx, saved)
    _, _, *grads = head_distillation(inputs, needs, *teacher, grad.contiguous(), divergence)
    return head_grads(grads, needs)


head_divergences = register_head_op(
    "head_divergences",
    _tokens,
    _fake_tokens,
    save=_save,
    backward=_backward,
    losses="linear_distillation_loss",
)
