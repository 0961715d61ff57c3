"""The sums of a head call's gradients, a chunk at a time: dense, or with a tail (tail_columns.py)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..ordered_sum import ordered_sum
from ..softmax.columns import column_grad
from ..softmax.rows import Coefficient, row_grad
from .chunks import Operands, TokenChunk
from .engine import Gradients, hidden_grad_dtype
from .inputs import HeadInputs, NeedsGrad
from .product_grads import ProductGrads, Rank1, gradients_of, products_of
from .sharded_collectives import Ranks
from .tail_columns import GATHERED_BYTES, KeptColumns, dropped_grad

# Chunks whose rank-1 parts wait for one pair of thin GEMMs. The first GEMM then has 8 rows and reads the
# weight once; the second reads dW once.
FLUSH = 7


class ColumnGrads(NamedTuple):
    """Elements of a chunk's dlogits that a loss computes itself."""

    columns: Tensor  # [C, K] int64, of the weight's rows; a row's equal columns have equal values
    values: Tensor  # [C, K]
    rows: Tensor | None = None  # [C, 1] bool: rows that have such elements; None: all


class GradAccumulator:
    """Sums dX, dW and the bias's gradient in the accumulator's dtype.

    dX is rounded to `hidden_grad_dtype` once a token, dW and the bias's gradient once at the end. The dX of a
    sharded head is summed over the ranks in the accumulator's dtype, and then rounded.

    Memory is fresh in each call. Pages of 2 MiB (madvise) are not used on a CPU: they cost fewer page faults
    while calls follow each other, and more time after a pause, when the host has taken the memory back.
    """

    def __init__(self, inputs: HeadInputs, operands: Operands, needs: NeedsGrad) -> None:
        self.inputs, self.operands, self.needs = inputs, operands, needs
        hidden = inputs.hidden
        products = products_of(inputs, operands.weights, needs)
        shards, ranks = inputs.options.shards, None
        if shards is not None and shards.reduces_hidden:
            # a GPU's host does not know how many tokens are not ignored
            tokens = -1 if hidden.is_cuda else int((inputs.ids >= 0).sum())
            ranks = Ranks(tokens, len(shards.rows), inputs.group)
        self.products = [
            ProductGrads(
                product,
                operands,
                ranks,
                states_dtype=product.states.dtype if number else hidden_grad_dtype(inputs),
            )
            for number, product in enumerate(products)
        ]
        self.d_bias = hidden.new_empty(0)
        if needs.bias:
            self.d_bias = torch.zeros(
                inputs.weight.shape[0], dtype=operands.accumulator, device=hidden.device
            )
        self.tile = torch.empty(0, dtype=operands.grad, device=hidden.device)
        self.waiting: list[Rank1] = []

    def _tile(self, rows: int, columns: int) -> Tensor:
        """Memory for dlogits, which the next call uses again."""
        if self.tile.numel() < rows * columns:
            self.tile = torch.empty(rows * columns, dtype=self.tile.dtype, device=self.tile.device)
        return self.tile[: rows * columns].view(rows, columns)

    def add_dense(self, chunk: TokenChunk, coefficients: Tensor, replaced: ColumnGrads | None = None) -> None:
        """Add a chunk's gradients over all columns: dlogits in place, then a GEMM each for dX and dW.

        On a GPU dlogits go from fp32 to the GEMMs' dtype.
        replaced: elements of dlogits that replace those of the coefficients.
        """
        operands, logits = self.operands, chunk.logits
        if not logits.shape[1]:  # a rank without rows
            return
        coefficients = self._local(chunk, coefficients)
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
            values = replaced.values.to(grad.dtype)
            if replaced.rows is not None:
                values = torch.where(replaced.rows, values, grad.gather(1, replaced.columns))
            grad.scatter_(1, replaced.columns, values)
        for product, states in zip(self.products, chunk.states):
            product.add_dense(chunk.tokens, grad, states)
        if self.needs.bias:
            self.d_bias += grad.sum(0, dtype=operands.accumulator)

    def add_kept(self, chunk: TokenChunk, coefficients: Tensor, kept: KeptColumns) -> None:
        """Add the gradients of the kept columns; the rank-1 matrix of the rest waits for its thin GEMMs."""
        coefficients = self._local(chunk, coefficients)
        d_states, totals = self._add_columns(chunk, coefficients, kept)
        dropped = dropped_grad(totals, coefficients)
        # total has the sign of dz/dx, which is logit_scale's; it is 0 if nothing is dropped or has a slope.
        total = ordered_sum(kept.dropped_sums)
        shape = kept.dropped_sums / torch.where(total == 0, 1.0, total)
        logit_scale, _, temperature = self.inputs.options.transform
        uniform = coefficients[Coefficient.UNIFORM] * (logit_scale / temperature)
        part = Rank1(chunk.tokens, dropped, uniform, shape)
        self.waiting.append(part)
        for product, states, d in zip(self.products, chunk.states, d_states):
            product.wait(part, states, d)
        if self.needs.bias:
            self.d_bias += shape * dropped.sum() + uniform.sum()
        if len(self.waiting) == FLUSH:
            self._flush()

    def _add_columns(
        self, chunk: TokenChunk, coefficients: Tensor, kept: KeptColumns
    ) -> tuple[list[Tensor], Tensor]:
        """Add the kept columns' dW and bias gradient; their dX [C, H] (and dU), the rest's totals [2, C]."""
        inputs, operands = self.inputs, self.operands
        (C, H), V = chunk.states[0].shape, inputs.weight.shape[0]
        accumulator = operands.accumulator
        totals = kept.totals
        d_states = [product.new_kept(states) for product, states in zip(self.products, chunk.states)]
        gathered = 0 if operands.native else H * (operands.factor.itemsize + accumulator.itemsize)
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
            for product, states, d in zip(self.products, chunk.states, d_states):
                product.add_columns(grad, columns, states, d)
            if self.needs.bias:
                self.d_bias.index_add_(0, columns, grad.sum(0, dtype=accumulator))
        return d_states, totals

    def _flush(self) -> None:
        """Add dX and dW of the rank-1 parts that wait."""
        shapes = torch.stack([part.shape for part in self.waiting])
        for product in self.products:
            product.flush(self.waiting, shapes)
        self.waiting.clear()

    def _local(self, chunk: TokenChunk, coefficients: Tensor) -> Tensor:
        """The coefficients [4, C] for the logits of this rank."""
        shards = self.inputs.options.shards
        if shards is None:
            return coefficients
        return shards.local_coefficients(coefficients, self.inputs.ids[chunk.tokens])

    def finish(self) -> Gradients:
        """The sums, in the inputs' dtypes."""
        if self.waiting:
            self._flush()
        bias = self.inputs.bias
        d_bias = self.d_bias if bias is None or not self.needs.bias else self.d_bias.to(bias.dtype)
        return gradients_of([product.finish() for product in self.products], d_bias)
