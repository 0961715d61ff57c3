"""What a head call adds up, a block of tokens at a time: gradients of hidden states, weight and bias, dense
or with a tail (linear/tail_columns.py)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..gemm import mm, own_gemm
from ..ordered_sum import ordered_sum
from ..softmax.columns import column_grad
from ..softmax.rows import Coefficient, Transform, accumulator_dtype, row_grad
from .tail_columns import GATHERED_BYTES, Kept, dropped_grad

# blocks whose rank-1 parts wait for one pair of thin GEMMs, the first of 8 rows: it reads the weight, the
# other dW
FLUSH = 7


class Gradients(NamedTuple):
    """Gradients wanted from a head call, each [.., ..] or of size 0 when it is not."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor  # [V]


def fake_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, hidden_grad: bool, weight_grad: bool, bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(hidden, memory_format=torch.contiguous_format)
        if hidden_grad
        else hidden.new_empty(0),
        torch.empty_like(weight, memory_format=torch.contiguous_format)
        if weight_grad
        else weight.new_empty(0),
        bias.new_empty(bias.shape) if bias_grad and bias is not None else hidden.new_empty(0),
    )


class Block(NamedTuple):
    """Tokens whose logits, or their kept columns, are in memory."""

    tokens: Tensor | slice  # their indices
    ids: Tensor  # [C]
    x: Tensor  # [C, H], hidden states as they enter a GEMM
    stats: Tensor  # [7, C]
    logits: Tensor  # [C, V]
    coefficients: Tensor | None = None  # row_grad's [4, C]

    def part(self, begin: int, end: int) -> Block:
        tokens = self.tokens
        own = (
            slice(tokens.start + begin, tokens.start + end)
            if isinstance(tokens, slice)
            else tokens[begin:end]
        )
        coefficients = None if self.coefficients is None else self.coefficients[:, begin:end].contiguous()
        stats = self.stats[:, begin:end].contiguous()
        return Block(own, self.ids[begin:end], self.x[begin:end], stats, self.logits[begin:end], coefficients)


class _Waiting(NamedTuple):
    """The rank-1 part of a block: dropped [C] times shape [V]."""

    tokens: Tensor | slice
    d_hidden: Tensor  # [C, H], without it
    dropped: Tensor
    uniform: Tensor  # [C], what label smoothing adds to each column of a row
    shape: Tensor
    x_sum: Tensor  # [H], dropped^T x


