"""What all our ops share: how they are registered, and how a gradient made in forward reaches backward.

A kernel computes each gradient, so no op has a second derivative. `first_order` makes differentiating a
gradient an error.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import native
from .namespace import NAMESPACE
from .torch_func import must_see_the_op, traced

SMALL = 2**20  # elements below which the launch costs more than the pass
InputGrads = tuple[Tensor | None, ...]
NamedGrads = Mapping[str, Tensor | None]  # from the names of an op's inputs to their gradients


def with_signature(
    function: Callable[..., Any], hints: Mapping[str, Any], returns: Any
) -> Callable[..., Any]:
    """The function, which takes *arguments, with parameters of these names and types: torch infers the schema
    of an op from them."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind, annotation=hint) for name, hint in hints.items()]
    signature = inspect.Signature(parameters, return_annotation=returns)
    function.__signature__ = signature  # type: ignore[attr-defined]
    return function


def register_op(
    name: str,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    save: Callable[..., None],
    backward: Callable[..., NamedGrads],
    losses: str,
) -> EagerOp:
    """The op `fastalign::name` of `forward`, with its fake and its backward.

    Args:
        save: setup_context(ctx, inputs, output) of torch.library.
        backward: backward(ctx, saved tensors, *upstream gradients) -> gradients by the names of forward's
            parameters. The parameters it does not name get no gradient.
        losses: the public functions of the op, for the error of a second derivative.
    """
    op = torch.library.custom_op(f"{NAMESPACE}::{name}", forward, mutates_args=())
    op.register_fake(fake)
    parameters = list(inspect.signature(forward).parameters)

    def in_order(ctx, saved: Sequence[Tensor], *upstream: Tensor | None) -> InputGrads:
        grads = backward(ctx, saved, *upstream)
        return tuple([grads.get(parameter) for parameter in parameters])

    checked = first_order(losses, in_order)
    op.register_autograd(checked, setup_context=save)
    return EagerOp(op, forward, save, checked)


def register_loss_op(
    name: str,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    differentiable: Sequence[str],
    losses: str,
) -> EagerOp:
    """An op whose forward returns a loss, numbers without gradient, and the gradients of `differentiable`.

    differentiable: names of forward's parameters, in the order of the gradients.
    """

    def backward(ctx, saved: Sequence[Tensor], grad: Tensor | None, *_: Tensor | None) -> NamedGrads:
        if grad is None:
            return {}
        inputs = saved_inputs(ctx, saved)
        grads = scale_saved_grads(ctx, grad, lambda: op(*inputs)[2:])
        # A gradient that nobody asked for has size 0.
        return {parameter: value for parameter, value in zip(differentiable, grads) if needed(ctx, parameter)}

    parameters = list(inspect.signature(forward).parameters)

    def needed(ctx, parameter: str) -> bool:
        return ctx.needs_input_grad[parameters.index(parameter)]

    op = register_op(name, forward, fake, save=save_loss, backward=backward, losses=losses)
    return op


class EagerOp:
    """An op that runs without torch's dispatcher where nothing traces it.

    The dispatcher's Python layers take 45 us a call, more than the kernel of a small loss. `op` is the op
    itself, for compilers, for torch.func, and for tensors without values.
    """

    def __init__(
        self,
        op: Callable[..., Any],
        forward: Callable[..., Any],
        save: Callable[..., None],
        backward: Callable[..., InputGrads],
    ):
        # There is no setup_context: with one, torch inspects the signature of forward at each call, 12 us.
        def forward_and_save(ctx, *inputs):
            output = forward(*inputs)
            save(ctx, inputs, output)
            return output

        functions = {"forward": staticmethod(forward_and_save), "backward": staticmethod(backward)}
        self.op = op
        self._forward = forward
        function = type(f"Eager_{forward.__name__}", (torch.autograd.Function,), functions)
        self._apply: Callable[..., Any] = getattr(function, "apply")  # noqa: B009  mypy sees a bare type

    def __call__(self, *inputs: Any) -> Any:
        if must_see_the_op(inputs[0]):
            return self.op(*inputs)
        return self._apply(*inputs) if torch.is_grad_enabled() else self._forward(*inputs)


def register_row_loss(
    name: str,
    forward: Callable[..., tuple[Tensor, ...]],
    fake: Callable[..., tuple[Tensor, ...]],
    *,
    losses: str,
    divisor: Callable[[Tensor, Any], int] | None = None,
) -> EagerOp:
    """The op of an O(N) loss whose forward returns (loss, numbers without gradient, grads).

    grads has one row for each differentiable input, which are the first inputs.

    Args:
        divisor: of forward's first and last inputs: what the loss was divided by and grads was not. The
            upstream gradient may be a vector, and grads are scaled out of place. None: grads are those of the
            loss, and they are scaled in place and given away, as `scale_saved_grads` says.
        losses: as in `register_op`.
    """
    op = torch.library.custom_op(f"{NAMESPACE}::{name}", forward, mutates_args=())
    op.register_fake(fake)
    nothing = (None,) * len(inspect.signature(forward).parameters)

    def backward(ctx, saved: Sequence[Tensor], upstream: Tensor | None, *_: None) -> InputGrads:
        # On a GPU autograd runs this in a thread of its own, on a core whose caches hold none of it.
        if upstream is None:
            return nothing
        if divisor is None:
            (grads,) = scale_saved_grads(ctx, upstream, lambda: forward(*saved_inputs(ctx, saved))[-1:])
        else:
            divided_by = divisor(saved[0], ctx.inputs[-1])
            grads = ctx.grads[0] * (upstream if divided_by == 1 else upstream / divided_by)
        # The tensors of the first inputs are the first that were saved.
        rows = [row if row.dtype == x.dtype else row.to(x.dtype) for row, x in zip(grads.unbind(), saved)]
        return *rows, *nothing[len(rows) :]

    checked = first_order(losses, backward)
    op.register_autograd(checked, setup_context=save_loss)
    return EagerOp(op, forward, save_loss, checked)


