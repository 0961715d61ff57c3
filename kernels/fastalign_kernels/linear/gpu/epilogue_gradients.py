"""The gradients of a call of epilogue.py, added up block by block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...gemm import mm
from ..engine import Gradients, TokenCoefficients, empty_gradients
from ..inputs import NeedsGrad
from .epilogue_call import Block, EpilogueCall


@dataclass(frozen=True)
class Factors:
    """What dX and dW of a block are products of, beside the weight."""

    first: int  # of the block's tokens
    dlogits: Tensor  # [rows, V]
    hidden: Tensor  # [rows, H]


@dataclass(frozen=True)
class ScaledFactors(Factors):
    """dX = row_scale (dlogits W), dW = dlogits^T hidden."""

    row_scale: Tensor  # [rows]: the rows of dlogits are divided by it, those of hidden multiplied


class BlockGradients:
    """The gradients of a call, a block at a time.

    single: there is one block, so dW needs no fp32 sum. hidden_done: see Engine.
    """

    def __init__(
        self,
        call: EpilogueCall,
        needs: NeedsGrad,
        *,
        single: bool,
        hidden_done: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.call, self.needs, self.single, self.hidden_done = call, needs, single, hidden_done
        self._out: Gradients | None = None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    @property
    def out(self) -> Gradients:
        """The results' memory. It is allocated after the first launches, which the device waits for. Rows of
        dX that no block writes, those of ignored tokens, are 0."""
        if self._out is None:
            self._out = empty_gradients(self.call.inputs, self.needs)
            if self.needs.hidden and self.call.how_many() < self.call.N:
                self._out.hidden.zero_()
        return self._out

    def factors(self, block: Block, stats: Tensor, coefficients: TokenCoefficients) -> Factors | None:
        """Turn a block with statistics in the table [7, N] into factors, in place; None without tokens."""
        rows = self.call.live_rows(block)
        if rows == 0:
            return None
        row_scale = self.call.dlogits(block, rows, stats, coefficients, self.needs)
        return ScaledFactors(block.first, block.kept[:rows], block.hidden[:rows], row_scale)

    def add(self, factors: Factors | None) -> None:
        """Add a block's gradients."""
        needs = self.needs
        if factors is None:
            return
        assert isinstance(factors, ScaledFactors)
        if needs.hidden:
            self._write_hidden(factors.dlogits, factors.row_scale, factors.first)
            if self.hidden_done is not None and factors.first + len(factors.dlogits) == self.call.how_many():
                self.hidden_done(self.out.hidden)
        if needs.weight:
            self._add_weight(factors.dlogits, factors.hidden)
        if needs.bias:
            self._add_bias(factors.dlogits, factors.row_scale)

    def finish(self) -> Gradients:
        """The gradients in the dtypes of the inputs."""
        weight, bias = self.out.weight, self.out.bias
        if self.needs.weight and self.weight is not weight:
            weight.zero_() if self.weight is None else weight.copy_(self.weight)
        if self.needs.bias:
            bias.zero_() if self.bias is None else bias.copy_(self.bias)
        return self.out

    def _write_hidden(self, grad: Tensor, row_scale: Tensor, first: int) -> None:
        """Write dX; if rows have a factor it comes in fp32, so that it is rounded once."""
        call = self.call
        dtype = torch.float32 if call.one_reference else self.out.hidden.dtype
        dx = torch.empty(grad.shape[0], call.H, dtype=dtype, device=grad.device)
        mm(grad, call.weight, dx)
        call.scatter(dx, row_scale, first, self.out.hidden)

    def _add_weight(self, grad: Tensor, x: Tensor) -> None:
        if self.weight is not None:
            mm(grad.t(), x, self.weight, add=True)
            return
        self.weight = self.new_weight()
        mm(grad.t(), x, self.weight)

    def new_weight(self) -> Tensor:
        """Memory for dW: the result, or an fp32 sum where there are several blocks."""
        weight = self.out.weight
        return weight if self.single else torch.empty_like(weight, dtype=torch.float32)

    def _add_bias(self, grad: Tensor, row_scale: Tensor) -> None:
        total = self.call.column_sums(grad, row_scale)
        self.bias = total if self.bias is None else self.bias + total
