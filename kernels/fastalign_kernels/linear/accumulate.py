"""The sums of a head call's gradients, a chunk at a time: dense, or with a tail (tail_columns.py)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..gemm import mm, uses_native_gemm
from ..ordered_sum import ordered_sum
from ..softmax.columns import column_grad
from ..softmax.rows import Coefficient, row_grad
from .chunks import Operands, TokenChunk
from .engine import Gradients
from .inputs import HeadInputs, NeedsGrad
from .tail_columns import GATHERED_BYTES, KeptColumns, dropped_grad

# Chunks whose rank-1 parts wait for one pair of thin GEMMs. The first GEMM then has 8 rows and reads the
# weight once; the second reads dW once.
FLUSH = 7


class _Rank1(NamedTuple):
    """The dropped part of a chunk's dlogits: dropped [C] times shape [V], and what smoothing adds."""

    tokens: Tensor | slice
    d_hidden: Tensor  # [C, H], of the kept columns alone
    dropped: Tensor  # [C]
    uniform: Tensor  # [C], what label smoothing adds to each column of a row
    shape: Tensor  # [V]
    hidden_sum: Tensor  # [H], dropped^T hidden


class ColumnGrads(NamedTuple):
    """Elements of a chunk's dlogits that a loss computes itself."""

    columns: Tensor  # [C, K] int64; a row's equal columns have equal values
    values: Tensor  # [C, K]