class _NoSecondDerivative(torch.autograd.Function):
    """Passes on the first `count` tensors, the gradients. The rest are what they depend on.

    Differentiating the result raises.
    """

    @staticmethod
    def forward(ctx, losses: str, count: int, *tensors: Tensor) -> InputGrads:
        ctx.losses = losses
        return tuple(x.detach() for x in tensors[:count])

    @staticmethod
    def backward(ctx, *_: Tensor):
        raise RuntimeError(
            f"{ctx.losses}: got a second derivative, expected first ones, because a kernel computes its "
            "gradient. Its specification in fastalign_kernels, whose name ends in _ref, is plain PyTorch and "
            "has all derivatives"
        )


def first_order(losses: str, backward: Callable[..., InputGrads]) -> Callable[..., InputGrads]:
    """The backward function of an op, made so that differentiating its gradients raises.

    Autograd would treat gradients that the forward pass saved, or that a kernel computed, as constants. A
    second derivative would then be silently wrong. torch's `once_differentiable` is not enough: its error
    is attached to none of the op's inputs, so `autograd.grad` of an input never reaches it. Here it is
    attached to all saved tensors. An op must therefore save each input that gets a gradient, or a tensor
    computed from it.

    Args:
        losses: the public functions of the op, for the error.
        backward: backward(ctx, saved tensors, *upstream gradients).
    """

    @functools.wraps(backward)
    def checked(ctx, *upstream: Tensor | None) -> InputGrads:
        saved = ctx.saved_tensors  # once: under checkpoint a second look raises
        if not torch.is_grad_enabled():  # the usual case; create_graph=True enables it
            return backward(ctx, saved, *upstream)
        with torch.no_grad():
            grads = backward(ctx, saved, *upstream)
        given = [g for g in grads if g is not None]
        origins = [x for x in (*saved, *upstream) if isinstance(x, Tensor) and x.requires_grad]
        marked = iter(_NoSecondDerivative.apply(losses, len(given), *given, *origins))
        return tuple(None if g is None else next(marked) for g in grads)

    return checked


def save_loss(ctx, inputs, output) -> None:
    """setup_context of an op that returns a loss, numbers without gradient, and gradients of its inputs."""
    _, numbers, *grads = output
    ctx.mark_non_differentiable(numbers, *grads)
    # Without this autograd allocates zeros as the gradients of the outputs, for a head a [V, H].
    ctx.set_materialize_grads(False)
    save_inputs(ctx, inputs)
    ctx.grads = grads


def save_inputs(ctx, inputs: Sequence[Any], *more: Tensor) -> None:
    """Save the inputs of an op, and more tensors."""
    ctx.is_tensor = is_tensor = [isinstance(x, Tensor) for x in inputs]
    ctx.inputs = [None if tensor else x for x, tensor in zip(inputs, is_tensor)]
    ctx.save_for_backward(*[x for x, tensor in zip(inputs, is_tensor) if tensor], *more)


def saved_inputs(ctx, saved: Sequence[Tensor]) -> list[Any]:
    """The inputs of an op that `save_inputs` saved; `saved` are its tensors, those of the inputs first."""
    tensors = iter(saved)
    return [next(tensors) if is_tensor else x for is_tensor, x in zip(ctx.is_tensor, ctx.inputs)]


def scale_saved_grads(ctx, grad: Tensor, recompute: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
    """ctx.grads times the upstream scalar; `recompute` computes them again for a second backward.

    They are scaled in place and given away, so that no second copy exists (for a head a [V, H]). Traced
    code may not write to what the forward graph saved.
    """
    grads = ctx.grads
    if traced(grad):
        return [g * grad for g in grads]
    ctx.grads = None
    if grads is None:
        grads = list(recompute())
    _scale([g for g in grads if g.numel() > 0], grad)
    return grads


def _scale(tensors: list[Tensor], factor: Tensor) -> None:
    """x *= factor, a scalar, for each x. The usual 1 saves a pass over x; on a GPU the device looks, not the
    host.

    Small ones are multiplied there by torch in one launch, which takes the host less time than Triton's.
    """
    if not factor.is_cuda:
        if tensors and (factor.is_meta or factor.item() != 1):
            for x in tensors:
                x.mul_(factor)
        return
    small: list[Tensor] = []
    for x in tensors:
        large = x.numel() >= SMALL or x.dtype != factor.dtype
        if large and x.is_contiguous() and not native.triton_missing:
            # here, because triton is absent on macOS and Windows
            from .scale_triton import scale_in_place

            scale_in_place(x, factor)
        else:
            small.append(x)
    if small:
        torch._foreach_mul_(small, factor)
