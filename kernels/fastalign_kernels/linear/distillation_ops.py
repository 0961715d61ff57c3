"""The ops of `linear_distillation_loss`: a reduced loss with its gradients, and the divergences of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..autograd import NamedGrads, register_loss_op, register_op
from ..ordered_sum import ordered_sum
from ..softmax.rows import accumulator_dtype
from .engine import empty_gradients
from .inputs import HEAD, HeadInputs, NeedsGrad
from .outcome_chunks import Distillation, divergences_and_gradients


def _reduced(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    teacher_ids: Tensor,
    teacher_logp: Tensor,
    scale: Tensor,
    divergence: str,
    options: list[float],
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The sum over tokens of scale [N] times the divergence, the divergences [N], and gradients."""
    inputs = HeadInputs.of(hidden, weight, ids, bias, options)
    loss = Distillation(teacher_ids, teacher_logp, scale, divergence)
    losses, grads = divergences_and_gradients(inputs, loss, NeedsGrad(*needs))
    return ordered_sum(losses * scale), losses, *grads, losses.clone()


def _fake_reduced(hidden, weight, ids, bias, teacher_ids, teacher_logp, scale, divergence, options, needs):
    grads = empty_gradients(HeadInputs.of(hidden, weight, ids, bias, options), NeedsGrad(*needs))
    return scale.new_empty(()), torch.empty_like(scale), *grads, torch.empty_like(scale)


head_distillation = register_loss_op(
    "head_distillation",
    _reduced,
    _fake_reduced,
    differentiable=(*HEAD, "scale"),
    losses="linear_distillation_loss",
)


def _tokens(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    teacher_ids: Tensor,
    teacher_logp: Tensor,
    divergence: str,
    options: list[float],
    needs: list[bool],
) -> Tensor:
    """The divergences [N]."""
    inputs = HeadInputs.of(hidden, weight, ids, bias, options)
    loss = Distillation(teacher_ids, teacher_logp, hidden, divergence)
    return divergences_and_gradients(inputs, loss, NeedsGrad())[0]


def _fake_tokens(hidden, weight, ids, bias, teacher_ids, teacher_logp, divergence, options, needs):
    return hidden.new_empty(hidden.shape[0], dtype=accumulator_dtype(hidden.dtype))


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.divergence, ctx.options, ctx.needs = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, saved: Sequence[Tensor], grad: Tensor) -> NamedGrads:
    *_, d_hidden, d_weight, d_bias, _ = head_distillation(
        *saved, grad.contiguous(), ctx.divergence, ctx.options, ctx.needs
    )
    grads = dict(zip(HEAD, (d_hidden, d_weight, d_bias)))
    return {name: grads[name] for name, need in zip(HEAD, ctx.needs) if need}


head_divergences = register_op(
    "head_divergences",
    _tokens,
    _fake_tokens,
    save=_save,
    backward=_backward,
    losses="linear_distillation_loss",
)