class GradAccumulator:
    """Sums dX, dW and the bias's gradient in the accumulator's dtype.

    dX is rounded to hidden's dtype once a token, dW and the bias's gradient once at the end.

    Memory is fresh in each call, and on a CPU its first touches cost: of the 174 ms x 2 cores at N 512 in
    bf16 on SmolLM2's head (a virtual machine, AMD EPYC), 95 went into 54 k page faults. Pages of 2 MiB
    (madvise) made it 127 ms when calls followed each other, but 304 after 3 s without one, when the host had
    taken the free memory back. They are therefore not used.
    """

    def __init__(self, inputs: HeadInputs, operands: Operands, needs: NeedsGrad) -> None:
        self.inputs, self.operands, self.needs = inputs, operands, needs
        hidden, weight = inputs.hidden, inputs.weight
        accumulator = operands.accumulator
        self.gathers_for_free = uses_native_gemm(hidden.device, hidden.dtype)
        self.d_hidden = hidden.new_empty(0)
        self.d_weight = weight.new_empty(0)
        self.d_bias = hidden.new_empty(0)
        if needs.hidden:
            self.d_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
        if needs.weight:
            self.d_weight = torch.empty(weight.shape, dtype=accumulator, device=hidden.device)
        if needs.bias:
            self.d_bias = torch.zeros(inputs.vocab_size, dtype=accumulator, device=hidden.device)
        self.weight_is_empty = True  # d_weight holds nothing yet
        self.tile = torch.empty(0, dtype=operands.grad, device=hidden.device)
        self.waiting: list[_Rank1] = []
        self.uniform_sum: Tensor | None = None

    def _tile(self, rows: int, columns: int) -> Tensor:
        """Memory for dlogits, until the next call."""
        if self.tile.numel() < rows * columns:
            self.tile = torch.empty(rows * columns, dtype=self.tile.dtype, device=self.tile.device)
        return self.tile[: rows * columns].view(rows, columns)

    def add_dense(self, chunk: TokenChunk, coefficients: Tensor, replaced: ColumnGrads | None = None) -> None:
        """All columns: dlogits in place (on a GPU from fp32 to the GEMMs' dtype), a GEMM for dX and dW.

        replaced: elements of dlogits that replace those of the coefficients.
        """
        operands, needs, logits = self.operands, self.needs, chunk.logits
        grad = logits if operands.grad == operands.accumulator else self._tile(*logits.shape)
        row_grad(
            logits[None],
            chunk.ids,
            operands.bias,
            self.inputs.options.transform,
            chunk.stats,
            coefficients,
            grad[None],
        )
        if replaced is not None:
            grad.scatter_(1, replaced.columns, replaced.values.to(grad.dtype))
        if needs.hidden:
            d_hidden = torch.empty(chunk.hidden.shape, dtype=operands.grad, device=logits.device)
            mm(grad, operands.weight, d_hidden)
            self.d_hidden[chunk.tokens] = d_hidden.to(self.d_hidden.dtype)
        if needs.weight:
            mm(grad.t(), chunk.hidden, self.d_weight, add=not self.weight_is_empty)
            self.weight_is_empty = False
        if needs.bias:
            self.d_bias += grad.sum(0, dtype=operands.accumulator)

    def add_kept(self, chunk: TokenChunk, coefficients: Tensor, kept: KeptColumns) -> None:
        """The kept columns, gathered; the rank-1 matrix of the rest waits for its thin GEMMs."""
        needs = self.needs
        if needs.weight and self.weight_is_empty:
            self.d_weight.zero_()
            self.weight_is_empty = False
        d_hidden, totals = self._add_columns(chunk, coefficients, kept)
        dropped = dropped_grad(totals, coefficients)
        # Of dz/dx's sign, which is logit_scale's; 0 where nothing is dropped or has a slope.
        total = ordered_sum(kept.dropped_sums)
        shape = kept.dropped_sums / torch.where(total == 0, 1.0, total)
        logit_scale, _, temperature = self.inputs.options.transform
        uniform = coefficients[Coefficient.UNIFORM] * (logit_scale / temperature)
        hidden = chunk.hidden.to(self.operands.accumulator)
        self.waiting.append(_Rank1(chunk.tokens, d_hidden, dropped, uniform, shape, dropped @ hidden))
        uniform_sum = uniform @ hidden
        self.uniform_sum = uniform_sum if self.uniform_sum is None else self.uniform_sum + uniform_sum
        if needs.bias:
            self.d_bias += shape * dropped.sum() + uniform.sum()
        if len(self.waiting) == FLUSH:
            self._flush()

    def _add_columns(
        self, chunk: TokenChunk, coefficients: Tensor, kept: KeptColumns
    ) -> tuple[Tensor, Tensor]:
        """Add the kept columns' dW and bias gradient; their dX [C, H], and the totals [2, C] of the rest."""
        inputs, operands, needs = self.inputs, self.operands, self.needs
        (C, H), V = chunk.hidden.shape, inputs.vocab_size
        accumulator = operands.accumulator
        totals = kept.totals
        d_hidden = torch.zeros(C, H, dtype=accumulator, device=chunk.hidden.device)
        gathered = 0 if self.gathers_for_free else H * (operands.factor.itemsize + accumulator.itemsize)
        width = max(1024, GATHERED_BYTES // (C * operands.grad.itemsize + gathered))
        for first in range(0, kept.columns.numel(), width):
            columns = kept.columns[first : first + width]
            grad = self._tile(C, columns.numel())
            logits = kept.logits
            if logits.shape[1] != V:
                logits = logits[:, first : first + width]
            totals = totals - column_grad(
                logits,
                columns,
                chunk.ids,
                operands.bias,
                inputs.options.transform,
                chunk.stats,
                coefficients,
                vocab_size=V,
                out=grad,
            )
            if needs.hidden:
                mm(grad, operands.weight, d_hidden, add=True, right_rows=columns)
            if needs.weight:
                mm(grad.t(), chunk.hidden, self.d_weight, add=True, out_rows=columns)
            if needs.bias:
                self.d_bias.index_add_(0, columns, grad.sum(0, dtype=accumulator))
        return d_hidden, totals

    def _flush(self) -> None:
        """Add dX and dW of the rank-1 parts that wait."""
        operands = self.operands
        shapes = torch.stack([part.shape for part in self.waiting])
        if self.needs.hidden:
            H = self.inputs.hidden.shape[1]
            towards = torch.empty(len(shapes) + 1, H, dtype=operands.accumulator, device=shapes.device)
            left = torch.cat([shapes, torch.ones_like(shapes[:1])]).to(operands.factor)
            mm(left, operands.weight, towards)
            *of_shapes, of_ones = towards
            for part, w in zip(self.waiting, of_shapes):
                tail = torch.outer(part.dropped, w).add_(torch.outer(part.uniform, of_ones))
                self.d_hidden[part.tokens] = part.d_hidden.add_(tail).to(self.d_hidden.dtype)
        if self.needs.weight:
            hidden_sums = torch.stack([part.hidden_sum for part in self.waiting])
            mm(shapes.t(), hidden_sums, self.d_weight, add=True)
        self.waiting.clear()

    def finish(self) -> Gradients:
        """The sums, in the inputs' dtypes."""
        if self.waiting:
            self._flush()
        if self.needs.weight and self.weight_is_empty:
            self.d_weight.zero_()
        if self.needs.weight and self.uniform_sum is not None:
            self.d_weight += self.uniform_sum
        bias = self.inputs.bias
        d_bias = self.d_bias if bias is None or not self.needs.bias else self.d_bias.to(bias.dtype)
        return Gradients(self.d_hidden, self.d_weight.to(self.inputs.weight.dtype), d_bias)