class GradientSums:
    """The sums in the accumulator's dtype; dX is rounded to hidden's once a token, dW and the bias's once at
    the end.

    GEMMs take hidden states and weight in hidden's dtype. On a CPU without our own GEMMs, where torch's would
    round their output to that, the chunk's hidden states and, once, the weight are widened.

    Memory is fresh in each call, and on a CPU its first touches cost: of the 174 ms x 2 cores at N 512 in
    bf16 on SmolLM2's head (a virtual machine, AMD EPYC) 95 went into 54 k page faults. Pages of 2 MiB
    (madvise) made it 127 ms when calls followed each other, and 304 after 3 s without one, when the host had
    taken the free memory back: not used.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        transform: Transform,
        wanted: tuple[bool, bool, bool],
    ) -> None:
        self.hidden, self.weight, self.transform, self.wanted = hidden, weight, transform, wanted
        self.accumulator = accumulator_dtype(hidden.dtype)
        self.own_gemm = own_gemm(hidden.device, hidden.dtype)
        self.compute = hidden.dtype if hidden.is_cuda or self.own_gemm else self.accumulator
        self.gradient = (
            self.compute if hidden.is_cuda else self.accumulator
        )  # dlogits and dX; our GEMMs round them while they pack
        self.w = weight.to(self.compute)
        self.bias = None if bias is None else bias.to(self.accumulator)
        self.bias_dtype = None if bias is None else bias.dtype
        V, H = weight.shape
        self.d_hidden = (
            torch.zeros_like(hidden, memory_format=torch.contiguous_format)
            if wanted[0]
            else hidden.new_empty(0)
        )
        self.d_weight = (
            torch.empty(V, H, dtype=self.accumulator, device=hidden.device)
            if wanted[1]
            else weight.new_empty(0)
        )
        self.d_bias = (
            torch.zeros(V, dtype=self.accumulator, device=hidden.device) if wanted[2] else hidden.new_empty(0)
        )
        self.empty = True  # d_weight holds nothing yet
        self.tile = torch.empty(0, dtype=self.gradient, device=hidden.device)
        self.waiting: list[_Waiting] = []
        self.uniform_sum: Tensor | None = None

    def _tile(self, rows: int, columns: int) -> Tensor:
        """Memory for dlogits, until the next."""
        if self.tile.numel() < rows * columns:
            self.tile = torch.empty(rows * columns, dtype=self.gradient, device=self.hidden.device)
        return self.tile[: rows * columns].view(rows, columns)

    def add(self, block: Block) -> None:
        """dlogits in place, or on a GPU from fp32 logits to the GEMMs' dtype, and a GEMM each for dX and
        dW."""
        assert block.coefficients is not None
        logits = block.logits
        grad = logits
        if self.gradient != self.accumulator:
            grad = self._tile(*logits.shape)
        row_grad(
            logits[None], block.ids, self.bias, self.transform, block.stats, block.coefficients, grad[None]
        )
        if self.wanted[0]:
            dx = torch.empty(block.x.shape, dtype=self.gradient, device=logits.device)
            mm(grad, self.w, dx)
            self.d_hidden[block.tokens] = dx.to(self.hidden.dtype)
        if self.wanted[1]:
            mm(grad.t(), block.x, self.d_weight, add=not self.empty)
            self.empty = False
        if self.wanted[2]:
            self.d_bias += grad.sum(0, dtype=self.accumulator)

    def add_kept(self, block: Block, kept: Kept) -> None:
        """The same of a block's kept columns, gathered; the rank-1 matrix of the others waits for its thin
        GEMMs."""
        tokens, ids, x, stats, _, coefficients = block
        assert coefficients is not None
        (C, H), V = x.shape, self.w.shape[0]
        if self.wanted[1] and self.empty:
            self.d_weight.zero_()
            self.empty = False
        totals = kept.totals
        dx = torch.zeros(C, H, dtype=self.accumulator, device=x.device)
        gathered = 0 if self.own_gemm else H * (self.compute.itemsize + self.accumulator.itemsize)
        width = max(1024, GATHERED_BYTES // (C * self.gradient.itemsize + gathered))
        for first in range(0, kept.columns.numel(), width):
            columns = kept.columns[first : first + width]
            grad = self._tile(C, columns.numel())
            logits = kept.logits if kept.logits.shape[1] == V else kept.logits[:, first : first + width]
            totals = totals - column_grad(
                logits, columns, ids, self.bias, self.transform, stats, coefficients, V, grad
            )
            if self.wanted[0]:
                mm(grad, self.w, dx, add=True, right_rows=columns)
            if self.wanted[1]:
                mm(grad.t(), x, self.d_weight, add=True, out_rows=columns)
            if self.wanted[2]:
                self.d_bias.index_add_(0, columns, grad.sum(0, dtype=self.accumulator))
        dropped = dropped_grad(totals, coefficients)
        total = ordered_sum(
            kept.others
        )  # of dz/dx's sign, which is logit_scale's; 0 where nothing is dropped or has a slope
        shape = kept.others / torch.where(total == 0, 1.0, total)
        scale, _, temperature = self.transform
        uniform = coefficients[Coefficient.UNIFORM] * (scale / temperature)
        wide = x.to(self.accumulator)
        self.waiting.append(_Waiting(tokens, dx, dropped, uniform, shape, dropped @ wide))
        self.uniform_sum = uniform @ wide if self.uniform_sum is None else self.uniform_sum + uniform @ wide
        if self.wanted[2]:
            self.d_bias += shape * dropped.sum() + uniform.sum()
        if len(self.waiting) == FLUSH:
            self._flush()

    def _flush(self) -> None:
        """dX and dW of the rank-1 parts."""
        shapes = torch.stack([part.shape for part in self.waiting])
        if self.wanted[0]:
            towards = torch.empty(
                len(shapes) + 1, self.w.shape[1], dtype=self.accumulator, device=shapes.device
            )
            mm(torch.cat([shapes, torch.ones_like(shapes[:1])]).to(self.compute), self.w, towards)
            *own, every = towards
            for part, w in zip(self.waiting, own):
                tail = torch.outer(part.dropped, w).add_(torch.outer(part.uniform, every))
                self.d_hidden[part.tokens] = part.d_hidden.add_(tail).to(self.hidden.dtype)
        if self.wanted[1]:
            mm(shapes.t(), torch.stack([part.x_sum for part in self.waiting]), self.d_weight, add=True)
        self.waiting.clear()

    def finish(self) -> Gradients:
        if self.waiting:
            self._flush()
        if self.wanted[1] and self.empty:
            self.d_weight.zero_()
        if self.wanted[1] and self.uniform_sum is not None:
            self.d_weight += self.uniform_sum
        d_bias = (
            self.d_bias if self.bias_dtype is None or not self.wanted[2] else self.d_bias.to(self.bias_dtype)
        )
        return Gradients(self.d_hidden, self.d_weight.to(self.weight.dtype), d_bias)
