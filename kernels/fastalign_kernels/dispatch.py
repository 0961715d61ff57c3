"""Which implementation of a family of kernels serves a tensor: the native library, Triton, or the reference.

The implementations of a family have functions of the same names and arguments. The rules:

    tensor on   served by                                    or by the reference in PyTorch
    a CPU       csrc/, if it has the family's CPU kernels    if the library is missing
    a GPU       Triton, or csrc/ if it has the family's      if Triton, or the library's CUDA part, is missing
                CUDA kernels
    both                                                     for fp64, if the kernels do not compute in it

A missing part is named in one warning, here, and `fastalign env` shows it. fp64 gives no warning.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from . import native
from .namespace import ops
from .torch_func import traced, transforming


@cache  # once for each text
def warn_once(text: str) -> None:
    warnings.warn(f"fastalign: {text}", stacklevel=2)


def _warn(reason: str) -> None:
    warn_once(f"{reason}; the references in PyTorch serve instead, which are slower")


if native.missing:
    _warn(native.missing)


def launches(tensor: Tensor) -> bool:
    """Whether a Triton kernel may be launched on the tensor in place of several of PyTorch's operations: on a
    GPU, where nothing traces."""
    return tensor.is_cuda and not native.triton_missing and not traced(tensor) and not transforming()


class Kernels:
    """The implementations of a family of kernels. `select` returns the one that serves a tensor."""

    def __init__(
        self,
        reference: SimpleNamespace,
        *,
        native: Any = ops,
        native_fp64: bool = True,
        triton: str | None = None,
        triton_fp64: bool = True,
    ):
        """
        Args:
            reference: the functions in PyTorch, by name.
            native: the functions of csrc/, by name: ops, or functions that call ops. None: csrc/ has none.
            native_fp64, triton_fp64: whether these kernels compute in fp64.
            triton: the module of the Triton functions, such as ".softmax.rows_triton". It is imported at the
                first call on a GPU, because macOS and Windows have no triton. None: csrc/ has the
                CUDA kernels.
        """
        self.reference = reference
        self.native = native
        self.native_fp64 = native_fp64
        self.triton = triton
        self.triton_fp64 = triton_fp64
        self._triton_module: ModuleType | None = None

    def select(self, tensor: Tensor) -> Any:
        """The implementation that serves the device and the dtype of a tensor."""
        if tensor.is_cuda:
            return self._select_cuda(tensor)
        if (
            self.native is not None
            and not native.missing
            and (self.native_fp64 or tensor.dtype != torch.float64)
        ):
            return self.native
        return self.reference

    def _select_cuda(self, tensor: Tensor) -> Any:
        computes_fp64 = self.native_fp64 if self.triton is None else self.triton_fp64
        if tensor.dtype == torch.float64 and not computes_fp64:
            return self.reference
        missing = native.cuda_missing if self.triton is None else native.triton_missing
        if missing:
            if not torch.compiler.is_compiling():
                _warn(missing)
            return self.reference
        if self.triton is None:
            return self.native
        if self._triton_module is None:
            self._triton_module = import_module(self.triton, __package__)
        return self._triton_module


def widest(*tensors: Tensor | None) -> Tensor:
    """The first fp64 tensor, or else the first of all: what `Kernels.select` needs to see of several."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            return tensor
    assert tensors[0] is not None
    return tensors[0]


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def accumulator_of(*tensors: Tensor | None) -> torch.dtype:
    """fp64 if a tensor is, else fp32."""
    return accumulator_dtype(widest(*tensors).dtype)
