"""Ceilings: the part of the work that no method can leave out."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastalign_kernels.gemm import mm, uses_native_gemm

from ..core.operation import Ceiling, Tensors


def bare_gemms(
    forward: int, *, hidden_grad: bool = False, weight_grad: bool = False, reused_memory: bool = False
) -> Ceiling:
    """The GEMMs of a head on whole matrices, with nothing between them.

    reused_memory: gemm.py's GEMMs into memory made beforehand, in place of torch's into fresh memory.
    """

    def make(tensors: Tensors) -> Callable[[], object]:
        x, w = tensors["hidden"].detach(), tensors["weight"].detach()
        (N, H), V = x.shape, w.shape[0]

        def fresh() -> object:
            for _ in range(forward):
                z = x @ w.t()
            return (
                z
                if not hidden_grad and not weight_grad
                else (z @ w if hidden_grad else None, z.t() @ x if weight_grad else None)
            )

        if not reused_memory:
            return fresh
        dtype = torch.float32 if uses_native_gemm(x.device, x.dtype) else x.dtype
        z, dx, dw = (x.new_empty(shape, dtype=dtype) for shape in ((N, V), (N, H), (V, H)))

        def reusing() -> object:
            for _ in range(forward):
                mm(x, w.t(), z)
            if hidden_grad:
                mm(z, w, dx)
            if weight_grad:
                mm(z.t(), x, dw)
            return None

        return reusing

    return make


def read_write(tensors: Tensors) -> Callable[[], object]:
    """One read and one write of every input."""
    inputs = [tensor.detach() for tensor in tensors.values()]
    return lambda: [tensor.clone() for tensor in inputs]


def one_read(tensors: Tensors) -> Callable[[], object]:
    """One read of the logits: the largest of each row."""
    logits = tensors["logits"].detach()
    return lambda: logits.amax(-1)


def read_read_write(tensors: Tensors) -> Callable[[], object]:
    """One read of the logits, then one read and one write of as much: a loss and its gradient."""
    logits = tensors["logits"].detach()
    return lambda: (logits.amax(-1), logits.clone())


def _gemms(forward: int, *, hidden_grad: bool = False, weight_grad: bool = False) -> dict[str, Ceiling]:
    """The two ceilings of a head by name."""
    number = forward + hidden_grad + weight_grad
    name = f"{number} bare GEMM{'s' if number > 1 else ''}"
    grads = {"hidden_grad": hidden_grad, "weight_grad": weight_grad}
    return {
        name: bare_gemms(forward, **grads),
        f"{name}, gemm.py": bare_gemms(forward, **grads, reused_memory=True),
    }


# Logits alone; and hidden's gradient; and weight's gradient; and the logits once more, of a reference or
# recomputed.
ONE_GEMM = _gemms(1)
TWO_GEMMS = _gemms(1, hidden_grad=True)
THREE_GEMMS = _gemms(1, hidden_grad=True, weight_grad=True)
FOUR_GEMMS = _gemms(2, hidden_grad=True, weight_grad=True)
COPIES: dict[str, Ceiling] = {"a copy of the inputs": read_write}
