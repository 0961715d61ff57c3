"""Matrix products whose sums stay in the output's dtype, whatever the factors'; on a CPU with AVX-512 they may be our own (csrc/gemm*).

torch's fp32 GEMM on an AMD CPU is MKL's AVX2 code, and none of its CPU GEMMs takes bf16 to fp32. Measured on two cores of an AMD EPYC
(Zen 5), a head's three products at C 512, H 576, V 49152, GFLOP/s:

                                logits   dX    dW
    fp32, torch.mm                 200  217   219
    fp32, ours                     488  432   453
    bf16 to bf16, torch.mm         684  822   651
    bf16 to fp32, ours             970  823   834

Ours pack factors of any of the three dtypes block by block (csrc/gemm_api.h), so nothing is widened or gathered in memory beforehand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import native

FEW = 8  # below so many tokens a product is one read of the weight, which torch's does without packing it


def own_gemm(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of factors of this dtype (or of it and fp32) run in csrc/gemm.cpp: it mixes dtypes and gathers rows at no cost."""
    return device.type == "cpu" and dtype != torch.float64 and native.own_gemm()


def mm(
    left: Tensor, right: Tensor, out: Tensor, *, add: bool = False, right_rows: Tensor | None = None, out_rows: Tensor | None = None
) -> None:
    """out (+)= left [M, K] right [K, N]; with right_rows [K] of right's rows in their order; with out_rows [M], none twice, into out's.

    out: the accumulator's dtype, or on a GPU the factors' too. Factors of different dtypes: `own_gemm` only.
    """
    gathers = right_rows is not None or out_rows is not None
    few = min(*left.shape, *right.shape) < FEW and left.dtype == right.dtype == out.dtype and not gathers
    if own_gemm(out.device, out.dtype) and not few:
        torch.ops.fastalign.gemm(left, right, out, add, right_rows, out_rows)
        return
    if right_rows is not None:
        right = right.index_select(0, right_rows)
    if out_rows is not None:
        rows = torch.empty(left.shape[0], right.shape[1], dtype=out.dtype, device=out.device)
        mm(left, right, rows)
        out.index_add_(0, out_rows, rows) if add else out.index_copy_(0, out_rows, rows)
    elif left.dtype == out.dtype:
        out.addmm_(left, right) if add else torch.mm(left, right, out=out)
    elif add:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
