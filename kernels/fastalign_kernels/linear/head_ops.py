"""How an op on the head is registered and called.

The body of such an op, its fake and its callers have the arguments `(inputs: HeadInputs, needs: NeedsGrad,
*rest)`. torch passes tensors, numbers, strings and lists of them alone. The op itself therefore takes the
fields of HeadInputs, then needs, then the rest:

    (Tensor hidden, Tensor weight, Tensor ids, Tensor? bias, float[] options, bool[] needs, ...)

Only this file knows that list, and it reads it from HeadInputs. A field that HeadInputs gains is an argument
of every op. A field that NeedsGrad and Gradients gain is a gradient of every op. No loss changes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import GenericAlias
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from ..autograd import (
    EagerOp,
    NamedGrads,
    register_loss_op,
    register_op,
    save_inputs,
    saved_inputs,
    with_signature,
)
from ..namespace import NAMESPACE
from ..torch_func import must_see_the_op
from .engine import Gradients, empty_gradients
from .inputs import HEAD, HeadInputs, NeedsGrad
from .options import HeadOptions

_FIELDS = len(HeadInputs._fields)
_OPTIONS = HeadInputs._fields.index("options")


class OpCall(NamedTuple):
    """The arguments of an op's body."""

    inputs: HeadInputs
    needs: NeedsGrad
    rest: tuple[Any, ...]

    @classmethod
    def of(cls, arguments: Sequence[Any]) -> OpCall:
        """The call whose arguments an op got."""
        fields = list(arguments[:_FIELDS])
        fields[_OPTIONS] = HeadOptions.of(fields[_OPTIONS])
        return cls(HeadInputs._make(fields), NeedsGrad(*arguments[_FIELDS]), tuple(arguments[_FIELDS + 1 :]))

    def arguments(self) -> tuple[Any, ...]:
        """The arguments of the op."""
        inputs, needs, rest = self
        fields: list[Any] = list(inputs)
        fields[_OPTIONS] = inputs.options.numbers()
        return *fields, list(needs), *rest


# setup_context(ctx, call, output), and backward(ctx, saved tensors, *upstream gradients)
Save = Callable[[Any, OpCall, Any], None]
Backward = Callable[..., NamedGrads]


class HeadOp:
    """An op that is called with `(inputs, needs, *rest)`. Where nothing needs the op, its body is called."""

    def __init__(self, forward: Callable[..., Any], op: Callable[..., Any]) -> None:
        self._forward = forward
        self._op = op
        self._has_backward = isinstance(op, EagerOp)

    def __call__(self, inputs: HeadInputs, needs: NeedsGrad, *rest: Any) -> Any:
        if (self._has_backward and torch.is_grad_enabled()) or must_see_the_op(inputs.hidden):
            return self._op(*OpCall(inputs, needs, rest).arguments())
        return self._forward(inputs, needs, *rest)


def _on_arguments(body: Callable[..., Any]) -> Callable[..., Any]:
    """`body`, or a fake, with the arguments of the op."""

    def on_arguments(*arguments: Any) -> Any:
        inputs, needs, rest = OpCall.of(arguments)
        return body(inputs, needs, *rest)

    on_arguments.__name__ = body.__name__
    return on_arguments


def _as_op(forward: Callable[..., Any], returns: Any) -> Callable[..., Any]:
    """`forward` with the arguments of the op, and their types."""
    of_head = {**get_type_hints(HeadInputs), "options": list[float], "needs": list[bool]}
    _, _, *names = inspect.signature(forward).parameters
    taken = set(names) & set(of_head)
    if taken:
        raise TypeError(f"{forward.__name__}: got parameters {taken}, expected other names than the head's")
    hints = get_type_hints(forward)
    of_rest = {name: hints[name] for name in names}
    return with_signature(_on_arguments(forward), {**of_head, **of_rest}, returns)


def _tensors(number: int) -> Any:
    """The type of a tuple of tensors."""
    return GenericAlias(tuple, (Tensor,) * number)


def register_head_op(
    name: str,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    save: Save,
    backward: Backward,
    losses: str,
) -> HeadOp:
    """The op `fastalign::name` of a body `(inputs, needs, *rest)`.

    Args:
        save, backward: types above; `save_call` and `saved_call` keep what the op was called with. backward
            returns gradients by the names of HEAD and of rest.
        losses: the public functions of the op, for the error of a second derivative.
    """

    def save_op(ctx, inputs: Sequence[Any], output: Any) -> None:
        save(ctx, OpCall.of(inputs), output)

    op = register_op(
        name,
        _as_op(forward, get_type_hints(forward)["return"]),
        _on_arguments(fake),
        save=save_op,
        backward=backward,
        losses=losses,
    )
    return HeadOp(forward, op)


def register_head_loss(
    name: str,
    forward: Callable[..., tuple[Tensor, ...]],
    fake: Callable[..., tuple[Tensor, ...]],
    *,
    differentiable: Sequence[str] = (),
    losses: str,
) -> HeadOp:
    """The op of a loss whose body returns the loss, numbers without gradient, the gradients of the head, and
    those of `differentiable`, which are names of its rest."""
    grads = (*HEAD, *differentiable)
    op = register_loss_op(
        name,
        _as_op(forward, _tensors(2 + len(grads))),
        _on_arguments(fake),
        differentiable=grads,
        losses=losses,
    )
    return HeadOp(forward, op)


def register_head_grads(
    name: str, forward: Callable[..., Gradients], *, overwrites: Sequence[str] = ()
) -> HeadOp:
    """The op of a backward pass: its body returns Gradients. It may overwrite tensors of its rest."""
    function = _as_op(forward, _tensors(len(HEAD)))
    op = torch.library.custom_op(f"{NAMESPACE}::{name}", function, mutates_args=overwrites)
    op.register_fake(_on_arguments(_fake_grads))
    return HeadOp(forward, op)


def _fake_grads(inputs: HeadInputs, needs: NeedsGrad, *_: object) -> Gradients:
    return empty_gradients(inputs, needs)


def save_call(ctx: Any, call: OpCall, *more: Tensor) -> None:
    """Save what an op was called with, and more tensors."""
    save_inputs(ctx, (*call.inputs, call.needs, *call.rest), *more)


def saved_call(ctx: Any, saved: Sequence[Tensor]) -> tuple[OpCall, Sequence[Tensor]]:
    """What `save_call` saved; `saved` are its tensors."""
    arguments = saved_inputs(ctx, saved)
    inputs, rest = HeadInputs._make(arguments[:_FIELDS]), tuple(arguments[_FIELDS + 1 :])
    return OpCall(inputs, arguments[_FIELDS], rest), saved[sum(ctx.is_tensor) :]


def head_grads(grads: Sequence[Tensor], needs: NeedsGrad) -> NamedGrads:
    """The gradients that are needed, by name; the first of `grads` are the head's."""
    return {name: value for name, value, need in zip(HEAD, grads, needs) if need}
