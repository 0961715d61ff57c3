"""The gradients of one product of the logits: X W^T, or U B^T of a LoRA adapter (low_rank.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..gemm import mm
from .chunks import Operands
from .engine import Gradients
from .inputs import HeadInputs, NeedsGrad
from .sharded_collectives import Ranks, RankSum


class Product(NamedTuple):
    """A product of the logits, states [N, K] weight [V, K]^T, and which of its factors need a gradient."""

    states: Tensor
    weight: Tensor
    operand: Tensor  # the weight in the dtype of its GEMMs
    states_grad: bool
    weight_grad: bool


def products_of(inputs: HeadInputs, operands: Sequence[Tensor], needs: NeedsGrad) -> list[Product]:
    """The products of a call's logits: X W^T, then U B^T if there is a LoRA adapter."""
    products = [Product(inputs.hidden, inputs.weight, operands[0], needs.hidden, needs.weight)]
    if inputs.lora is not None:
        products.append(Product(*inputs.lora, operands[1], needs.lora_hidden, needs.lora_weight))
    return products


def gradients_of(of_products: list[tuple[Tensor, Tensor]], d_bias: Tensor) -> Gradients:
    """Gradients of a call from those of its products, in the order of `products_of`."""
    (d_hidden, d_weight), *thin = of_products
    d_lora = thin[0] if thin else (d_hidden.new_empty(0), d_hidden.new_empty(0))
    return Gradients(d_hidden, d_weight, d_bias, *d_lora)


class Rank1(NamedTuple):
    """The dropped part of a chunk's dlogits: dropped [C] times shape [V], and what smoothing adds."""

    tokens: Tensor | slice
    dropped: Tensor  # [C]
    uniform: Tensor  # [C], what label smoothing adds to each column of a row
    shape: Tensor  # [V]


class _Waiting(NamedTuple):
    """A chunk's gradients whose rank-1 part is not added yet."""

    d_states: Tensor  # [C, K], of the kept columns alone
    state_sum: Tensor  # [K], dropped^T states


class ProductGrads:
    """Sums d_states and d_weight in the accumulator's dtype; of a sharded head d_states also over ranks."""

    def __init__(
        self, product: Product, operands: Operands, ranks: Ranks | None, *, states_dtype: torch.dtype
    ) -> None:
        """states_dtype: of d_states when it is finished."""
        self.product, self.operands, self.states_dtype = product, operands, states_dtype
        states, weight = product.states, product.weight
        self.d_states, self.d_weight = states.new_empty(0), weight.new_empty(0)
        if product.states_grad:
            dtype = states_dtype if ranks is None else operands.accumulator
            self.d_states = torch.zeros_like(states, dtype=dtype, memory_format=torch.contiguous_format)
        self.rank_sum = RankSum(self.d_states, ranks) if ranks is not None and product.states_grad else None
        if product.weight_grad:
            self.d_weight = torch.empty(weight.shape, dtype=operands.accumulator, device=states.device)
        self.weight_is_empty = True  # d_weight holds nothing yet
        self.waiting: list[_Waiting] = []
        self.uniform_sum: Tensor | None = None

    def add_dense(self, tokens: Tensor | slice, grad: Tensor, states: Tensor) -> None:
        """Add the gradients from a chunk's dlogits [C, V] and states [C, K]: a GEMM each."""
        if self.product.states_grad:
            dtype = torch.promote_types(self.operands.grad, self.d_states.dtype)
            d_states = torch.empty(states.shape, dtype=dtype, device=grad.device)
            mm(grad, self.product.operand, d_states)
            self.d_states[tokens] = d_states.to(self.d_states.dtype)
            self._has(states.shape[0])
        if self.product.weight_grad:
            mm(grad.t(), states, self.d_weight, add=not self.weight_is_empty)
            self.weight_is_empty = False

    def new_kept(self, states: Tensor) -> Tensor:
        """Memory for the kept columns' part of d_states, which `add_columns` fills."""
        if self.product.weight_grad and self.weight_is_empty:
            self.d_weight.zero_()
            self.weight_is_empty = False
        return torch.zeros(states.shape, dtype=self.operands.accumulator, device=states.device)

    def add_columns(self, grad: Tensor, columns: Tensor, states: Tensor, d_states: Tensor) -> None:
        """Add some kept columns of a chunk: dlogits [C, K']."""
        if self.product.states_grad:
            mm(grad, self.product.operand, d_states, add=True, right_rows=columns)
        if self.product.weight_grad:
            mm(grad.t(), states, self.d_weight, add=True, out_rows=columns)

    def wait(self, part: Rank1, states: Tensor, d_states: Tensor) -> None:
        """Let the chunk's rank-1 part wait for its thin GEMMs."""
        states = states.to(self.operands.accumulator)
        self.waiting.append(_Waiting(d_states, part.dropped @ states))
        uniform_sum = part.uniform @ states
        self.uniform_sum = uniform_sum if self.uniform_sum is None else self.uniform_sum + uniform_sum

    def flush(self, parts: list[Rank1], shapes: Tensor) -> None:
        """Add the rank-1 parts that wait; shapes [parts, V]."""
        if self.product.states_grad:
            operand = self.product.operand
            size = (len(shapes) + 1, operand.shape[1])
            towards = torch.empty(size, dtype=self.operands.accumulator, device=shapes.device)
            left = torch.cat([shapes, torch.ones_like(shapes[:1])]).to(operand.dtype)
            mm(left, operand, towards)
            *of_shapes, of_ones = towards
            for part, waiting, w in zip(parts, self.waiting, of_shapes):
                tail = torch.outer(part.dropped, w).add_(torch.outer(part.uniform, of_ones))
                self.d_states[part.tokens] = waiting.d_states.add_(tail).to(self.d_states.dtype)
                self._has(tail.shape[0])
        if self.product.weight_grad:
            state_sums = torch.stack([waiting.state_sum for waiting in self.waiting])
            mm(shapes.t(), state_sums, self.d_weight, add=True)
        self.waiting.clear()

    def _has(self, tokens: int) -> None:
        """Count tokens that d_states has; after the last, their sum over the ranks runs beside dW."""
        if self.rank_sum is not None:
            self.rank_sum.add_rows(tokens)

    def finish(self) -> tuple[Tensor, Tensor]:
        """d_states, and d_weight in the weight's dtype; of size 0 where not needed."""
        if self.rank_sum is not None:
            self.d_states = self.rank_sum.finish().to(self.states_dtype)
        if self.product.weight_grad and self.weight_is_empty:
            self.d_weight.zero_()
        if self.product.weight_grad and self.uniform_sum is not None:
            self.d_weight += self.uniform_sum
        return self.d_states, self.d_weight.to(self.product.weight.dtype)
