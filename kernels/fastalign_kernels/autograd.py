"""What ops share whose gradients come from a kernel: what is kept of a call, its gradients times the
upstream, no second derivative."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .softmax.rows import traced

InputGradients = tuple[Tensor | None, ...]


class _NoSecondDerivative(torch.autograd.Function):
    """Passes on the first `count` tensors, the gradients; the others are what they depend on. Differentiating
    the result raises."""

    @staticmethod
    def forward(ctx, losses: str, count: int, *tensors: Tensor) -> InputGradients:
        ctx.losses = losses
        return tuple(x.detach() for x in tensors[:count])

    @staticmethod
    def backward(ctx, *_: Tensor):
        raise RuntimeError(
            f"{ctx.losses} has no second derivative, because a kernel computes its gradient. Use the specifications in its place: the "
            "functions of fastalign_kernels' modules whose names end in _ref are plain PyTorch and have all derivatives"
        )


def first_order(losses: str, backward: Callable[..., InputGradients]) -> Callable[..., InputGradients]:
    """The backward function of an op from `backward(ctx, saved tensors, *upstream gradients)`;
    differentiating its gradients raises.

    Autograd would take gradients that the forward pass saved, or that a kernel computed, for constants, and a
    second derivative would be silently wrong. torch's `once_differentiable` is not enough: its error hangs on
    none of the op's inputs, so `autograd.grad` of an input never reaches it. Here it hangs on all saved
    tensors: an op must save each input that gets a gradient, or a tensor computed from it.

    losses: the public functions of the op, for the error.
    """

    @functools.wraps(backward)
    def checked(ctx, *upstream: Tensor | None) -> InputGradients:
        saved = ctx.saved_tensors  # once: under checkpoint a second look raises
        if not torch.is_grad_enabled():  # the usual case; create_graph=True enables it
            return backward(ctx, saved, *upstream)
        with torch.no_grad():
            gradients = backward(ctx, saved, *upstream)
        given = [g for g in gradients if g is not None]
        origins = [x for x in (*saved, *upstream) if x is not None and x.requires_grad]
        marked = iter(_NoSecondDerivative.apply(losses, len(given), *given, *origins))
        return tuple(None if g is None else next(marked) for g in gradients)

    return checked


def save_scalar_loss(ctx, inputs, output) -> None:
    """For an op that gives a loss, numbers without gradient, and gradients of its inputs."""
    _, numbers, *gradients = output
    ctx.mark_non_differentiable(numbers, *gradients)
    ctx.set_materialize_grads(
        False
    )  # else autograd allocates zeros as the gradients of the outputs, for a head a [V, H]
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
    ctx.inputs = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.tensors = [isinstance(x, Tensor) for x in inputs]
    ctx.gradients = gradients


def saved_inputs(ctx, saved: Sequence[Tensor]) -> list[Any]:
    """The inputs of such an op, of which `saved` are the tensors."""
    tensors = iter(saved)
    return [next(tensors) if own else x for own, x in zip(ctx.tensors, ctx.inputs)]


def hand_over(ctx, grad: Tensor, again: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
    """ctx.gradients times the upstream scalar; `again` computes them for a second backward.

    Scaled where they lie and handed over, so that no second one exists, for a head a [V, H]; traced code may
    not write to what the forward graph saved.
    """
    gradients = ctx.gradients
    if traced(grad):
        return [g * grad for g in gradients]
    ctx.gradients = None
    if gradients is None:
        gradients = list(again())
    if (
        grad.is_cuda or grad.item() != 1
    ):  # on a CPU looking is free, and the usual 1 saves a pass over all of them
        for g in gradients:
            g.mul_(grad)
    return gradients
