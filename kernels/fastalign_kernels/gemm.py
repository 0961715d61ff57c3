"""Matrix products with sums in the output's dtype: by csrc/gemm on AMD CPUs with AVX-512, else by torch.

torch's fp32 GEMM on an AMD CPU is MKL's AVX2 code, and none of its CPU GEMMs takes bf16 to fp32. Measured on
two cores of an AMD EPYC (Zen 5), a head's three products at C 512, H 576, V 49152, GFLOP/s:

                                logits   dX    dW
    fp32, torch.mm                 200  217   219
    fp32, native                   488  432   453
    bf16 to bf16, torch.mm         684  822   651
    bf16 to fp32, native           970  823   834

The native GEMM packs factors of any of the three dtypes block by block (csrc/gemm/api.h), so nothing is
widened or gathered in memory beforehand.

It is the default on AMD CPUs only. On an Intel CPU with AVX-512 it was within 5 % of torch.mm, except for dW
in fp32, which reached 0.74 of torch's speed: MKL has AVX-512 code for Intel. It runs on every CPU with
AVX-512, and so do its tests.

The shapes alone determine the order of its sums, so it gives the same bits with any number of threads.
torch.mm does not: docs/determinism.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import native
from .namespace import ops


def uses_native_gemm(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of factors of this dtype (or of it and fp32) run in csrc/gemm: it mixes dtypes and
    gathers rows at no cost."""
    return device.type == "cpu" and dtype != torch.float64 and native.uses_gemm()


def mm(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    *,
    add: bool = False,
    right_rows: Tensor | None = None,
    out_rows: Tensor | None = None,
) -> None:
    """Write left [M, K] right [K, N] into out [M, N], or add it to out with `add`.

    right_rows [K]: the rows of `right` to take, in their order. out_rows [M]: the rows of `out` to write,
    each at most once. out has the accumulator's dtype, or on a GPU the factors' dtype too. Only the native
    GEMM (`uses_native_gemm`) takes factors of different dtypes. torch's CPU GEMMs get factors widened to
    out's dtype: so run the GPU engines in Triton's interpreter, on CPUs without the native GEMM.
    """
    gathers = right_rows is not None or out_rows is not None
    # torch's code for a matrix and a vector reads the matrix once and packs nothing: it takes 0.6 of our
    # time.
    vector = 1 in (*left.shape, *right.shape) and left.dtype == right.dtype == out.dtype and not gathers
    if uses_native_gemm(out.device, out.dtype) and not vector:
        if right_rows is not None and right.shape[1] > 1 and right.stride(1) != 1:
            right, right_rows = right.index_select(0, right_rows), None
        ops.gemm(_packable(left), _packable(right), out, add, right_rows, out_rows)
        return
    if right_rows is not None:
        right = right.index_select(0, right_rows)
    if out_rows is not None:
        rows = torch.empty(left.shape[0], right.shape[1], dtype=out.dtype, device=out.device)
        mm(left, right, rows)
        out.index_add_(0, out_rows, rows) if add else out.index_copy_(0, out_rows, rows)
        return
    if out.device.type == "cpu":
        left, right = left.to(out.dtype), right.to(out.dtype)
    if left.dtype == out.dtype:
        out.addmm_(left, right) if add else torch.mm(left, right, out=out)
    elif add:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def _packable(factor: Tensor) -> Tensor:
    """The factor, or a copy of it where neither dimension has a stride of 1: csrc/gemm reads along one of
    them."""
    return factor if 1 in factor.stride() or 1 in factor.shape else factor.contiguous()
