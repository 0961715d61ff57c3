"""What ops share that compute a loss's gradients in their forward pass: what is kept of a call, and its gradients times the upstream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .rows import traced


def save_scalar_loss(ctx, inputs, output) -> None:
    """For an op that gives a loss, numbers without gradient, and gradients of its inputs."""
    _, numbers, *gradients = output
    ctx.mark_non_differentiable(numbers, *gradients)
    ctx.set_materialize_grads(False)  # else autograd allocates zeros as the gradients of the outputs, for a head a [V, H]
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
    ctx.inputs = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.tensors = [isinstance(x, Tensor) for x in inputs]
    ctx.gradients = gradients


def saved_inputs(ctx) -> list[Any]:
    """The inputs of such an op; raises where one was changed in place since."""
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if own else x for own, x in zip(ctx.tensors, ctx.inputs)]


def hand_over(ctx, grad: Tensor, again: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
    """ctx.gradients times the upstream scalar; `again` computes them for a second backward.

    Scaled where they lie and handed over, so that no second one exists, for a head a [V, H]; traced code may not write to what the forward
    graph saved.
    """
    gradients = ctx.gradients
    if traced(grad):
        return [g * grad for g in gradients]
    ctx.gradients = None
    if gradients is None:
        gradients = list(again())
    if grad.is_cuda or grad.item() != 1:  # on a CPU looking is free, and the usual 1 saves a pass over all of them
        for g in gradients:
            g.mul_(grad)
    return gradients
