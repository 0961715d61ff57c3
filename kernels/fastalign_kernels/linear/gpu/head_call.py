"""What one call of a GPU engine shares: the table, the tokens, the weights in the GEMMs' dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from ...gemm import mm
from ...softmax.rows import Stat, accumulator_dtype
from ...softmax.tile_rows_triton import Softmaxes
from ..inputs import HeadInputs
from .tokens import Tokens


def product(left: Tensor, right: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out (+)= left right, summed in fp32 and rounded once to out's dtype."""
    if left.dtype == out.dtype:
        out.addmm_(left, right) if add else torch.mm(left, right, out=out)
    else:
        mm(left, right, out, add=add)


class HeadCall:
    """One call of an engine."""

    def __init__(self, inputs: HeadInputs, table: Tensor | None = None, order: Tensor | None = None) -> None:
        """table: the statistics [7, N], if they were computed before. order: as in Tokens."""
        hidden, ids, bias, options = inputs.hidden, inputs.ids, inputs.bias, inputs.options
        self.inputs = inputs
        # whether dlogits replace the logits; beside fp32 logits those in 16 bits need memory of their own
        low = hidden.dtype in (torch.bfloat16, torch.float16)
        self.in_place = not low or options.logits_dtype is not None
        self.logits_dtype = options.logits_dtype or accumulator_dtype(hidden.dtype)
        # the right factor of each product of the logits: W, and B of a LoRA adapter
        self.weights: tuple[Tensor, ...] = (inputs.weight.to(hidden.dtype),)
        factors: tuple[Tensor, ...] = (hidden,)
        if inputs.lora is not None:
            self.weights += (inputs.lora.weight.to(hidden.dtype),)
            factors += (inputs.lora.hidden.to(hidden.dtype),)
        if table is None:
            # The statistics of ignored tokens stay 0
            table = torch.zeros(
                len(Stat), hidden.shape[0], dtype=accumulator_dtype(hidden.dtype), device=hidden.device
            )
        self.table = table
        bias = None if bias is None else bias.to(table.dtype)
        self.softmaxes = Softmaxes(ids, bias, options.transform, table, options.lean)
        self.tokens = Tokens(factors, ids, order)


def write_logits(states: tuple[Tensor, ...], weights: tuple[Tensor, ...], out: Tensor) -> None:
    """The raw logits of some tokens: X W^T, to which U B^T of a LoRA adapter is added."""
    product(states[0], weights[0].t(), out)
    for factor, weight in zip(states[1:], weights[1:]):
        product(factor, weight.t(), out, add=True)
