"""What a head call adds up, a block of tokens at a time: gradients of hidden states, weight and bias, dense or with a tail (tail.py)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .plan import bf16_gemms
from .rows import Coefficient, Transform, accumulator_dtype, row_grad
from .tail import GATHERED_BYTES, Kept, at_columns, dropped_grad, kept_grad

FLUSH = 4  # blocks whose rank-1 parts wait for one pair of thin GEMMs


class Gradients(NamedTuple):
    """Gradients wanted from a head call, each [.., ..] or of size 0 when it is not."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor  # [V]


def fake_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, hidden_grad: bool, weight_grad: bool, bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(hidden, memory_format=torch.contiguous_format) if hidden_grad else hidden.new_empty(0),
        torch.empty_like(weight, memory_format=torch.contiguous_format) if weight_grad else weight.new_empty(0),
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
        own = slice(tokens.start + begin, tokens.start + end) if isinstance(tokens, slice) else tokens[begin:end]
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


def mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _add_mm(out: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)


class GradientSums:
    """The sums in the accumulator's dtype; dX is rounded to hidden's once a token, dW and the bias's once at the end.

    On a CPU low-precision GEMMs round their output, so there the chunk's hidden states and, once, the weight are widened (see sweep.py for
    their speed). On a GPU inputs stay as they are.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: Transform, wanted: tuple[bool, bool, bool]) -> None:
        self.hidden, self.weight, self.transform, self.wanted = hidden, weight, transform, wanted
        self.accumulator = accumulator_dtype(hidden.dtype)
        self.compute = self.accumulator if hidden.device.type == "cpu" else hidden.dtype
        self.w = weight.to(self.compute)
        self.bias = None if bias is None else bias.to(self.accumulator)
        self.bias_dtype = None if bias is None else bias.dtype
        narrow = wanted[0] and hidden.device.type == "cpu" and bf16_gemms(hidden.dtype)  # dX is rounded once anyway: a GEMM in bf16
        self.w_narrow = weight.to(hidden.dtype) if narrow else self.w
        V, H = weight.shape
        self.d_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if wanted[0] else hidden.new_empty(0)
        self.d_weight = torch.empty(V, H, dtype=self.accumulator, device=hidden.device) if wanted[1] else weight.new_empty(0)
        self.d_bias = torch.zeros(V, dtype=self.accumulator, device=hidden.device) if wanted[2] else hidden.new_empty(0)
        self.empty = True  # d_weight holds nothing yet
        self.grad_tile: Tensor | None = None
        self.waiting: list[_Waiting] = []
        self.uniform_sum: Tensor | None = None

    def add(self, block: Block) -> None:
        """dlogits in place, or on a GPU from fp32 logits to the GEMMs' dtype, and a GEMM each for dX and dW."""
        assert block.coefficients is not None
        logits = block.logits
        grad = logits
        if self.compute != self.accumulator:
            if self.grad_tile is None or self.grad_tile.shape[0] < logits.shape[0]:
                self.grad_tile = torch.empty_like(logits, dtype=self.compute)
            grad = self.grad_tile[: logits.shape[0]]
        row_grad(logits[None], block.ids, self.bias, self.transform, block.stats, block.coefficients, grad[None])
        if self.wanted[0]:
            self.d_hidden[block.tokens] = torch.mm(grad.to(self.w_narrow.dtype), self.w_narrow).to(self.hidden.dtype)
        if self.wanted[1]:
            mm(grad.t(), block.x, self.d_weight) if self.empty else _add_mm(self.d_weight, grad.t(), block.x)
            self.empty = False
        if self.wanted[2]:
            self.d_bias += grad.sum(0, dtype=self.accumulator)

    def add_kept(self, block: Block, kept: Kept) -> None:
        """The same of a block's kept columns, gathered; the rank-1 matrix of the others waits for its thin GEMMs."""
        tokens, ids, x, stats, _, coefficients = block
        assert coefficients is not None
        C, H = x.shape
        if self.wanted[1] and self.empty:
            self.d_weight.zero_()
            self.empty = False
        at = at_columns(ids, kept.columns)
        dx = torch.zeros(C, H, dtype=self.accumulator, device=x.device)
        bytes_per_column = C * self.compute.itemsize + H * (self.w_narrow.dtype.itemsize + self.accumulator.itemsize)
        width = max(1024, GATHERED_BYTES // bytes_per_column)
        for first in range(0, kept.columns.numel(), width):
            columns = kept.columns[first : first + width]
            grad = torch.empty(C, columns.numel(), dtype=self.compute, device=x.device)
            kept_grad(kept, first, first + columns.numel(), at, self.transform, stats, coefficients, grad)
            if self.wanted[0]:
                w = self.w_narrow.index_select(0, columns)
                if w.dtype == self.compute:
                    _add_mm(dx, grad, w)
                else:
                    dx += torch.mm(grad.to(w.dtype), w)
            if self.wanted[1]:
                rows = torch.empty(columns.numel(), H, dtype=self.accumulator, device=x.device)
                mm(grad.t(), x, rows)
                self.d_weight.index_add_(0, columns, rows)
            if self.wanted[2]:
                self.d_bias.index_add_(0, columns, grad.sum(0, dtype=self.accumulator))
        dropped = dropped_grad(kept, coefficients)
        scale, _, temperature = self.transform
        uniform = coefficients[Coefficient.UNIFORM] * (scale / temperature)
        wide = x.to(self.accumulator)
        self.waiting.append(_Waiting(tokens, dx, dropped, uniform, kept.shape, dropped @ wide))
        self.uniform_sum = uniform @ wide if self.uniform_sum is None else self.uniform_sum + uniform @ wide
        if self.wanted[2]:
            self.d_bias += kept.shape * dropped.sum() + uniform.sum()
        if len(self.waiting) == FLUSH:
            self._flush()

    def _flush(self) -> None:
        """dX and dW of the rank-1 parts."""
        shapes = torch.stack([part.shape for part in self.waiting])
        if self.wanted[0]:
            towards = shapes.to(self.w.dtype) @ self.w
            every = self.w.sum(0, dtype=self.accumulator)
            for part, w in zip(self.waiting, towards.to(self.accumulator)):
                tail = torch.outer(part.dropped, w).add_(torch.outer(part.uniform, every))
                self.d_hidden[part.tokens] = part.d_hidden.add_(tail).to(self.hidden.dtype)
        if self.wanted[1]:
            self.d_weight.addmm_(shapes.t(), torch.stack([part.x_sum for part in self.waiting]))
        self.waiting.clear()

    def finish(self) -> Gradients:
        if self.waiting:
            self._flush()
        if self.wanted[1] and self.empty:
            self.d_weight.zero_()
        if self.wanted[1] and self.uniform_sum is not None:
            self.d_weight += self.uniform_sum
        d_bias = self.d_bias if self.bias_dtype is None or not self.wanted[2] else self.d_bias.to(self.bias_dtype)
        return Gradients(self.d_hidden, self.d_weight.to(self.weight.dtype), d_bias)
