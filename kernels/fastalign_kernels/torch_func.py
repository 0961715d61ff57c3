"""What torch.func's transforms, forward-mode AD and compilers get from the public functions: an error where a
derivative would be silently wrong.

`torch.func.vmap` is served: torch calls the ops once for each slice.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

Function = TypeVar("Function", bound=Callable[..., Any])


def assumed_constant(function: Function) -> Function:
    """torch.compiler.assume_constant_result without importing torch._dynamo, which takes over a second.

    Compiled code has the result of the call that was traced.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def traced(tensor: Tensor) -> bool:
    """Whether a compiler is tracing: what is traced may not write to tensors that the forward graph saved for
    the backward graph."""
    return torch.compiler.is_compiling() or type(tensor) is not Tensor


def transforming() -> bool:
    """Whether a transform of torch.func (grad, jvp, vmap, ...) is running."""
    return torch._C._are_functorch_transforms_active()


def must_see_the_op(tensor: Tensor) -> bool:
    """Whether torch must see an op of ours as one.

    A compiler traces it, a transform of torch.func or a TorchDispatchMode runs (a counter of flops, selective
    checkpointing), or the tensor has no values.
    """
    return traced(tensor) or tensor.is_meta or transforming() or torch._C._len_torch_dispatch_stack() > 0


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor below all transforms, for checks of its values: that of all slices under vmap."""
    while transforming() and _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def requires_grad(tensor: Tensor) -> bool:
    """Whether autograd wants a gradient of the tensor. One that vmap has wrapped says no, whatever the tensor
    below says."""
    return tensor.requires_grad or unwrapped(tensor).requires_grad


def reject_derivatives(name: str, tensor: Tensor) -> None:
    """Raise where forward-mode AD or torch.func (grad, jvp, ...) differentiates by the tensor: the ops do not
    take part in that."""
    while forward_ad._current_level >= 0 or transforming():
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
            raise _error(name, "a tensor with a tangent (forward-mode AD)")
        if tensor.requires_grad and torch.is_grad_enabled() and _differentiating():
            raise _error(name, "a tensor that requires grad inside torch.func.grad, jvp or the like")
        if not transforming() or not _functorch.is_functorch_wrapped_tensor(tensor):
            return
        tensor = _functorch.get_unwrapped(tensor)


def _differentiating() -> bool:
    """Whether one of the running transforms computes derivatives."""
    derivatives = (_functorch.TransformType.Grad, _functorch.TransformType.Jvp)
    return transforming() and any(
        level.key() in derivatives for level in _functorch.get_interpreter_stack() or ()
    )


def _error(name: str, got: str) -> NotImplementedError:
    return NotImplementedError(
        f"{name}: got {got}, expected a plain tensor: the kernels have a backward pass alone (backward(), "
        "autograd.grad). The functions of fastalign_kernels' modules whose names end in _ref are plain "
        "PyTorch and have all derivatives"
    )


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Inside, autocast is off on the tensor's device. torch knows no autocast for meta tensors."""
    device_type = tensor.device.type
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)
